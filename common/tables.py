"""Tables with images: a folder, files or a Hub id as rows whose images stay encoded, whoever wrote them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..image_opening_pheye import LONGEST_PATH, WEB, is_inside
from .command import InputError, require

FILES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}  # suffix, and what `load_dataset` calls it
IMAGE_SOURCES = ("folder", "local", "any")
IMAGES_CHECKED = 100  # before a model is loaded
TEXTS_AND_BYTES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def holds_tables(source: str | os.PathLike) -> bool:
    """Whether `source` is a table on the disk: a folder that `save_to_disk` wrote, a table file, or a folder with
    such files."""
    path = Path(source)
    if path.is_dir():
        return is_saved(path) or any(True for _ in table_files(path))
    return path.is_file() and path.suffix.lower() in FILES


def table_files(folder: Path) -> Iterator[Path]:
    """Those in and below `folder`, but for the metadata of a folder of images."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in FILES and path.stem != "metadata")
    return (path for path in found if path.is_file())


def load_table(source: str | Sequence[str], **which):
    """The table of `load_split` alone."""
    return load_split(source, **which)[0]


def load_split(
    source: str | Sequence[str],
    *,
    config: str | None = None,
    split: str | None = None,
    usual_split: str = "train",
    data_files: str | None = None,
    streaming: bool = False,
):
    """A folder that `save_to_disk` wrote, a table file, a folder of such files, or what `load_dataset` takes: one
    split of it. Of several table files, the rows of one after another.

    Args:
        usual_split: which split is taken where there are several and none is named.

    Returns:
        a `datasets.Dataset`, or an `IterableDataset` if `streaming`; the name of the split, if it has one; and those
        of the splits that are left out.

    Raises:
        InputError: if nothing is there, or not this split.
    """
    names = [source] if isinstance(source, str) else list(source)
    source = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    table = _load(names, source, config, data_files=data_files, split=split, streaming=streaming)
    others = []
    if isinstance(table, dict):
        split = split or (next(iter(table)) if len(table) == 1 else usual_split)
        if split not in table:
            raise InputError(f"{source} has no split {split!r}; choose the split from {', '.join(table)}.")
        table, others = table[split], [name for name in table if name != split]
    elif is_saved(names[0]) and split not in (None, str(table.split)):
        raise InputError(f"{source} holds no splits; leave the split {split} out.")
    if not is_saved(names[0]):
        check_kind(table, Path(names[0]))
    split = split or (None if table.split is None else str(table.split))
    if streaming:
        return (table.to_iterable_dataset() if hasattr(table, "to_iterable_dataset") else table), split, others
    return table.with_format(None), split, others


def _load(names: list[str], source: str, config: str | None, *, data_files: str | list[str] | None, **how):
    """What `datasets` makes of the source: a table, or one for each split."""
    datasets = require("datasets")
    suffix = Path(names[0]).suffix.lower()
    for name, value in (("config", config), ("data_files", data_files)):
        if value is not None and (is_saved(names[0]) or (name == "config" and suffix in FILES)):
            raise InputError(f"{source} has no choice of {name}; leave {name}={value!r} out.")
    try:
        if is_saved(names[0]):
            return datasets.load_from_disk(names[0])
        name = names[0]
        if suffix in FILES and data_files is None:
            if missing := [file for file in names if not os.path.isfile(file)]:
                raise ValueError(f"there is no such file: {missing[0]}")
            if len({Path(file).suffix.lower() for file in names}) > 1:
                raise ValueError("the files must be of one kind")
            name, data_files = FILES[suffix], names
        elif data_files is None and not os.path.exists(name) and "/" not in name:
            raise ValueError("there is no such folder, and a data set of the Hub is called owner/name")
        return datasets.load_dataset(name, config, data_files=data_files, **how)
    except IndexError as error:  # raised for saved data without rows
        raise InputError(f"{source} is empty; give a data set with at least one row.") from error
    except Exception as error:  # of many kinds
        raise InputError(
            f"{source!r} cannot be read as a data set: {error}. Give a folder that `save_to_disk` wrote, a file that "
            f"ends in {', '.join(FILES)}, a folder of such files, or what `load_dataset` takes."
        ) from error


def check_kind(table, folder: Path):
    """Raise InputError if a folder holds tables, but `datasets` has taken files of another kind for the data."""
    kind = table.info.builder_name
    if kind in (None, *FILES.values()) or not folder.is_dir():
        return
    if (file := next(table_files(folder), None)) is not None:
        raise InputError(
            f"{folder} holds tables beside files of another kind, which `datasets` takes for the data ({kind}). Give "
            f"the table files themselves, such as {file}."
        )


def undecoded(table, column: str, source: str):
    """`table` with the images in `column` left encoded, so that a broken one is found when its turn comes.

    Raises:
        InputError: if the column does not hold images, paths, URLs or bytes, one in each row or a list of them.
    """
    if table.features is None:  # of a stream whose first row nobody has read
        return table
    feature = table.features[column]
    if not _is_image(feature):
        raise InputError(
            f"Column {column!r} of {source} holds {feature}; it must hold images, paths, URLs or bytes. Name another "
            "by --image_column."
        )
    feature = _undecoded(feature)
    return table.cast_column(column, feature) if feature else table


def _inside(feature):
    """The feature of what a list holds; None if `feature` is no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _is_image(feature) -> bool:
    if isinstance(feature, dict):  # as other tools than `datasets` write what that calls an image
        return bool({"bytes", "path"} & feature.keys())
    if (inner := _inside(feature)) is not None:
        return _is_image(inner)
    kind = getattr(feature, "dtype", None)
    return isinstance(feature, require("datasets").Image) or kind in TEXTS_AND_BYTES


def _undecoded(feature):
    """The feature of a column of images, or of lists of them, without decoding; None if it is neither."""
    datasets = require("datasets")
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = _inside(feature)
    inner = None if inner is None else _undecoded(inner)
    return inner and ([inner] if isinstance(feature, list) else type(feature)(inner))


def folders_of(paths: Sequence[str]) -> list[str]:
    """Where the images that tables name are usually: in the working directory, where the tables lie, and where
    `datasets` puts what it has downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    downloads = require("datasets").config.HF_DATASETS_CACHE
    own = [path if os.path.isdir(path) else os.path.dirname(os.path.normpath(path)) or "." for path in paths]
    return list(dict.fromkeys([".", *own, str(downloads), HF_HUB_CACHE]))


class ImageColumn:
    """The images in one column of a table, by the number of the row: one in each, or `several`.

    Raises:
        InputError: if it does not hold images, paths, URLs or bytes, or none of the first may be opened.
    """

    def __init__(
        self,
        table,
        column: str,
        source: str | Sequence[str],
        image_sources: str | None = None,
        *,
        several: bool = False,
    ):
        """image_sources: where names in the column may lead, for others may have written them: to files in
        `folders_of` the table ("folder", the default), to all files ("local"), or to URLs as well ("any")."""
        paths = [source] if isinstance(source, str) else source
        self.images = undecoded(table.select_columns([column]), column, ", ".join(paths))
        self.several = several
        self.image_sources = image_sources or "folder"
        self.folders = folders_of(paths)
        first = [self.error(row) for row in range(min(IMAGES_CHECKED, len(table)))]
        if first and all(first):
            raise InputError(f"None of the first {len(first)} images of {paths[0]} may be opened: {first[0]}")

    def __getitem__(self, row: int) -> str | bytes | None:
        """Encoded, or the path or URL.

        Raises:
            ValueError: if the row has several, or names one that may not be opened.
        """
        [cell] = self.images[row].values()
        return self.checked(encoded(cell))

    def all_of(self, row: int) -> list[str | bytes | None]:
        """As `[row]`, of a row with several images or none."""
        [cell] = self.images[row].values()
        cell = as_list(cell)
        return [self.checked(encoded(image)) for image in (cell if isinstance(cell, list) else [cell])]

    def one_of(self, row: int, place: int) -> str | bytes | None:
        return self.all_of(row)[place]

    def checked(self, image: str | bytes | None) -> str | bytes | None:
        # A longer text that is no URL is base64.
        if isinstance(image, str) and (len(image) <= LONGEST_PATH or image[:8].lower().startswith(WEB)):
            self.check(image)
        return image

    def error(self, row: int) -> str | None:
        try:
            self.all_of(row) if self.several else self[row]
        except ValueError as error:
            return str(error)

    def check(self, name: str):
        if name[:8].lower().startswith(WEB):
            if self.image_sources != "any":
                raise ValueError(f"{name[:LONGEST_PATH]!r} is a URL; --image_sources any fetches images.")
        elif self.image_sources == "folder" and not any(is_inside(folder, name) for folder in self.folders):
            raise ValueError(
                f"{name!r} leads out of the working directory and of the table's own folder; --image_sources local "
                "lets names lead anywhere."
            )


def as_list(cell):
    """A list of dicts where `datasets` made it a dict of lists; everything else as it is."""
    if isinstance(cell, dict) and cell and all(isinstance(value, list) for value in cell.values()):
        return [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    return cell


def encoded(cell: list | dict | str | bytes | None) -> str | bytes | None:
    """What an undecoded cell, or a list of one, holds: the bytes of an image, or its path or URL.

    Raises:
        ValueError: if it is a list of several.
    """
    cell = as_list(cell)
    if isinstance(cell, list):
        if len(cell) > 1:
            raise ValueError(f"There are {len(cell)} images; this command asks about one at a time.")
        cell = cell[0] if cell else None
    return (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
