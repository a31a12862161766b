"""What `--images` may stand for: every way to name images, each once, and a word on all that is passed over."""

import os

import datasets
import pytest
from accelerate import PartialState

from pheye.answering.sources import find_requests, folder_requests
from pheye.common.command import InputError

from tiny import tiny_image

pytestmark = pytest.mark.once
OPTIONS = ("split", "image_column", "id_column", "config", "data_files", "image_sources")


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of that name in the working directory."""
    monkeypatch.chdir(tmp_path)
    make("photos/a.jpg", "photos/sub/b.PNG", "photos/.hidden/c.png", "photos/.d.png")
    return tmp_path / "photos"


def make(*names: str):
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            tiny_image().save(file, "PNG")


def write(name: str, content: str = "hello"):
    with open(name, "w", encoding="utf-8") as file:
        file.write(content)


def found(*images: str, **options: str) -> list[str | int]:
    """The ids."""
    return [request.id for request in find(*images, **options)[0]]


def find(*images: str, **options: str):
    return find_requests(images, "What?", **{**dict.fromkeys(OPTIONS), **options})


def refused(*images: str, **options: str) -> str:
    with pytest.raises(InputError) as error:
        find(*images, **options)
    return str(error.value)


# --- Folders ---


def test_a_folder_and_what_is_below_it(photos):
    requests, passed_over = find("photos")
    assert [request.id for request in requests] == ["a.jpg", "sub/b.PNG"]
    assert [str(request.image) for request in requests] == ["photos/a.jpg", "photos/sub/b.PNG"]
    assert [request.fields["image"] for request in requests] == ["photos/a.jpg", "photos/sub/b.PNG"]
    assert str(passed_over) == ""


def test_folders_behind_links_are_walked_once_and_under_their_own_name_where_they_have_one(photos):
    make("disk/x.png", "disk/deep/y.png", "disk/deep/z.png")
    os.symlink(photos.parent / "disk", photos / "more")
    os.symlink(photos.parent / "disk" / "deep", photos / "again")
    os.symlink(photos / "sub", photos / "a-link-that-comes-first")
    os.symlink(photos, photos / "loop")
    os.symlink(photos, photos.parent / "disk" / "deep" / "back")
    os.symlink("nowhere", photos / "dangling")
    assert found("photos") == ["a.jpg", "again/y.png", "again/z.png", "more/x.png", "sub/b.PNG"]


def test_a_folder_of_links_alone(photos):
    os.makedirs("links")
    os.symlink(photos, "links/photos")
    os.symlink(photos / "a.jpg", "links/c.jpg")
    assert found("links") == ["c.jpg", "photos/a.jpg", "photos/sub/b.PNG"]


def test_a_link_to_a_folder_above_is_named_and_not_followed(photos):
    make("others.png")
    os.symlink("..", photos / "sub" / "up")
    os.symlink("../..", photos / "sub" / "higher")
    requests, passed_over = find("photos")
    assert len(requests) == 2
    assert "Passed over: 1 links to a folder above, such as photos/sub/higher." in str(passed_over)


def test_what_is_passed_over_is_counted_by_suffix_and_the_remedy_named(photos, capsys):
    make("photos/sub/without-suffix")
    for name in ("IMG_1.HEIC", "IMG_2.heic", "DSC_1.NEF", "notes.txt", "sub/movie.mpg", "sub/more.parquet"):
        write(f"photos/{name}")
    requests, passed_over = find("photos")
    assert len(requests) == 2
    text = str(passed_over)
    assert text.startswith(
        "Passed over: 1 without a suffix, 2 .heic, 1 .mpg, 1 .nef, 1 .parquet, 1 .txt. Convert HEIC and the raw files"
    )
    assert "Give tables by themselves" in text and "in a list" in text
    assert len(folder_requests(photos, "What?")) == 2
    assert capsys.readouterr().err == f"{text}\n"  # where nobody counts
    os.makedirs("telephone")
    write("telephone/a.heic")
    message = refused("telephone")
    assert "There are no images in telephone" in message and "1 .heic. Convert HEIC" in message


def test_a_folder_that_is_locked_stops_the_command(photos, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        find("photos")


# --- Images, patterns and lists ---


def test_single_images_and_urls(photos):
    make("without-suffix")
    requests, _ = find("photos/a.jpg", "https://example.org/x.png?a=[1]", "without-suffix", str(photos / "sub/b.PNG"))
    assert [request.id for request in requests] == [
        "photos/a.jpg",
        "https://example.org/x.png?a=[1]",
        "without-suffix",
        str(photos / "sub/b.PNG"),
    ]
    assert [type(request.image).__name__ for request in requests] == ["PosixPath", "str", "PosixPath", "PosixPath"]
    assert found("photos/a.jpg") == ["photos/a.jpg"]
    write("broken.jpg", "no image")
    assert found("broken.jpg") == ["broken.jpg"]  # whose row will say what is wrong


def test_a_file_that_is_neither_image_nor_text(photos):
    (photos / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\xff\xfe")
    assert "is neither an image that Pillow can read, nor a text" in refused("photos/x.heic")
    os.mkfifo("pipe")
    assert "pipe is a pipe or device" in refused("pipe")


@pytest.mark.parametrize("name", ["photo.jpg", "list.txt", "a/b/c", "/nowhere", "photos/none.png"])
def test_what_is_not_there(photos, name):
    assert f"There is no {name}; give images, folders" in refused("photos", name)
    assert f"There is no {name}; give images, folders" in refused(name)


def test_a_name_that_is_mistyped_is_not_looked_for_on_the_hub(photos, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    assert "there is no such folder, and a data set of the Hub is called owner/name" in refused("fotos")


def test_patterns(photos):
    make("photos/x[1].jpg", "photos/more/y.jpg")
    write("photos/notes.txt")
    requests, passed_over = find("photos/*")
    assert [request.id for request in requests] == [
        "photos/a.jpg",
        "photos/more/y.jpg",
        "photos/sub/b.PNG",
        "photos/x[1].jpg",
    ]
    assert str(passed_over) == "Passed over: 1 .txt."
    assert found("photos/*.jpg") == ["photos/a.jpg", "photos/x[1].jpg"]
    assert set(found("photos/**")) == set(found("photos/**/*")) == {request.id for request in requests}
    assert found("photos/**/b.*", "photos/*.jpg") == ["photos/sub/b.PNG", "photos/a.jpg", "photos/x[1].jpg"]
    assert found("photos/x[1].jpg") == ["photos/x[1].jpg"]  # a name, not a pattern
    assert "No image or table matches photos/*.gif." in refused("photos/*.gif")
    assert "No image or table matches photos/*.txt. Passed over: 1 .txt." in refused("photos/*.txt")


def test_several_sources_in_their_order_and_each_image_once(photos):
    make("other/a.jpg", "z.png")
    write("list.txt", "other/a.jpg\nhttps://example.org/x.png\n")
    assert found("z.png", "photos", "other/", "photos/a.jpg", "list.txt") == [
        "z.png",
        "photos/a.jpg",
        "photos/sub/b.PNG",
        "other/a.jpg",
        "https://example.org/x.png",
    ]


def test_lines_of_a_list_end_at_line_feeds_only(photos):
    name = "photos/a\u2028b\x85c\x0b.png"
    make(name)
    write("list.txt", f"\ufeff{name}\r\n\n photos/a.jpg\t\n")
    assert found("list.txt") == [name, "photos/a.jpg"]


def test_lists_that_cannot_be_used(photos):
    write("list.txt", "\n")
    assert "is empty; write a path or URL into each line" in refused("list.txt")
    write("list.txt", "x.png\ny.png\n")
    assert "beginning with 'x.png'; paths are looked up from the working directory" in refused("photos", "list.txt")
    write("list.txt", "photos/a.jpg\nphotos/a.jpg\n")
    assert "'photos/a.jpg' occurs more than once" in refused("list.txt")


def test_options_of_data_sets_for_images(photos):
    message = refused("photos", "photos/a.jpg", split="x", id_column="y")
    assert "photos photos/a.jpg is no data set: leave --split, --id_column out" in message


# --- Data sets ---


@pytest.fixture
def tables(photos):
    """Three files of one table with a path in each row."""
    os.makedirs("tables/deep")
    for number in range(3):
        table = datasets.Dataset.from_dict({"image": ["photos/a.jpg"], "key": [f"k{number}"]})
        table.to_parquet(f"tables/deep/{number}.parquet")
        table.to_csv(f"tables/{number}.csv")
    return [f"tables/deep/{number}.parquet" for number in range(3)]


def test_table_files(tables):
    requests, passed_over = find(tables[1], id_column="key")
    assert [request.id for request in requests] == ["k1"]
    assert requests[0].image() == "photos/a.jpg"
    assert str(passed_over) == ""
    assert found(*tables) == [0, 1, 2]
    assert found(*tables[::-1], id_column="key") == ["k2", "k1", "k0"]
    assert found("tables/*.csv", id_column="key") == ["k0", "k1", "k2"]


def test_a_folder_of_table_files(tables):
    assert found("tables/deep", id_column="key") == ["k0", "k1", "k2"]
    datasets.Dataset.from_dict({"image": ["x"], "key": ["s"]}).save_to_disk("saved")
    assert found("saved", id_column="key") == ["s"]


def test_splits_that_are_left_out_are_named(tables):
    os.makedirs("split")
    for number, name in enumerate(("train", "test")):
        os.rename(tables[number], f"split/{name}-00000-of-00001.parquet")
    requests, passed_over = find("split", id_column="key")
    assert [request.id for request in requests] == ["k0"]
    assert str(passed_over) == "Passed over: the data set's other splits, test, which --split chooses."
    requests, passed_over = find("split", id_column="key", split="test")
    assert ([request.id for request in requests], str(passed_over)) == (["k1"], "")


def test_data_sets_are_given_by_themselves(tables):
    assert f"{tables[0]} is a data set: give it by itself" in refused("photos", tables[0])
    assert "tables/deep is a data set: give it by itself" in refused("tables/deep", tables[0])
    assert "owner/name is a data set: give it by itself" in refused("photos/a.jpg", "owner/name")
    assert "the files must be of one kind" in refused(tables[0], "tables/0.csv")


def test_names_in_a_table_lead_where_they_may(tables, tmp_path, monkeypatch):
    names = ["photos/a.jpg", "/etc/a.jpg", "http://127.0.0.1:9/a.png", None]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_dict({"image": names}))
    requests, _ = find("owner/name")
    assert (requests[0].image(), requests[3].image()) == (names[0], None)
    for request in requests[1:3]:
        with pytest.raises(ValueError, match="--image_sources"):
            request.image()
    requests, _ = find("owner/name", image_sources="any")
    assert [request.image() for request in requests] == names
