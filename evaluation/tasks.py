"""The benchmarks as records: prompt, decoding arguments, metric and file format (section 3 of the paper)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..common.published import PUBLISHED, Published
from ..pipeline_pheye import DEFAULT_MAX_NEW_TOKENS
from ..processing_pheye import (
    CAPTION_INSTRUCTION,
    CAPTION_WITH_TEXT_INSTRUCTION,
    DESCRIPTION_INSTRUCTION,
    LETTER_INSTRUCTION,
    ONE_WORD_INSTRUCTION,
)
from .metrics.anls import anls
from .metrics.bleu import bleu
from .metrics.cider import cider
from .metrics.matching import exact_match, option_accuracy
from .metrics.vqa import vqa_accuracy

# The paper gives an instruction after the question and not what stands between; a space, as in our training data.
ONE_WORD = f"{{question}} {ONE_WORD_INSTRUCTION}"
LETTER = f"{{question}}\n{{options}}\n{LETTER_INSTRUCTION}"

# --- Metrics ---


def one_by_one(metric: Callable[[str, Sequence[str]], float]) -> Callable[[list[str], list[list[str]]], list[float]]:
    """`metric` of a single answer, for many."""

    def scores(answers: list[str], references: list[list[str]]) -> list[float]:
        return [metric(answer, group) for answer, group in zip(answers, references, strict=True)]

    return scores


def cider_scores(answers: list[str], references: list[list[str]]) -> list[float]:
    return cider(answers, references)[1].tolist()


@dataclass(frozen=True)
class Metric:
    """`scores`: of each answer, on a scale whose hundredfold is printed; the score of all is their mean.

    `others`: further scores of the whole corpus. `packages`: what must be installed to compute them.
    """

    name: str
    scores: Callable[[list[str], list[list[str]]], list[float]]
    others: dict[str, Callable[[list[str], list[list[str]]], float]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


VQA = Metric("VQA accuracy", one_by_one(vqa_accuracy))
ANLS = Metric("ANLS", one_by_one(anls))
MATCH = Metric("exact match", one_by_one(exact_match))
OPTION = Metric("multiple choice accuracy", one_by_one(option_accuracy))
CIDER = Metric("CIDEr", cider_scores, {"BLEU-4": bleu}, ("sacrebleu",))
METRICS = {"exact_match": MATCH, "vqa_accuracy": VQA, "anls": ANLS, "cider": CIDER}  # for data of one's own

# --- Tasks ---


@dataclass(frozen=True)
class Task:
    """One benchmark.

    split: what is evaluated where a data set has several and none is named; prompt: with places for a question and
    options; format: a key of `formats.FORMATS`, or `OWN`; server_keys: names of id and answer in the file that the
    benchmark's evaluation server takes. The paper does not say how it decoded: these are greedy, as in the published
    script, and long enough for the answers.
    """

    name: str
    split: str
    prompt: str
    metric: Metric
    format: str
    max_new_tokens: int
    num_beams: int = 1
    server_keys: tuple[str, str] | None = None

    @property
    def asks(self) -> bool:
        return "{question}" in self.prompt

    @property
    def has_options(self) -> bool:
        return "{options}" in self.prompt

    @property
    def published(self) -> Published | None:
        return PUBLISHED.get(self.name)

    def prompt_for(self, question: str, options: Sequence[str] = ()) -> str:
        """The user's turn. Other braces than those of the two places stay."""
        lines = [f"{letter}. {text}" for letter, text in zip(letters(len(options)), options, strict=True)]
        parts = {"question": question.strip(), "options": "\n".join(lines)}
        return re.sub(r"\{(question|options)\}", lambda place: parts[place[1]], self.prompt)


def letters(count: int) -> list[str]:
    """The first letters of the alphabet."""
    return [chr(ord("A") + index) for index in range(count)]


ANSWERS = ("question_id", "answer")
CAPTIONS = ("image_id", "caption")

OWN = "own"  # data of one's own, whose prompt and metric the user chooses

TASKS = {
    task.name: task
    for task in (
        Task("vqav2", "val", ONE_WORD, VQA, "vqa", max_new_tokens=32, server_keys=ANSWERS),
        Task("textvqa", "val", ONE_WORD, VQA, "textvqa", max_new_tokens=32, server_keys=ANSWERS),
        Task("nocaps", "val", CAPTION_INSTRUCTION, CIDER, "coco-captions", max_new_tokens=64, server_keys=CAPTIONS),
        Task(
            "textcaps",
            "val",
            CAPTION_WITH_TEXT_INSTRUCTION,
            CIDER,
            "textcaps",
            max_new_tokens=64,
            server_keys=CAPTIONS,
        ),
        Task("docci", "test", DESCRIPTION_INSTRUCTION, CIDER, "docci", max_new_tokens=256),
        Task("okvqa", "val", ONE_WORD, VQA, "vqa", max_new_tokens=32),
        Task("aokvqa", "val", LETTER, OPTION, "aokvqa", max_new_tokens=32),
        Task("gqa", "testdev", ONE_WORD, MATCH, "gqa", max_new_tokens=32, server_keys=("questionId", "prediction")),
        Task("ocrvqa", "test", ONE_WORD, MATCH, "ocrvqa", max_new_tokens=64),
        Task("stvqa", "train", ONE_WORD, ANLS, "stvqa", max_new_tokens=32, server_keys=ANSWERS),
        Task(OWN, "validation", "{question}", MATCH, OWN, max_new_tokens=DEFAULT_MAX_NEW_TOKENS),
    )
}
