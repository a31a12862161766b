"""Tables with images: every source, its splits, and images that stay encoded."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pheye.common.command import InputError
from pheye.common.tables import ImageColumn, encoded, holds_tables, is_saved, load_table, undecoded

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
    for option in ("config", "data_files"):
        with pytest.raises(InputError, match=f"has no choice of {option}; leave {option}='a' out"):
            load_table(str(tmp_path / "one"), **{option: "a"})


def test_a_folder_of_data_leads_to_its_own_files_and_not_to_those_beside_it(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    inside, beside = str(tmp_path / "data" / "a.png"), str(tmp_path / "a.png")
    table = datasets.Dataset.from_dict({"image": [inside, beside]})
    table.save_to_disk(tmp_path / "data")
    column = ImageColumn(table, "image", str(tmp_path / "data"))
    assert column[0] == inside
    with pytest.raises(ValueError, match="leads out of the working directory"):
        column[1]


def test_a_long_url_is_a_url(tmp_path):
    table = datasets.Dataset.from_dict({"image": ["https://example.org/" + "a" * 5000, str(tmp_path / "a.png")]})
    with pytest.raises(ValueError, match="is a URL; --image_sources any"):
        ImageColumn(table, "image", str(tmp_path / "t.parquet"))[0]
    assert ImageColumn(table, "image", str(tmp_path / "t.parquet"), "any")[0].startswith("https://example.org/aaa")


def test_a_table_file_has_no_configurations(table, tmp_path):
    table.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="has no choice of config; leave config='a' out"):
        load_table(str(tmp_path / "rows.parquet"), config="a")


def test_the_only_split_is_taken_and_of_several_the_usual_one(table, tmp_path):
    datasets.DatasetDict(odd=table).save_to_disk(tmp_path / "odd")
    assert len(load_table(str(tmp_path / "odd"))) == 3
    for name in ("train", "val"):
        table.select(range(2 if name == "val" else 1)).to_parquet(tmp_path / "shards" / f"{name}-00000.parquet")
    assert len(load_table(str(tmp_path / "shards"))) == 1
    assert len(load_table(str(tmp_path / "shards"), usual_split="validation")) == 2
    with pytest.raises(InputError, match=r"has no split 'val'; choose the split from train, validation"):
        load_table(str(tmp_path / "shards"), usual_split="val")
    assert [row["name"] for row in load_table(str(tmp_path / "shards"), streaming=True)] == ["a"]


def test_folders_of_table_files_and_several_of_them(table, tmp_path):
    folder = tmp_path / "tables"
    assert not holds_tables(folder)
    paths = [str(folder / "deep" / f"{number}.parquet") for number in range(3)]
    for number, path in enumerate(paths):
        table.select([number]).to_parquet(path)
    (folder / "notes.txt").write_text("no table")
    assert holds_tables(folder) and holds_tables(paths[0]) and not holds_tables(folder / "notes.txt")
    assert load_table(str(folder))["name"] == ["a", "b", "c"]
    assert load_table([paths[2], paths[0]])["name"] == ["c", "a"]
    with pytest.raises(InputError, match=r"deep/2.parquet and 1 more' cannot be .*no such file: x.parquet"):
        load_table([paths[2], "x.parquet"])


def test_a_folder_is_not_taken_for_data_of_another_kind_without_a_word(table, tmp_path):
    table.to_parquet(tmp_path / "x.parquet")
    for number in range(3):
        tiny_image(number).save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match=r"holds tables beside files of another kind.*\(imagefolder\).*x.parquet"):
        load_table(str(tmp_path))
    (tmp_path / "x.parquet").rename(tmp_path / "metadata.parquet")
    assert not holds_tables(tmp_path)


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
    row = undecoded(undecoded(table, "image", "it"), "images", "it")[0]
    assert row["image"]["path"].endswith("0.png") and row["images"][0]["path"].endswith("0.png")
    assert undecoded(table, "name", "it").features == table.features


def test_the_images_of_a_column_are_bytes_paths_or_nothing(table, tmp_path):
    images = ImageColumn(table, "image", str(tmp_path))
    assert images.images.column_names == ["image"]
    assert images[1].endswith("1.png")
    assert ImageColumn(table, "images", str(tmp_path))[1].endswith("1.png")
    assert ImageColumn(table, "name", "the data")[2] == "c"  # paths or URLs
    with pytest.raises(InputError, match=r"Column 'number' of the data holds .*it must hold images, paths"):
        ImageColumn(table, "number", "the data")
    assert encoded({"bytes": b"x", "path": "y"}) == b"x" and encoded({"bytes": None, "path": "y"}) == "y"
    assert encoded(None) is None and encoded(b"x") == b"x"


OUTSIDE = ["/etc/a.png", "../a.png", "inside/../../a.png", "link/a.png"]
IN_THE_WEB = ["http://127.0.0.1:9/a.png", "HTTPS://example.org/a.png"]


@pytest.mark.parametrize("name", OUTSIDE + IN_THE_WEB)
def test_names_in_a_column_lead_no_farther_than_they_are_allowed(tmp_path, monkeypatch, name):
    (tmp_path / "work" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "link").symlink_to(tmp_path)
    tables = tmp_path / "tables"
    inside = ["a.png", "inside/b.png", str(tables / "c.png"), "data:image/png;base64,AAAA", "A" * 5000]
    table = datasets.Dataset.from_dict({"image": [*inside, name]})
    images = ImageColumn(table, "image", str(tables / "x.parquet"))
    assert [images[row] for row in range(5)] == inside
    with pytest.raises(ValueError, match="is a URL; --image_" if name in IN_THE_WEB else "leads out of"):
        images[5]
    if name in OUTSIDE:
        assert ImageColumn(table, "image", "x", "local")[5] == name
    assert ImageColumn(table, "image", "x", "any")[5] == name
    alone = datasets.Dataset.from_dict({"image": [name, name]})
    with pytest.raises(InputError, match=r"None of the first 2 images of x may be opened: .*--image_sources"):
        ImageColumn(alone, "image", "x")


def column(kind: str, data: bytes):
    """An Arrow column with one image in its first row, none in the second, and two in the third if it can."""
    struct = pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.string())])
    one = {"bytes": data, "path": None}
    return {
        "struct": pyarrow.array([one, None], struct),
        "path alone": pyarrow.array([{"path": "x.png"}, {"path": None}]),
        "large binary": pyarrow.array([data, None], pyarrow.large_binary()),
        "list of structs": pyarrow.array([[one], [], [one, one]], pyarrow.list_(struct)),
        "list of bytes": pyarrow.array([[data], None, [data, data]]),
        "list of paths": pyarrow.array([["x.png"], [], ["x.png", "y.png"]]),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["struct", "path alone", "large binary", "list of structs", "list of bytes", "list of paths"]
)
def test_images_that_other_tools_wrote(tmp_path, kind):
    data = b"\x89PNG"
    pyarrow.parquet.write_table(pyarrow.table({"image": column(kind, data)}), tmp_path / "rows.parquet")
    images = ImageColumn(load_table(str(tmp_path / "rows.parquet")), "image", "it")
    assert images[0] == ("x.png" if "path" in kind else data)
    assert images[1] is None
    if kind.startswith("list"):
        with pytest.raises(ValueError, match="There are 2 images"):
            images[2]


@pytest.mark.parametrize("values", [[1], [[1.5]], [{"a": "x"}], [True], [None]])
def test_columns_without_images_are_refused(values):
    with pytest.raises(InputError, match="it must hold images, paths, URLs or bytes"):
        ImageColumn(datasets.Dataset.from_dict({"image": values}), "image", "it")
