"""Tesseract, RapidOCR and a Pheye as readers of text in images, and what a reading costs."""

import importlib.util
import io
import os
import re
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image

from ...answering.engine import answer_batches, open_model
from ...answering.rows import Request
from ...common.command import InputError
from ...common.files import read_record, write_record
from ..drawing import questions

THREADS = 1, 2
REPEATS = 3  # of each timed reading, of which the least counts
PAGE_MODES = {"tesseract-3": 3, "tesseract-11": 11}  # Tesseract's default, and text in any place
RAPIDOCR, PHEYE = "rapidocr", "pheye-nano"
TITLES = {
    "tesseract-3": "Tesseract, page mode 3 (its default)",
    "tesseract-11": "Tesseract, page mode 11 (sparse text)",
    RAPIDOCR: "RapidOCR",
    PHEYE: "Pheye-nano",
}
DEBIAN_PACKAGES = "tesseract-ocr", "tesseract-ocr-eng", "tesseract-ocr-osd", "libtesseract5", "liblept5"
TOKENS = 16  # of an answer of Pheye-nano

Read = Callable[[Image.Image], str]  # lines of text


def open_tesseract(mode: int, threads: int) -> Read:
    environment = {**os.environ, "OMP_THREAD_LIMIT": str(threads)}

    def read(image: Image.Image) -> str:
        file = io.BytesIO()
        image.save(file, "PPM")
        command = ["tesseract", "stdin", "stdout", "--psm", str(mode), "-l", "eng"]
        result = subprocess.run(command, input=file.getvalue(), capture_output=True, env=environment)
        if result.returncode:
            raise InputError(f"{' '.join(command)} failed: {result.stderr.decode(errors='replace').strip()}")
        return result.stdout.decode(errors="replace")

    return read


def open_rapidocr(threads: int) -> Read:
    import cv2
    from rapidocr_onnxruntime import RapidOCR

    cv2.setNumThreads(threads)
    reader = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)

    def read(image: Image.Image) -> str:
        found, _ = reader(np.ascontiguousarray(np.asarray(image)[..., ::-1]))  # as OpenCV has it: blue first
        return "\n".join(text for _, text, _ in found or [])

    return read


def open_pheye(model: str, threads: int) -> Read:
    torch.set_num_threads(threads)
    parts = open_model(model, None, "auto", "cpu")[1]()
    options = {"max_new_tokens": TOKENS, "do_sample": False}

    def read(image: Image.Image) -> str:
        [[(_, text, error, _)]] = answer_batches(*parts, [Request(0, image, questions.SIGN)], 1, 0, options)
        return text if error is None else ""

    return read


def installed() -> list[str]:
    """The readers that are here."""
    found = list(PAGE_MODES) if shutil.which("tesseract") else []
    return found + ([RAPIDOCR] if importlib.util.find_spec("rapidocr_onnxruntime") else [])


def open_reader(name: str, threads: int) -> Read:
    return open_rapidocr(threads) if name == RAPIDOCR else open_tesseract(PAGE_MODES[name], threads)


def reader_versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    if set(names) & set(PAGE_MODES):
        text = subprocess.run(["tesseract", "--version"], capture_output=True, text=True).stdout
        found["Tesseract"] = text.partition("\n")[0].removeprefix("tesseract ")
    if RAPIDOCR in names:
        found |= {name: metadata.version(name) for name in ("rapidocr-onnxruntime", "onnxruntime")}
    return found


# --- Costs ---


def seconds(
    name: str, opened: Callable[[int], Read], images: Sequence[Image.Image], output: Path, model: str | None = None
) -> dict:
    """Median seconds of a picture on one thread and two, each the least of REPEATS, and those of the CPU; from a file
    where they were measured before. The file is bound to the `model` that Pheye's are of."""
    path, settings = output / f"seconds-{name}.json", {"timed": len(images), "repeats": REPEATS}
    if name == PHEYE:
        settings["model"] = model
    if (record := read_record(path, settings, output)) is None:
        found = {}
        for threads in THREADS:
            read = opened(threads)
            read(images[0])  # the first takes longer
            taken = [timed(read, image) for image in images]
            wall, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
            found[str(threads)] = {"wall": round(wall, 3), "cpu": round(cpu, 3)}
        write_record(path, settings, seconds=found)
        return found
    return record["seconds"]


def timed(read: Read, image: Image.Image) -> tuple[float, float]:
    """Least seconds, and least seconds of the CPU."""
    taken = []
    for _ in range(REPEATS):
        begin, cpu = time.perf_counter(), cpu_seconds()
        read(image)
        taken.append((time.perf_counter() - begin, cpu_seconds() - cpu))
    return tuple(map(min, zip(*taken, strict=True)))


def cpu_seconds() -> float:
    """Of this process and its children."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def megabytes(name: str, model: str | None = None) -> tuple[float | None, float | None]:
    """Of the weights, and of all that is installed for a reader; None where it is not known."""
    if name == PHEYE:
        weights = files_size(Path(model).glob("*.safetensors")) if Path(model).is_dir() else None
        return weights, packages_size("pheye")
    if name == RAPIDOCR:
        package = Path(importlib.util.find_spec("rapidocr_onnxruntime").origin).parent
        return files_size(package.rglob("*.onnx")), packages_size("rapidocr-onnxruntime")
    languages = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True).stdout
    folder = re.search(r'"(.+)"', languages)
    weights = files_size([Path(folder[1], "eng.traineddata")]) if folder else None
    return weights, debian_size(DEBIAN_PACKAGES)


def files_size(paths) -> float:
    return sum(path.stat().st_size for path in paths if path.exists()) / 1e6


def debian_size(packages: Sequence[str]) -> float | None:
    """Installed size of Debian packages, those that they need not included."""
    if not shutil.which("dpkg-query"):
        return None
    command = ["dpkg-query", "--show", "--showformat", "${Installed-Size}\n", *packages]
    result = subprocess.run(command, capture_output=True, text=True)
    return sum(map(int, result.stdout.split())) * 1024 / 1e6 if result.returncode == 0 else None


def packages_size(name: str) -> float | None:
    """Size of a Python package with all that it needs; None if it is not installed."""
    pending, seen, size = [name], set(), 0.0
    while pending:
        one = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if one in seen:
            continue
        seen.add(one)
        try:
            distribution = metadata.distribution(one)
        except metadata.PackageNotFoundError:
            if one == name:
                return None
            continue
        size += files_size(Path(file.locate()) for file in distribution.files or [])
        needs = map(Requirement, distribution.requires or [])
        pending += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return size
