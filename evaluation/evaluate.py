"""A benchmark's score by one command.

    pheye evaluate --model FOLDER_OR_ID --task TASK --data FILE_OR_DATASET --output FOLDER
    accelerate launch --num_processes 8 -m pheye.evaluation.evaluate ...

The folder gets `rows.jsonl`, a line per sample (id, question, references, answer or error, score), and `result.json`,
the score with its confidence interval and all that it depends on. Where the answers are secret, it gets the file that
the evaluation server takes instead of a score. After a kill, the same command goes on where the rows end.
"""

import argparse
import hashlib
import json
import platform
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from ..answering.engine import answer, default_workers, open_model
from ..answering.rows import Request, encode
from ..common.command import (
    InputError,
    Interrupted,
    Parser,
    add_budget_option,
    add_model_options,
    at_least,
    exit_status,
    process_state,
    require,
)
from ..common.files import write_atomically
from ..common.json_lines import parse_json, read_rows
from ..common.machine import versions
from ..common.published import Published
from ..common.tables import IMAGE_SOURCES
from .boxes import Boxes, accuracy_by_box, answer_areas, read_boxes
from .formats import found_images
from .metrics.bootstrap import confidence_interval
from .samples import ROWS, Sample, called
from .sources import WHERE_IMAGES_ARE, read_samples
from .tasks import METRICS, OWN, TASKS, VQA, Task
from .tertiles import tertiles

LEVEL = 0.95  # of the confidence interval
VQA_REFERENCES = 4  # with fewer, no answer could be wholly right
RESULT, SERVER_FILE = "result.json", "server.json"

# --- What is asked ---


def find_task(name: str, prompt: str | None = None, metric: str | None = None) -> Task:
    """The task of this name; that for data of one's own with this prompt and metric, where they are given."""
    if name not in TASKS:
        raise InputError(f"There is no task {name!r}; choose --task from {', '.join(TASKS)}.")
    task = TASKS[name]
    if name != OWN:
        given = {"prompt": prompt, "metric": metric}
        if unused := [f"--{option}" for option, value in given.items() if value is not None]:
            raise InputError(
                f"--task {name} has a prompt and a metric of its own: leave {', '.join(unused)} out, or take --task "
                f"{OWN}, which reads the same data."
            )
        return task
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty; leave it out to ask the questions as they are.")
    return replace(task, prompt=prompt or task.prompt, metric=METRICS[metric] if metric else task.metric)


def fields_of(sample: Sample) -> dict:
    """What a row repeats of its sample."""
    fields = {
        "image": names_of(sample.image),
        "image_id": sample.image_id,
        "question": sample.question,
        "options": sample.options,
        "references": sample.references,
    }
    return {name: value for name, value in fields.items() if value not in (None, "", (), [])}


def names_of(image: object) -> str | list[str] | None:
    """The name of an image that is a file, or those of several."""
    if isinstance(image, list):
        return [image.name for image in image if isinstance(image, Path)]
    return image.name if isinstance(image, Path) else None


def request_of(sample: Sample, task: Task) -> Request:
    prompt = task.prompt_for(sample.question, sample.options)
    return Request(sample.id, sample.image, prompt, fields_of(sample), sample.system)


def digest_of(samples: list[Sample], task: Task) -> str:
    """Changes if ids, prompts or names of images do, so that rows of other data are never taken for these."""
    digest = hashlib.sha256()
    for sample in samples:
        system = [] if sample.system is None else [sample.system]
        names = sample.names or called(sample.image)
        asked = [sample.id, task.prompt_for(sample.question, sample.options), names, *system]
        digest.update(json.dumps(asked).encode())
    return digest.hexdigest()


def check_own(samples: list[Sample], task: Task, source: str):
    """Say where a prompt and a metric that the user chose do not fit the data."""
    if task.name != OWN:
        return
    asked = sum(bool(sample.question.strip()) for sample in samples)
    if asked and not task.asks:
        warnings.warn(
            f"--prompt has no {{question}}, so the {asked} questions of {source} are not asked.", stacklevel=3
        )
    few = next((sample for sample in samples if len(sample.references) < VQA_REFERENCES), None)
    if few is not None and task.metric is VQA:
        raise InputError(
            f"--metric vqa_accuracy compares with what several people answered, a third for each who agrees: sample "
            f"{few.id!r} of {source} has {len(few.references)} answers, and needs {VQA_REFERENCES}. Choose another."
        )


# --- Scores ---


def score_rows(rows: list[dict], task: Task) -> tuple[list[float], dict[str, float]]:
    """Score of each row, and the other scores of all; a row with an error has none of it right."""
    answers = ["" if "error" in row else row["answer"] for row in rows]
    references = [row["references"] for row in rows]
    found = task.metric.scores(answers, references)
    scores = [0.0 if "error" in row else score for row, score in zip(rows, found, strict=True)]
    return scores, {name: metric(answers, references) for name, metric in task.metric.others.items()}


def write_rows(path: Path, rows: list[dict]):
    """Put `rows` into the place of those with their ids; others lose their score, as it may be of another corpus."""
    fresh = {row["id"]: row for row in rows}
    old = ({name: value for name, value in row.items() if name != "score"} for row in read_rows(path))
    write_atomically(path, [encode(fresh.get(row["id"], row)) for row in old])


def scored(rows: list[dict], task: Task, boxes: Boxes | None) -> dict:
    """Score, interval and other scores, in percent, and the score by the size of the answer's box; rows get theirs."""
    scores, others = score_rows(rows, task)
    for row, score in zip(rows, scores, strict=True):
        row["score"] = score
    result = {
        "score": 100 * sum(scores) / len(scores),
        "confidence_interval": [100 * bound for bound in confidence_interval(scores, LEVEL)],
        "other_scores": {name: 100 * score for name, score in others.items()},
    }
    return result if boxes is None else {**result, "by_detail": accuracy_by_box(rows, boxes)}


def server_entries(rows: list[dict], task: Task) -> list[dict]:
    """What the benchmark's evaluation server takes; a row with an error has an empty answer."""
    id_key, answer_key = task.server_keys
    return [{id_key: row["id"], answer_key: row.get("answer", "")} for row in rows]


def facts_of(settings: dict, decoding: dict, processes: int, arguments: dict) -> dict:
    """What a score depends on."""
    return {
        **{name: settings[name] for name in ("split", "model")},
        "revision": settings["files of the model"],
        **{name: settings[name] for name in ("dtype", "prompt")},
        "decoding": decoding,
        "versions": {**versions(), "python": platform.python_version()},
        "processes": processes,
        "arguments": arguments,
    }


def as_json(value: object) -> bytes:
    return json.dumps(value, indent=2, default=str).encode() + b"\n"


def finish(task: Task, samples: list[Sample], total: int, folder: Path, boxes: Boxes | None, facts: dict) -> dict:
    """Score the rows, and write what follows from them: returns the content of `result.json`."""
    by_id = {row["id"]: row for row in read_rows(folder / ROWS)}
    rows = [{**by_id[sample.id], **fields_of(sample)} for sample in samples]
    partial = len(samples) < total
    result = {
        "task": task.name,
        "metric": task.metric.name,
        "score": None,
        "confidence_interval": None,
        "samples": len(rows),
        "samples_of_split": total,
        "errors": sum("error" in row for row in rows),
        "partial": partial,
    }
    if samples[0].references is not None:
        found = scored(rows, task, boxes)
        write_rows(folder / ROWS, rows)
        result |= {f"partial_{name}": value for name, value in found.items()} if partial else found
    elif not partial:
        write_atomically(folder / SERVER_FILE, [as_json(server_entries(rows, task))])
        result["server_file"] = SERVER_FILE
    result |= {"published": {"split": "", "scores": {}}, **facts}
    if task.published:
        result["published"] = {
            "split": task.published.split,
            "scores": task.published.scores,
            "comparable": difference(result, task.published) is None,
        }
    write_atomically(folder / RESULT, [as_json(result)])
    return result


def difference(result: dict, published: Published) -> str | None:
    """Why a score cannot be compared with the published ones, in words; None if it can."""
    split = {"validation": "val"}.get(result["split"], result["split"])
    if split != published.split:
        return f"they are of {published.split}, and this is {split}"
    if result["samples"] != published.samples:
        return f"they are of all {published.samples:,} samples of {split}, and this is of {result['samples']:,}"
    return None


def report(result: dict, task: Task, folder: Path) -> str:
    """What the result says, in words."""
    counts = f"{result['samples']} samples, {result['errors']} of them errors"
    head = f"{task.name} {result['split']}"
    if result["partial"]:
        lines = [f"PARTIAL RUN of {head}: {counts}, of {result['samples_of_split']}; no score of the benchmark."]
        if "partial_score" in result:
            lines.append(f"{task.metric.name} of these samples: {interval(result, 'partial_')}")
    elif "server_file" in result:
        lines = [f"{head}: {counts}; the answers are secret: give {folder / SERVER_FILE} to the evaluation server."]
    else:
        lines = [f"{head}: {task.metric.name} {interval(result)}, {counts}"]
        lines += [f"{name} {score:.1f}" for name, score in result["other_scores"].items()]
        for group in result.get("by_detail", {}).get("tertiles", ()):
            lines.append(f"{group['tertile']} answer boxes ({group['samples']}): {100 * group['accuracy']:.1f}")
        if left_out := result.get("by_detail", {}).get("left_out"):
            lines.append(f"{left_out} samples have no answer box and are in none of these groups")
    if task.published:
        listed = ", ".join(f"{model} {score}" for model, score in task.published.scores.items())
        lines.append(f"published ({task.published.split}): {listed}")
        if why := difference(result, task.published):
            lines.append(f"Do not compare with the published scores: {why}.")
    return "\n".join(lines)


def print_score(task: Task, samples: list[Sample], total: int, folder: Path, boxes: Boxes | None, facts: dict):
    """`finish` and say what it gave."""
    try:
        result = finish(task, samples, total, folder, boxes, facts)
    except KeyboardInterrupt as stop:
        kept = f"All answers are kept in {folder / ROWS}; give the same command again to score them."
        raise Interrupted(kept) from stop
    print(report(result, task, folder))


def interval(result: dict, prefix: str = "") -> str:
    low, high = result[f"{prefix}confidence_interval"]
    return f"{result[f'{prefix}score']:.1f} ({LEVEL:.0%} interval {low:.1f} to {high:.1f})"


# --- The command ---


def check_output(folder: Path, limit: int | None):
    """Raise InputError if results cannot be written there, or a part would take the place of the whole."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder.")
    result = folder / RESULT
    if limit is not None and result.exists():
        try:
            is_whole = not parse_json(result.read_bytes())["partial"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{result} was not written by this command: choose another output.") from error
        if is_whole:
            raise InputError(f"{folder} holds the result of a whole run: leave --limit out, or choose another output.")


def with_images(samples: list[Sample], folder: Path) -> list[Sample]:
    """`samples` with paths in `folder`, unless they come with images of their own."""
    return found_images(samples, folder) if samples[0].names else samples


def find_boxes(file: str | None, samples: list[Sample], source: str, task: Task) -> Boxes | None:
    """The answers' boxes, if they are asked for, and if there are enough for three groups."""
    if file is None:
        return None
    if not task.asks or samples[0].references is None:
        raise InputError(f"--by_detail needs questions whose answers are public: leave it out for {source}.")
    boxes = read_boxes(file)
    tertiles(answer_areas([{"id": sample.id, **fields_of(sample)} for sample in samples], boxes))
    return boxes


def evaluate(
    model: str,
    task: str,
    data: str,
    output: str,
    *,
    split: str | None,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int | None,
    num_beams: int | None,
    vision_budget: int | None,
    dtype: str,
    device: str | None,
    workers: int | None,
    revision: str | None,
    by_detail: str | None,
    prompt: str | None,
    metric: str | None,
    annotations: str | None,
    images: str | None,
    **dataset_options,
):
    """Answer, score and write; the arguments are the command's options."""
    arguments = {**locals()}  # as the command was given them, in the order of the signature
    arguments |= arguments.pop("dataset_options")
    task, folder = find_task(task, prompt, metric), Path(output)
    check_output(folder, limit)
    for package in task.metric.packages:
        require(package)
    state = process_state(device)
    samples, split = read_samples(task, data, split=split, annotations=annotations, images=images, **dataset_options)
    check_own(samples, task, data)
    chosen = with_images(samples[:limit], Path(images or Path(data).parent))
    boxes = find_boxes(by_detail, chosen, data, task)
    device = device or state.device
    identity, load = open_model(model, revision, dtype, device)
    length, beams = max_new_tokens or task.max_new_tokens, num_beams or task.num_beams
    decoding = {"max_new_tokens": length, "num_beams": beams, "do_sample": False}
    if vision_budget is not None:
        decoding["vision_budget"] = vision_budget
    settings = {
        "model": model,
        "files of the model": identity,
        "dtype": dtype,
        "task": task.name,
        "split": split,
        "prompt": task.prompt,
        **{name: arguments[name] for name in WHERE_IMAGES_ARE},
        "samples": digest_of(samples, task),
    }
    answer(
        load,
        [request_of(sample, task) for sample in chosen],
        folder / ROWS,
        batch_size=batch_size,
        generate_kwargs=decoding,
        settings=settings,
        workers=default_workers(device) if workers is None else workers,
    )
    if state.is_main_process:
        facts = facts_of(settings, decoding, state.num_processes, arguments)
        print_score(task, chosen, len(samples), folder, boxes, facts)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(prog="pheye evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--task", required=True, help=", ".join(TASKS))
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE_OR_DATASET",
        help="the benchmark's official file, or a data set: a .parquet, .arrow or .csv file, a folder of them, one "
        "made by save_to_disk, or what load_dataset takes; for --task own also a file of training data",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--split", help="(default: the file's only one, or the task's)")
    parser.add_argument(
        "--limit", type=at_least(1), help="only so many samples, which gives no score of the benchmark"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="samples at once (default: 8)")
    parser.add_argument("--max_new_tokens", type=at_least(1), help="(default: the task's)")
    parser.add_argument("--num_beams", type=at_least(1), help="(default: the task's)")
    add_budget_option(parser)
    parser.add_argument(
        "--workers", type=at_least(0), help="processes that open images, per device (default: 4; on a CPU none)"
    )
    parser.add_argument(
        "--by_detail",
        metavar="BOXES",
        help="also by the size of the answer's box; for the file see pheye detail --help",
    )
    own = parser.add_argument_group(f"--task {OWN} only")
    own.add_argument("--prompt", help="with {question} where the question belongs (default: the question alone)")
    own.add_argument("--metric", choices=METRICS, help="(default: exact_match)")
    files = parser.add_argument_group("files that are no tables")
    files.add_argument("--annotations", metavar="FILE", help="answers to the questions of VQAv2 or OK-VQA")
    files.add_argument("--images", metavar="FOLDER", help="(default: the folder of the file)")
    dataset = parser.add_argument_group("data sets only")
    dataset.add_argument("--image_column", help=f"(default: image); also the field of a file for --task {OWN}")
    dataset.add_argument("--question_column", help="(default: question)")
    dataset.add_argument("--choices_column", help="options of A-OKVQA (default: choices)")
    dataset.add_argument(
        "--answers_column", help="(default: answers; for captions captions, for A-OKVQA correct_choice_idx)"
    )
    dataset.add_argument("--id_column", help="texts or integers, each once (default: the number of the row)")
    dataset.add_argument(
        "--image_sources",
        choices=IMAGE_SOURCES,
        help="where names in the data may lead: to files in the working directory, the data's folder and what "
        "datasets downloaded (folder, the default), to all files (local), or to URLs as well (any)",
    )
    dataset.add_argument("--config", help="configuration of the data set, where it has several")
    dataset.add_argument("--data_files", help="files or pattern, where --data is a loader such as parquet")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(evaluate, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
