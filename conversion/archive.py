"""The zip that a checkpoint is: whether its records are whole, and whether they are what torch maps into memory.

`torch.load(mmap=True)` takes the bytes of a record as they lie in the file. It asks neither whether they are packed,
nor how many belong to the record, nor for their checksum.
"""

import hashlib
import mmap
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from ..common.command import InputError
from .errors import one_line, refusing

LOCAL_HEADER = 30  # bytes before a record's name
LENGTHS = 26  # where in them the lengths of the name and of the extra field are, two bytes each


class Record(NamedTuple):
    """An entry of the zip."""

    name: str
    header: int  # where in the file it begins
    size: int  # of what it holds
    crc: int


def state_of(path: Path) -> tuple[int, int, int]:
    """Another one if the file is changed, or if another file takes its place."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def list_records(path: Path) -> list[Record]:
    """What the directory at the end of the zip tells.

    Raises:
        InputError: if it is no zip, or none that can be mapped into memory.
    """
    with refusing(f"{path} could not be read", "Mend this."):
        path.open("rb").close()
    remedy = "Download it again; if it was saved by torch before 1.6, load it with weights_only=True and save it anew."
    with refusing(f"{path} is no whole checkpoint in torch's zip format", remedy), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if packed := [entry for entry in entries if entry.compress_type or entry.compress_size != entry.file_size]:
        raise InputError(
            f"{path} is compressed ({one_line(packed[0].filename)}), which torch.save never does. Download the "
            "original, or load this one with torch.load(weights_only=True) and save it anew with torch.save."
        )
    if len({entry.filename.lower() for entry in entries}) < len(entries):
        raise InputError(f"{path} holds two records of one name, which torch.save never does. Download it again.")
    return [Record(entry.filename, entry.header_offset, entry.file_size, entry.CRC) for entry in entries]


def hash_and_check(path: Path, records: list[Record]) -> tuple[str, dict[int, int]]:
    """The file's sha256, and the size of each record by the place where what it holds begins.

    Raises:
        InputError: if a record has another checksum than when it was saved, or the file another one than on the Hub.
    """
    real = path.resolve()
    on_hub = re.fullmatch("[0-9a-f]{64}", real.name)  # the Hub's cache names a large file by its sha256
    remedy = f"Remove {real}, and the same command downloads it again." if on_hub else "Download it again."
    digest, place, sizes = hashlib.sha256(), 0, {}
    # In few calls on the mapped file, which leave the interpreter to other threads all the while.
    with (
        refusing(f"{path} is damaged", remedy),
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        for record in sorted(records, key=lambda record: record.header):
            start = record.header + LOCAL_HEADER + sum(struct.unpack_from("<HH", data, record.header + LENGTHS))
            end = start + record.size
            digest.update(view[place:end])
            if zlib.crc32(view[start:end]) != record.crc:
                raise ValueError(f"its record {record.name} has another checksum than when it was saved")
            place, sizes[start] = max(place, end), record.size
        digest.update(view[place:])
    sha256 = digest.hexdigest()
    if on_hub and sha256 != real.name:
        raise InputError(f"{path} is not the file that the Hub holds: its sha256 is {sha256}. {remedy}")
    return sha256, sizes


def check_storages(path: Path, tensors: dict[str, torch.Tensor], sizes: dict[int, int]):
    """Hold the memory of mapped tensors against the records of their file.

    sizes: of the records, by place in the file.

    Raises:
        InputError: unless the storage of each tensor is one record, from its first byte to its last.
    """
    storages = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes(), name
    if not storages:
        return
    # torch does not tell where in memory the file begins. It is the one start of a page from which all is in place.
    begins = [begin for place in sizes if (begin := min(storages) - place) % mmap.PAGESIZE == 0]
    false = [
        [name for place, (size, name) in storages.items() if sizes.get(place - begin) != size] for begin in begins
    ]
    false = min(false, key=len, default=list(tensors))
    if false:
        raise InputError(
            f"{path} is damaged: {one_line(false[0])} and {len(false) - 1} other tensors have other sizes than their "
            "records in the file. Download it again."
        )
