"""One question of a benchmark, whatever file it comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common.command import InputError
from .tasks import Task, letters

ROWS = "rows.jsonl"  # in the folder of an evaluation, a line per sample
MOST_OPTIONS = 26  # each has a letter


@dataclass(frozen=True)
class Sample:
    """What is asked, and what counts as right.

    names: where the image may be inside the folder of images, the likeliest first; image: its path, or a function
    that gives it, or a list of several or none; references: None if they are not public; split: None where the file
    does not say; system: message, where the sample has one of its own.
    """

    id: str | int
    names: tuple[str, ...] = ()
    image: Path | str | bytes | Callable | list | None = None
    question: str = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] | None = None
    split: str | None = None
    image_id: str | int | None = None
    system: str | None = None


def called(image: object) -> str | list | None:
    """What the data call an image, a file or a URL, or those of several; None where they do not."""
    if isinstance(image, list):
        return [called(one) for one in image]
    return image.name if isinstance(image, Path) else image if isinstance(image, str) else None


def texts(answers: object) -> tuple[str, ...] | None:
    """References of the shapes in which files and data sets hold them: a text, a list, or objects with an `answer`."""
    if isinstance(answers, dict):  # a list of objects that `datasets` has turned into an object of lists
        answers = answers["answer"]
    if isinstance(answers, str):
        answers = [answers]
    found = tuple(answer["answer"] if isinstance(answer, dict) else answer for answer in answers or ())
    return found or None


def right_option(options: list[str], index: int | None) -> tuple[str, str] | None:
    """Letter and text of the right option; None if it is not public."""
    if isinstance(options, str) or not 0 < len(options) <= MOST_OPTIONS:
        raise ValueError(f"the options {options!r:.200} are no list of 1 to {MOST_OPTIONS} texts")
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(options):
        raise ValueError(f"the right option is {index!r}, which is none of the numbers 0 to {len(options) - 1}")
    return letters(len(options))[index], options[index]


def check_samples(samples: list[Sample], split: str, source: str, task: Task):
    """Raise InputError unless there are samples whose questions and references are texts, with answers for all.

    A split whose name begins with `test` may have no answers at all, if there is a server that has them.
    """
    if not samples:
        raise InputError(f"{source} holds no samples; check that it was downloaded whole.")
    for sample in samples:
        given = (sample.question, *sample.options, *(sample.references or ()))
        if wrong := [text for text in given if not isinstance(text, str)]:
            raise InputError(f"Sample {sample.id!r} of {source} holds {wrong[0]!r} where a text belongs.")
        if task.asks and not sample.question.strip():
            raise InputError(f"The question of {sample.id!r} in {source} is empty; leave such samples out.")
    without = [sample.id for sample in samples if sample.references is None]
    secret = len(without) == len(samples) and split.startswith("test")
    if not without or (secret and task.server_keys):
        return
    if secret:
        raise InputError(
            f"{source} has no answers, and no server's file is known for --task {task.name}; choose a "
            "split with answers."
        )
    raise InputError(
        f"{len(without)} of {len(samples)} samples of {source} have no answers, {without[0]!r} for example. Give a "
        "file or column that has them (--annotations for VQAv2 and OK-VQA, --answers_column for a data set), or "
        "--split test if they are secret."
    )
