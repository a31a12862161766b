"""Where the images of a command come from: folders, files, patterns, lists, URLs or a data set, as requests.

What is passed over on the way is counted, so that nobody takes a part for the whole.
"""

import functools
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ..common.command import InputError, process_state
from ..common.json_lines import split_lines
from ..common.tables import FILES, ImageColumn, holds_tables, is_saved, load_split
from ..image_opening_pheye import WEB
from .rows import Request, check_requests

UNREADABLE = {"MPEG", "BUFR", "GRIB", "HDF5"}  # what Pillow knows by sight alone
CONVERTED_FIRST = (  # pictures of telephones, cameras and others that Pillow does not read
    {".heic", ".heif", ".jxl", ".svg"} | {".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2", ".pef"}
)  # fmt: skip


# --- What is passed over ---


class PassedOver:
    """Files that are no images by their suffix, links that lead back to a folder above, and splits of a data set."""

    def __init__(self):
        self.suffixes, self.links, self.splits = Counter(), [], []

    def __str__(self) -> str:
        """In words; empty if there is nothing."""
        parts = [f"{count} {name_of(suffix)}" for suffix, count in sorted(self.suffixes.items())]
        if self.links:
            parts.append(f"{len(self.links)} links to a folder above, such as {self.links[0]}")
        if self.splits:
            parts.append(f"the data set's other splits, {', '.join(self.splits)}, which --split chooses")
        if not parts:
            return ""
        text = f"Passed over: {', '.join(parts)}."
        if self.suffixes.keys() & CONVERTED_FIRST:
            text += " Convert HEIC and the raw files of cameras to JPEG first, for Pillow cannot read them."
        if self.suffixes.keys() & FILES.keys():
            text += " Give tables by themselves."
        if "" in self.suffixes:
            text += " Images without a suffix can be given by their names, or in a list."
        return text


def name_of(suffix: str) -> str:
    return suffix or "without a suffix"


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow can open."""
    kinds = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in UNREADABLE)


def is_url(text: str) -> bool:
    return text[:8].lower().startswith(WEB)


def is_image(path: str) -> bool:
    """Whether its suffix says so."""
    return Path(path).suffix.lower() in image_suffixes()


# --- Folders ---


def stop(error: OSError):
    raise error


def walk(folder: Path, passed_over: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """Each folder in and below `folder` once, with its files; those behind links too, after those without, so that
    each has its own name if it has one here. Hidden ones are left out."""
    above, seen, starts = os.path.realpath(folder), set(), [str(folder)]
    while starts:
        for parent, folders, files in os.walk(starts.pop(0), onerror=stop):
            place = os.path.realpath(parent)
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for link in filter(os.path.islink, (os.path.join(parent, name) for name in folders)):
                target = os.path.realpath(link)
                if target != above and os.path.commonpath([target, above]) == target:
                    passed_over.links.append(link)
                else:
                    starts.append(link)
            yield parent, [name for name in files if not name.startswith(".")]


def images_in(folder: Path, passed_over: PassedOver) -> list[str]:
    """The images in and below `folder`, as paths inside it."""
    found = []
    for parent, files in walk(folder, passed_over):
        images = [name for name in files if is_image(name)]
        passed_over.suffixes.update(Path(name).suffix.lower() for name in files if not is_image(name))
        found += [Path(parent, name).relative_to(folder).as_posix() for name in images]
    return sorted(found)


def folder_requests(
    folder: Path, prompt: str, passed_over: PassedOver | None = None, *, is_alone: bool = True
) -> list[Request]:
    """One request per image in and below `folder`; the id is the path inside the folder, or from the working
    directory if the folder is not all that is asked for.

    passed_over: adds to it; without it, what is passed over is printed.
    """
    counted = passed_over or PassedOver()
    names = images_in(folder, counted)
    if not names:
        raise InputError(
            f"There are no images in {folder} (names that end in .jpg, .png and the like, hidden ones left out). "
            f"{counted}".rstrip()
        )
    if passed_over is None and str(counted):
        print(counted, file=sys.stderr)
    paths = [(name, folder / name) for name in names]
    return [Request(name if is_alone else str(path), path, prompt, {"image": str(path)}) for name, path in paths]


# --- Files ---


def file_requests(file: Path, prompt: str) -> list[Request]:
    """One request for an image, or one per path or URL in the lines of a text."""
    if is_image(str(file)):
        return [Request(str(file), file, prompt, {"image": str(file)})]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if not can_be_opened(file):
            raise InputError(
                f"{file} is neither an image that Pillow can read, nor a text with a path or URL per line. Convert "
                "pictures of another kind, such as HEIC, to JPEG first."
            ) from error
        return [Request(str(file), file, prompt, {"image": str(file)})]
    return list_requests(file, text, prompt)


def can_be_opened(file: Path) -> bool:
    try:
        with Image.open(file):
            return True
    except Exception:  # Pillow has one of some twenty types for each kind of file
        return False


def list_requests(file: Path, text: str, prompt: str) -> list[Request]:
    """One request per path or URL in the lines of `text`, which `file` holds."""
    entries = [line.strip(" \t") for line in split_lines(text)]
    entries = [entry for entry in entries if entry]
    if not entries:
        raise InputError(f"{file} is empty; write a path or URL into each line.")
    if not any(is_url(entry) or os.path.isfile(entry) for entry in entries):
        raise InputError(
            f"No line of {file} is a URL or an existing file, beginning with {entries[0]!r}; paths are looked up from "
            "the working directory."
        )
    return [place_request(entry, prompt) for entry in entries]


def place_request(place: str, prompt: str) -> Request:
    """About a path or URL."""
    return Request(place, place if is_url(place) else Path(place), prompt, {"image": place})


# --- Data sets ---


def dataset_requests(
    source: str | Sequence[str],
    prompt: str,
    image_column: str | None,
    id_column: str | None,
    image_sources: str | None,
    split: str | None,
    passed_over: PassedOver,
    **where,
) -> list[Request]:
    """One request per row of a data set; the id is the row's number, unless a column holds ids."""
    with process_state().main_process_first():  # the others find it downloaded
        table, _, others = load_split(source, split=split, **where)
    passed_over.splits += others if split is None else []
    column = image_column or "image"
    for name in filter(None, (column, id_column)):
        if name not in table.column_names:
            raise InputError(f"{source} has no column {name!r}; its columns are {', '.join(table.column_names)}.")
    images = ImageColumn(table, column, source, image_sources)
    ids = list(table[id_column]) if id_column else range(len(table))
    return [
        Request(row_id, functools.partial(images.__getitem__, row), prompt, {"image": row})
        for row, row_id in enumerate(ids)
    ]


# --- What `--images` stands for ---


def is_pattern(source: str) -> bool:
    return not is_url(source) and not os.path.lexists(source) and any(sign in source for sign in "*?[")


def matches(pattern: str, passed_over: PassedOver) -> list[str]:
    """The images and tables that a pattern stands for; those of matching folders too, each once."""
    found = {}
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            found |= dict.fromkeys(str(Path(path, name)) for name in images_in(Path(path), passed_over))
        elif is_image(path) or Path(path).suffix.lower() in FILES:
            found[str(Path(path))] = None
        else:
            passed_over.suffixes[Path(path).suffix.lower()] += 1
    if not found:
        raise InputError(f"No image or table matches {pattern}. {passed_over}".rstrip())
    return list(found)


def is_data_set(source: str) -> bool:
    """Whether this is read by `datasets`: a table on the disk, or a name that is nothing else."""
    path = Path(source)
    if path.is_dir():
        return is_saved(path) or (holds_tables(path) and not images_in(path, PassedOver()))
    if os.path.lexists(path):
        return path.suffix.lower() in FILES
    looks_local = path.is_absolute() or source.count("/") > 1 or path.suffix == ".txt" or is_image(source)
    return not looks_local and not is_url(source)


def find_requests(images: Sequence[str], prompt: str, **dataset_options) -> tuple[list[Request], PassedOver]:
    """What `--images` stands for, and what was passed over."""
    passed_over = PassedOver()
    sources = []
    for source in images:
        sources += matches(source, passed_over) if is_pattern(source) else [source]
    if data_sets := [source for source in sources if is_data_set(source)]:
        if len(sources) > 1 and not all(os.path.isfile(source) and is_data_set(source) for source in sources):
            raise InputError(f"{data_sets[0]} is a data set: give it by itself, or several table files of one.")
        source = sources[0] if len(sources) == 1 else sources
        requests = dataset_requests(source, prompt, passed_over=passed_over, **dataset_options)
        check_requests(requests)
        return requests, passed_over
    if unused := [f"--{name}" for name, value in dataset_options.items() if value is not None]:
        raise InputError(f"{' '.join(images)[:200]} is no data set: leave {', '.join(unused)} out.")
    requests = {}  # by id: a file may be named and be in a folder that is named, too
    for source in sources:
        found = source_requests(source, prompt, passed_over, is_alone=len(images) == 1)
        check_requests(found)
        for request in found:
            requests.setdefault(request.id, request)
    return list(requests.values()), passed_over


def source_requests(source: str, prompt: str, passed_over: PassedOver, *, is_alone: bool) -> list[Request]:
    if is_url(source):
        return [place_request(source, prompt)]
    path = Path(source)
    if path.is_dir():
        return folder_requests(path, prompt, passed_over, is_alone=is_alone)
    if not path.is_file():
        what = f"{source} is a pipe or device" if path.exists() else f"There is no {source}"
        raise InputError(f"{what}; give images, folders, patterns in quotes, a list of paths and URLs, or a data set.")
    return file_requests(path, prompt)
