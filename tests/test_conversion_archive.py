"""A damaged or repacked checkpoint.pt is refused: `torch.load` as the other source, where it notices."""

import hashlib
import io
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from pheye.common.command import InputError
from pheye.conversion import archive
from pheye.conversion.reading import read_tensors

from conversion_fixtures import GOLDEN, refuse

pytestmark = pytest.mark.once

WHOLE = (GOLDEN / "x2-448" / "checkpoint.pt").read_bytes()


def check(path: Path) -> str:
    """All that a conversion asks of the file; its sha256."""
    sha256, sizes = archive.hash_and_check(path, archive.list_records(path))
    archive.check_storages(path, read_tensors(path), sizes)
    return sha256


def repacked(change, method=zipfile.ZIP_STORED) -> bytes:
    """The checkpoint with its records changed, and their checksums true."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(WHOLE)) as old,
        zipfile.ZipFile(buffer, "w", method) as new,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of a name that comes twice
        for name, content in change([(name, old.read(name)) for name in old.namelist()]):
            new.writestr(name, content)
    return buffer.getvalue()


def resized(change):
    return repacked(
        lambda records: [(name, change(data) if name.endswith("/data/0") else data) for name, data in records]
    )


def with_bytes(place, data):
    return WHOLE[:place] + data + WHOLE[place + len(data) :]


HALF = len(WHOLE) // 2
DAMAGED = {
    "compressed": (repacked(list, zipfile.ZIP_DEFLATED), "is compressed .* torch.load"),
    "one record compressed": (None, "is compressed"),
    "a bit of a weight": (with_bytes(HALF, bytes([WHOLE[HALF] ^ 64])), "is damaged: its record .* another checksum"),
    "zeros": (with_bytes(HALF, bytes(100_000)), "is damaged: its record .* another checksum"),
    "a short record": (resized(lambda data: data[: len(data) // 2]), "other sizes than their records"),
    "a short record by a value": (resized(lambda data: data[:-4]), "other sizes than their records"),
    "a long record": (resized(lambda data: data + bytes(4)), "other sizes than their records"),
    "a record twice": (repacked(lambda records: [*records, records[-1]]), "two records of one name"),
    "cut": (WHOLE[:HALF], "is no whole checkpoint in torch's zip format: File is not a zip file"),
    "no end": (WHOLE[:-1], "is no whole checkpoint|is damaged"),
    "empty": (b"", "is no whole checkpoint"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "is no whole checkpoint",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_of_any_kind_is_refused_by_name(tmp_path, case):
    path, (data, reason) = tmp_path / "checkpoint.pt", DAMAGED[case]
    if data is None:
        shutil.copyfile(GOLDEN / "x2-448" / "checkpoint.pt", path)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as added:
            added.writestr("checkpoint/data/9999", bytes(1000))
    else:
        path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        check(path)
    assert str(path) in str(caught.value)
    assert "ownload" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_checkpoint_is_hashed_as_it_is(tmp_path):
    assert check(GOLDEN / "x2-448" / "checkpoint.pt") == hashlib.sha256(WHOLE).hexdigest()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(repacked(list))  # stored, but in another order of bytes
    assert check(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    torch.save({"a": torch.arange(6).view(2, 3).T, "none": torch.zeros(0), "b": torch.zeros(9)[2:5]}, path)
    check(path)
    torch.save({}, path)
    check(path)


def test_every_bit_of_every_record_counts(tmp_path):
    path, places = tmp_path / "checkpoint.pt", []
    for record in archive.list_records(GOLDEN / "x2-448" / "checkpoint.pt"):
        name = record.name.encode()
        places += [WHOLE.index(name, record.header) + len(name) + 64 + record.size // 2] if record.size > 200 else []
    assert len(places) > 100
    for place in places[::10]:
        path.write_bytes(with_bytes(place, bytes([WHOLE[place] ^ 1])))
        with pytest.raises(InputError, match="another checksum"):
            archive.hash_and_check(path, archive.list_records(path))


def test_a_file_of_the_hubs_cache_is_held_against_its_sha256(tmp_path):
    """The cache names a large file by it, and the snapshot's file is a link to that."""
    blob = tmp_path / "blobs" / hashlib.sha256(WHOLE).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(WHOLE)
    path = tmp_path / "checkpoint.pt"
    path.symlink_to(blob)
    assert check(path) == blob.name
    blob.write_bytes(repacked(list))  # whole, but another file
    with pytest.raises(
        InputError, match=f"is not the file that the Hub holds: .* Remove {blob}, and the same command"
    ):
        check(path)
    blob.write_bytes(with_bytes(HALF, bytes(9)))
    with pytest.raises(InputError, match=f"is damaged: .* Remove {blob}, and the same command downloads it again"):
        check(path)


@pytest.mark.parametrize("case", ["compressed", "zeros", "a short record", "a record twice"])
def test_no_conversion_is_written_from_a_damaged_checkpoint(tmp_path, capsys, case):
    source = shutil.copytree(GOLDEN / "x2-448", tmp_path / "source")
    (source / "checkpoint.pt").write_bytes(DAMAGED[case][0])
    refuse(capsys, source, tmp_path / "out")
