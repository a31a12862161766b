"""The paper's training stages as records (section 3.3): learning rate and data of each.

A stage may be run on the paper's data, each set under its name here, or on own data under any other name.
"""

from dataclasses import dataclass, replace

from ..common.command import InputError
from ..processing_pheye import CAPTION_WITH_TEXT_INSTRUCTION, LETTER_INSTRUCTION, ONE_WORD_INSTRUCTION
from .formats import Source


@dataclass(frozen=True)
class StageSource:
    """A data set of the paper: its samples per epoch (None where only the stage's sum is published), for which a file
    that is smaller is not repeated, and how they are shown; for the fields see `Source`."""

    samples: int | None = None
    prompt: str = ""
    caption: bool = False
    turns: int | None = 1


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe; `samples` is the sum that the paper gives for its data sets."""

    name: str
    learning_rate: float
    samples: int
    sources: dict[str, StageSource]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("describe", 2e-4, 1_246_000, {"sharegpt4v-pt": StageSource(1_246_000, caption=True)}),
        Stage(
            "instruct",
            1e-4,
            964_000,
            {"mimic-it": StageSource(), "lrv": StageSource(), "svit": StageSource(), "lvis-instruct": StageSource()},
        ),
        Stage(
            "tasks",
            5e-5,
            676_000,
            {
                "llava": StageSource(158_000),
                "llavar": StageSource(20_000),
                "vqav2": StageSource(166_000, ONE_WORD_INSTRUCTION),
                "gqa": StageSource(144_000, ONE_WORD_INSTRUCTION),
                "ok-vqa": StageSource(9_000, ONE_WORD_INSTRUCTION),
                "ocr-vqa": StageSource(80_000, ONE_WORD_INSTRUCTION),
                "textvqa": StageSource(35_000, ONE_WORD_INSTRUCTION),
                "st-vqa": StageSource(26_000, ONE_WORD_INSTRUCTION),
                "a-okvqa": StageSource(17_000, LETTER_INSTRUCTION),
                "textcaps": StageSource(22_000, CAPTION_WITH_TEXT_INSTRUCTION),
            },
        ),
    )
}


def stage_sources(stage: Stage, described: list[tuple[Source, set[str]]]) -> list[Source]:
    """Sources with what the stage's records say where they leave it out; those of other names stay as they are.

    described: each with the names of the fields that were said of it.

    Raises:
        InputError: if some of the stage's data sets are among the sources, but not all.
    """
    given = {source.name for source, _ in described}
    missing = {name: record for name, record in stage.sources.items() if name not in given}
    if missing and len(missing) < len(stage.sources):
        listed = ", ".join(f"{name} ({size_of(record, stage)})" for name, record in missing.items())
        raise InputError(
            f"Of the data of stage {stage.name!r}, these are missing: {listed}. Add them to the mixture file under "
            "these names, or give the sets that you have names of your own, to train on them as they are."
        )
    return [completed(source, said, stage.sources.get(source.name)) for source, said in described]


def size_of(record: StageSource, stage: Stage) -> str:
    if record.samples is None:
        return f"{stage.samples:,} samples together with {', '.join(stage.sources)}"
    return f"{record.samples:,} samples"


def completed(source: Source, said: set[str], record: StageSource | None) -> Source:
    """`source` with the record's values for what was not `said` of it."""
    if record is None:
        return source
    fields = {field: getattr(record, field) for field in ("prompt", "caption", "turns") if field not in said}
    if not said & {"samples", "weight", "most"}:
        fields["most"] = record.samples
    return replace(source, **fields)
