"""Tables with images: a folder, a file or a Hub id as rows whose images stay encoded."""

import os
from pathlib import Path

from .command import InputError, require

FILES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}  # suffix, and what `load_dataset` calls it


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def load_table(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    data_files: str | None = None,
    streaming: bool = False,
):
    """A folder that `save_to_disk` wrote, a table file, or what `load_dataset` takes: one split of it.

    Args:
        split: by default "train" where there are several.

    Returns:
        a `datasets.Dataset`, or an `IterableDataset` if `streaming`.

    Raises:
        InputError: if nothing is there, or not this split.
    """
    datasets = require("datasets")
    suffix = Path(source).suffix.lower()
    try:
        if is_saved(source):
            table = datasets.load_from_disk(source)
        else:
            name = source
            if suffix in FILES and data_files is None:
                if not os.path.isfile(source):
                    raise ValueError("there is no such file")
                name, data_files = FILES[suffix], source
            table = datasets.load_dataset(
                name, config, data_files=data_files, split=split or "train", streaming=streaming
            )
    except IndexError as error:  # raised for saved data without rows
        raise InputError(f"{source} is empty; give a data set with at least one row.") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{source!r} cannot be read as a data set: {error}. Give a folder that `save_to_disk` wrote, a file that "
            f"ends in {', '.join(FILES)}, or what `load_dataset` takes."
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if (split or "train") not in table:
            raise InputError(f"{source} has no split {split or 'train'!r}; choose the split from {', '.join(table)}.")
        table = table[split or "train"]
    elif is_saved(source) and split not in (None, str(table.split)):
        raise InputError(f"{source} holds no splits; leave the split {split} out.")
    if streaming:
        return table.to_iterable_dataset() if isinstance(table, datasets.Dataset) else table
    return table.with_format(None)


def undecoded(table, column: str):
    """`table` with the images in `column` left encoded, so that a broken one is found when its turn comes."""
    feature = table.features and _undecoded(table.features[column])
    return table.cast_column(column, feature) if feature else table


def _undecoded(feature):
    """The feature of a column of images, or of lists of them, without decoding; None if it is neither."""
    datasets = require("datasets")
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, list):
        inner = _undecoded(feature[0])
        return inner and [inner]
    inner = getattr(feature, "feature", None)
    inner = None if inner is None else _undecoded(inner)
    return inner and type(feature)(inner)


def images_of(table, column: str, source: str):
    """The one `column` of `table`, its images undecoded.

    Raises:
        InputError: if it does not hold images, paths, URLs or bytes.
    """
    datasets = require("datasets")
    feature = table.features[column]
    is_image = isinstance(feature, datasets.Image)
    if not is_image and getattr(feature, "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
        raise InputError(
            f"Column {column!r} of {source} holds {feature}; it must hold images, paths, URLs or bytes. Name another "
            "by --image_column."
        )
    return undecoded(table.select_columns([column]), column)


def encoded_image(images, row: int) -> str | bytes | None:
    """The image in a row of what `images_of` gave: encoded, or its path or URL."""
    [cell] = images[row].values()
    return encoded(cell)


def encoded(cell: dict | str | bytes | None) -> str | bytes | None:
    """What an undecoded cell holds: the bytes of an image, or its path or URL."""
    return (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
