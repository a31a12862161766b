"""The benchmarks as records: prompt, decoding arguments, metric, file format, and the published scores (section 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .metrics.anls import anls
from .metrics.matching import exact_match, option_accuracy
from .metrics.vqa import vqa_accuracy

# The paper gives an instruction after the question and not what stands between; a space, as in our training data.
ONE_WORD = "{question} Answer the question using a single word or phrase"


LETTER = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."


CAPTION = "Provide a one-sentence caption for the provided image"


CAPTION_WITH_TEXT = (
    "Generate a one-sentence caption for the provided image, incorporating textual elements visible in the image."
)


DESCRIPTION = "Generate a highly detailed description for the provided image using multiple sentences"


# --- Metrics ---


def one_by_one(metric: Callable[[str, Sequence[str]], float]) -> Callable[[list[str], list[list[str]]], list[float]]:
    """`metric` of a single answer, for many."""

    def scores(answers: list[str], references: list[list[str]]) -> list[float]:
        return [metric(answer, group) for answer, group in zip(answers, references, strict=True)]

    return scores


def cider_scores(answers: list[str], references: list[list[str]]) -> list[float]:
    from .metrics.cider import cider

    return cider(answers, references)[1].tolist()


def bleu_score(answers: list[str], references: list[list[str]]) -> float:
    from .metrics.bleu import bleu

    return bleu(answers, references)


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


CIDER = Metric("CIDEr", cider_scores, {"BLEU-4": bleu_score}, ("sacrebleu",))


# --- Tasks ---


@dataclass(frozen=True)
class Task:
    """One benchmark.

    split: what is evaluated where a data set has several and none is named; published: scores on `published_split`;
    prompt: with places for a question and options; format: a key of `formats.FORMATS`; server_keys: names of id and
    answer in the file that the benchmark's evaluation server takes. The paper does not say how it decoded: these are
    greedy, as in the published script, and long enough for the answers.
    """

    name: str
    split: str
    prompt: str
    metric: Metric
    format: str
    max_new_tokens: int
    num_beams: int = 1
    published_split: str = ""
    published: dict[str, float] = field(default_factory=dict)
    server_keys: tuple[str, str] | None = None

    @property
    def asks(self) -> bool:
        return "{question}" in self.prompt

    @property
    def has_options(self) -> bool:
        return "{options}" in self.prompt

    def prompt_for(self, question: str, options: Sequence[str] = ()) -> str:
        """The user's turn."""
        lines = [f"{letter}. {text}" for letter, text in zip(letters(len(options)), options, strict=True)]
        return self.prompt.format(question=question.strip(), options="\n".join(lines))


def letters(count: int) -> list[str]:
    """The first letters of the alphabet."""
    return [chr(ord("A") + index) for index in range(count)]


ANSWERS = ("question_id", "answer")


CAPTIONS = ("image_id", "caption")


TASKS = {
    task.name: task
    for task in (
        Task(
            "vqav2",
            "val",
            ONE_WORD,
            VQA,
            "vqa",
            max_new_tokens=32,
            published_split="test-dev",
            published={
                "Pheye-x4-448": 75.2,
                "Pheye-x4-672": 75.5,
                "Pheye-x2-448": 76.0,
                "Pheye-x2-672": 76.4,
                "moondream2": 77.7,
                "MoE-LLaVA-2.7Bx4": 77.1,
            },
            server_keys=ANSWERS,
        ),
        Task(
            "textvqa",
            "val",
            ONE_WORD,
            VQA,
            "textvqa",
            max_new_tokens=32,
            published_split="val",
            published={
                "Pheye-x4-448": 45.9,
                "Pheye-x4-672": 49.2,
                "Pheye-x2-448": 47.3,
                "Pheye-x2-672": 50.5,
                "moondream2": 49.7,
                "MoE-LLaVA-2.7Bx4": 50.2,
            },
            server_keys=ANSWERS,
        ),
        Task(
            "nocaps",
            "val",
            CAPTION,
            CIDER,
            "coco-captions",
            max_new_tokens=64,
            published_split="val",
            published={
                "Pheye-x4-448": 110.1,
                "Pheye-x4-672": 110.8,
                "Pheye-x2-448": 111.8,
                "Pheye-x2-672": 110.5,
                "moondream2": 92.5,
            },
            server_keys=CAPTIONS,
        ),
        Task(
            "textcaps",
            "val",
            CAPTION_WITH_TEXT,
            CIDER,
            "textcaps",
            max_new_tokens=64,
            published_split="test",
            published={
                "Pheye-x4-448": 106.4,
                "Pheye-x4-672": 111.9,
                "Pheye-x2-448": 108.9,
                "Pheye-x2-672": 115.9,
                "moondream2": 120.2,
            },
            server_keys=CAPTIONS,
        ),
        Task("docci", "test", DESCRIPTION, CIDER, "docci", max_new_tokens=256),
        Task("okvqa", "val", ONE_WORD, VQA, "vqa", max_new_tokens=32),
        Task("aokvqa", "val", LETTER, OPTION, "aokvqa", max_new_tokens=32),
        Task("gqa", "testdev", ONE_WORD, MATCH, "gqa", max_new_tokens=32, server_keys=("questionId", "prediction")),
        Task("ocrvqa", "test", ONE_WORD, MATCH, "ocrvqa", max_new_tokens=64),
        Task("stvqa", "train", ONE_WORD, ANLS, "stvqa", max_new_tokens=32, server_keys=ANSWERS),
    )
}
