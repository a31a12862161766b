"""Tables with images: every source, its splits, and images that stay encoded."""

import datasets
import pytest
from PIL import Image

from pheye.common.command import InputError
from pheye.common.tables import encoded, encoded_image, images_of, is_saved, load_table, undecoded

from tiny import tiny_image

pytestmark = pytest.mark.once


@pytest.fixture
def table(tmp_path):
    paths = []
    for index in range(3):
        tiny_image(index).save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    rows = {"image": paths, "images": [[path] for path in paths], "name": ["a", "b", "c"], "number": [1, 2, 3]}
    features = datasets.Features(
        image=datasets.Image(),
        images=datasets.Sequence(datasets.Image()),
        name=datasets.Value("string"),
        number=datasets.Value("int64"),
    )
    return datasets.Dataset.from_dict(rows, features=features)


def test_saved_data_with_and_without_splits(table, tmp_path):
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, val=table.select([0])).save_to_disk(tmp_path / "two")
    assert is_saved(tmp_path / "one") and is_saved(tmp_path / "two") and not is_saved(tmp_path)
    assert len(load_table(str(tmp_path / "one"))) == len(load_table(str(tmp_path / "two"))) == 3
    assert len(load_table(str(tmp_path / "two"), split="val")) == 1
    with pytest.raises(InputError, match=r"has no split 'test'; choose the split from train, val"):
        load_table(str(tmp_path / "two"), split="test")
    with pytest.raises(InputError, match="holds no splits; leave the split val out"):
        load_table(str(tmp_path / "one"), split="val")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_table_files_are_read_by_their_suffix(table, tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    getattr(table.select_columns(["name", "number"]), f"to_{suffix}")(path)
    assert load_table(str(path))["name"] == ["a", "b", "c"]
    with pytest.raises(InputError, match="there is no such file"):
        load_table(str(tmp_path / f"none.{suffix}"))


def test_streams_are_not_held(table, tmp_path):
    table.save_to_disk(tmp_path / "one")
    stream = load_table(str(tmp_path / "one"), streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert [row["number"] for row in stream] == [1, 2, 3]


def test_what_is_no_data_set_is_refused_with_what_would_be(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read as a data set: .*Give a folder that `save_to_disk` wrote"):
        load_table("some/dataset")


def test_images_stay_encoded_in_columns_and_in_lists(table):
    assert isinstance(table[0]["image"], Image.Image)
    row = undecoded(undecoded(table, "image"), "images")[0]
    assert row["image"]["path"].endswith("0.png") and row["images"][0]["path"].endswith("0.png")
    assert undecoded(table, "name").features == table.features


def test_the_images_of_a_column_are_bytes_paths_or_nothing(table):
    images = images_of(table, "image", "the data")
    assert images.column_names == ["image"]
    assert encoded_image(images, 1).endswith("1.png")
    assert encoded_image(images_of(table, "name", "the data"), 2) == "c"  # paths or URLs
    with pytest.raises(InputError, match=r"Column 'number' of the data holds .*it must hold images, paths"):
        images_of(table, "number", "the data")
    assert encoded({"bytes": b"x", "path": "y"}) == b"x" and encoded({"bytes": None, "path": "y"}) == "y"
    assert encoded(None) is None and encoded(b"x") == b"x"
