"""Whatever a stranger gives for an image: it is read, or one sentence says why not, soon and in little memory."""

import base64
import gzip
import io
import os
import random
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile

from pheye import PheyeImageProcessor, image_opening_pheye
from pheye.image_opening_pheye import check_public, inside, load_image
from pheye.image_processing_pheye import resize, to_rgb

from image_files import (
    answer,
    black_png,
    chunk,
    chunks,
    damaged,
    drip,
    encoded,
    endless,
    exif,
    metadata_places,
    seeds,
    server,
    small_image,
    texts,
    with_metadata,
)

unix = pytest.mark.skipif(sys.platform == "win32", reason="pipes and links of Unix")
METADATA = with_metadata()


def pixels(images, **options) -> torch.Tensor:
    processor = PheyeImageProcessor(tiles_per_side=1, size={"height": 16, "width": 16})
    return processor(images, return_tensors="pt", **options)["pixel_values"]


# --- One error ---

ODD_ERRORS = [
    SyntaxError("not a TIFF file"), struct.error("unpack requires a buffer"), AssertionError(), RuntimeError("broken"),
    NotImplementedError("no such codec"), KeyError("tile"), OSError("image file is truncated"), RecursionError(),
    MemoryError(), ZeroDivisionError("division by zero"),
]  # fmt: skip


@pytest.mark.parametrize("error", ODD_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["open", "load", "convert", "transpose"])
def test_whatever_pillow_raises_is_a_value_error_that_names_the_image(error, place, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    path = tmp_path / "sign.png"
    small_image("P").save(path, exif=exif(6))
    lazy, processor = Image.open(path), PheyeImageProcessor()
    owner = Image if place == "open" else ImageFile.ImageFile if place == "load" else Image.Image
    monkeypatch.setattr(owner, place, fail)
    said = "more memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
    for read in (lambda: processor(str(path)), lambda: processor([path, path])):
        with pytest.raises(ValueError, match=rf"sign\.png.*{said}"):
            read()
    if place == "open":
        return
    for read in (lambda: processor(lazy), lambda: to_rgb(lazy)):
        with pytest.raises(ValueError, match=rf"sign\.png.*{said}"):
            read()


def test_in_a_batch_the_error_says_which_image():
    good, broken = encoded(small_image()), encoded(small_image())[:60]
    with pytest.raises(ValueError, match=r"^Image 2 of 3: the image in the given bytes could not be read"):
        pixels([good, broken, good])
    with pytest.raises(ValueError, match=r"^Image 3 of 3: The image holds NaN"):
        pixels([good, good, np.full((4, 5), np.nan)])


def test_an_image_whose_file_was_closed_is_refused_in_words(tmp_path):
    path = tmp_path / "closed.png"
    small_image().save(path)
    with Image.open(path) as image:
        pass
    with pytest.raises(ValueError, match=r"closed\.png.*stays open until the image is read"):
        pixels(image)
    image = small_image()
    image.close()
    with pytest.raises(ValueError, match="could not be read"):
        pixels(image)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(200), "HEIC.*convert it to JPEG, or install pillow-heif"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG.*as a PNG"),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG.*as a PNG"),
    ],
)
def test_formats_that_pillow_does_not_read_are_named(data, said, tmp_path):
    (tmp_path / "photo.heic").write_bytes(data)
    for source in (data, tmp_path / "photo.heic", base64.b64encode(data).decode()):
        with pytest.raises(ValueError, match=said):
            pixels(source)


def test_errors_are_the_same_in_each_run():
    with pytest.raises(ValueError) as first:
        pixels(b"no image")
    with pytest.raises(ValueError) as second:
        pixels(b"no image")
    assert str(first.value) == str(second.value) and "0x" not in str(first.value)


# --- Metadata ---


@pytest.mark.parametrize("name", METADATA)
def test_whole_pixels_are_read_whatever_became_of_the_metadata(name, tmp_path):
    data, draw = METADATA[name], random.Random(0)
    whole, places = pixels(data), metadata_places(name, data)
    turned = {tuple(pixels(data_turned).flatten().tolist()) for data_turned in turns_of(data)}
    for number in range(60):
        harmed = damaged(data, places, draw)
        found = pixels(harmed)
        if not torch.equal(found, whole):  # the damage has made another orientation, which is a right one too
            assert tuple(found.flatten().tolist()) in turned
        if number < 3:
            (tmp_path / "harmed").write_bytes(harmed)
            for source in (tmp_path / "harmed", str(tmp_path / "harmed"), base64.b64encode(harmed).decode()):
                assert torch.equal(pixels(source), found)


def turns_of(data: bytes) -> list[Image.Image]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return [image.transpose(turn) for turn in Image.Transpose]


BROKEN_EXIF = {
    "no header": b"Exif\0\0rubbish rubbish",
    "no bytes": b"Exif\0\0",
    "rubbish": b"\0\x08\0\x02\x01\x12\0\x03rubbish",
    "an offset behind the end": b"Exif\0\0MM\0*\xff\xff\xff\xff",
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("kind", BROKEN_EXIF)
def test_a_broken_exif_block_leaves_the_image_as_it_lies(format, kind):
    options = {"lossless": True} if format == "WEBP" else {}
    options |= {"dpi": (72, 72)} if format in ("JPEG", "MPO") else {}
    plain = encoded(small_image(), format, **options)
    broken = encoded(small_image(), format, exif=BROKEN_EXIF[kind], **options)
    assert torch.equal(pixels(broken), pixels(plain))
    assert torch.equal(pixels(Image.open(io.BytesIO(broken))), pixels(plain))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_is_applied_if_it_can_be_read_in_what_is_broken(format):
    def entry(tag, kind, count, value):
        return struct.pack("<HHI4s", tag, kind, count, value)

    entries = [entry(0x0112, 3, 1, b"\6\0\0\0"), entry(0x0103, 2, 3, b"ab\0\0")]  # a text where a number belongs
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(entries) + b"\0\0\0\0"
    options = {"lossless": True} if format == "WEBP" else {}
    turned = pixels(encoded(small_image(), format, exif=block, **options))
    assert torch.equal(turned, pixels(encoded(small_image(), format, exif=exif(6), **options)))
    assert not torch.equal(turned, pixels(encoded(small_image(), format, **options)))


def test_a_png_with_a_broken_text_keeps_its_orientation():
    data = encoded(small_image(), "PNG", exif=exif(6), pnginfo=texts())
    for kind in (b"tEXt", b"iTXt", b"zTXt"):
        place = next(place for place, found, _ in chunks(data) if found == kind)
        broken = data[: place + 10] + b"\xff" + data[place + 11 :]
        assert torch.equal(pixels(broken), pixels(data))
    rubbish = chunk(b"zTXt", b"a\0\xff")  # its checksum is right
    broken = data[:33] + rubbish + data[33:]
    assert torch.equal(pixels(broken), pixels(data))


def test_broken_pixels_are_refused_all_the_same():
    data = METADATA["PNG"]
    place, _, body = next(found for found in chunks(data) if found[1] == b"IDAT")
    for broken in (data[: place + 40] + b"\xff\xfe\xfd" + data[place + 43 :], data[: place + 8 + len(body) // 2]):
        with pytest.raises(ValueError, match="could not be read"):
            pixels(broken)


@pytest.mark.parametrize("value", ["a text", 7, b"Exif\0\0II", ["list"], b"", None], ids=repr)
def test_metadata_of_an_image_in_memory_may_be_anything(value):
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "icc_profile"):
        image = small_image()
        image.info[key] = value
        assert torch.equal(pixels(image), pixels(small_image()))


# --- What an image may cost ---


@pytest.mark.parametrize("size", [(1, 200_000), (3, 133_154), (1, 20_000_000), (20_000_000, 1), (7_500_000, 2)])
def test_very_tall_and_wide_images_are_refused_before_they_are_decoded(size, monkeypatch, tmp_path):
    data = black_png(*size)
    (tmp_path / "thin.png").write_bytes(data)
    assert len(data) < 40_000
    given = [data, tmp_path / "thin.png", Image.open(io.BytesIO(data))]
    given += [np.broadcast_to(np.uint8(0), size[::-1]), torch.zeros(1, 1, dtype=torch.uint8).expand(*size[::-1])]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    word = "tall" if size[1] > size[0] else "wide"
    for image in given:
        with pytest.raises(ValueError, match=rf"too {word}.*{size[0]} x {size[1]}.*MAX_IMAGE_PIXELS"):
            PheyeImageProcessor()(image)


def test_tall_images_are_accepted_up_to_the_limit_and_further_if_the_user_says_so(monkeypatch):
    monkeypatch.setattr(image_opening_pheye, "MOST_PIXELS", 2000 * 48)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    processor = PheyeImageProcessor(tiles_per_side=3, size={"height": 16, "width": 16})
    assert processor(Image.new("RGB", (2, 2000)))["pixel_values"][0].shape == (10, 3, 16, 16)
    for limit in (1000, 2000 * 48):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="too tall"):
            processor(Image.new("RGB", (2, 2001)))
    for limit in (2001 * 48, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert len(processor(Image.new("RGB", (2, 2001)))["pixel_values"][0]) == 10


def test_an_image_larger_than_its_file_says_is_refused():
    inner = black_png(1, 300_000)
    head = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    with pytest.raises(ValueError, match="too tall"):
        pixels(head + inner, tiles_per_side=30)


@pytest.mark.parametrize("make", [np.broadcast_to, lambda value, size: torch.from_numpy(value).expand(*size)])
def test_arrays_with_more_pixels_than_pillow_allows_are_refused(make):
    with pytest.raises(ValueError, match=r"too large.*40000 x 40000"):
        pixels(make(np.zeros((1, 1), np.uint8), (40_000, 40_000)))


def test_a_resize_by_itself_has_the_same_limit():
    with pytest.raises(ValueError, match="too tall"):
        resize(Image.new("1", (1, 200_000)), (672, 672), Image.Resampling.BICUBIC)


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(monkeypatch):
    data = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda"))
    bomb = data[:-2] + data[start:-2] * 1000 + data[-2:]
    assert len(bomb) < 500_000
    assert pixels(data).shape[0] == pixels(data[:-2] + data[start:]).shape[0] == 1
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    for image in (bomb, Image.open(io.BytesIO(bomb))):
        with pytest.raises(ValueError, match=r"has 10\d\d scans"):
            pixels(image)
    with pytest.raises(ValueError, match=r"has 10\d\d scans"):
        load_image(bomb, least_side=100)


def test_postscript_is_not_run(monkeypatch):
    data = encoded(small_image(), "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("it was run"))
    for image in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(ValueError, match="PostScript"):
            pixels(image)


def test_images_are_worked_on_one_by_one_and_not_all_whole_in_memory(monkeypatch, tmp_path):
    small_image().save(tmp_path / "a.png")
    alive, most, opened = set(), [], image_opening_pheye.decode_strictly

    def count(*args):
        image = opened(*args)
        alive.add(id(image))
        most.append(len(alive))
        return image

    def close(image, *args):
        alive.clear()
        return np.zeros((2, 16, 16, 3), np.uint8)

    monkeypatch.setattr(image_opening_pheye, "decode_strictly", count)
    monkeypatch.setattr("pheye.image_processing_pheye.cut_views", close)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pixels([tmp_path / "a.png" for _ in range(5)])
    assert most == [1] * 5
    path = tmp_path / "a.png"
    pixels([path] * 5)
    assert most == [1] * 6  # one image at five places


# --- Files ---


@unix
@pytest.mark.timeout(20)
def test_pipes_devices_and_folders_are_refused_before_they_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "round.png").symlink_to("round.png")
    (tmp_path / "empty.png").touch()
    monkeypatch.setattr(Image, "open", lambda *args: pytest.fail("it was opened"))
    kinds = {"pipe.png": "a pipe", "link.png": "a pipe", "folder.png": "a folder", "empty.png": "it is empty"}
    for name, kind in kinds.items():
        for source in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ValueError, match=rf"{name}.*{kind}"):
                pixels(source)
    for path in ("/dev/zero", "/dev/stdin", "/dev/tty", "/proc/kmsg"):
        if os.path.exists(path):
            with pytest.raises(ValueError, match=path):
                pixels(Path(path))
    with pytest.raises(ValueError, match=r"round\.png"):
        pixels(tmp_path / "round.png")


def test_base64_is_read_with_blanks_and_bounded(monkeypatch):
    data = encoded(small_image())
    text, whole = base64.b64encode(data).decode(), pixels(data)
    for spelt in (" ".join(text), "\u00a0\n".join(text), f"DATA:image/png;BASE64,{text}"):
        assert torch.equal(pixels(spelt), whole)
    monkeypatch.setattr(image_opening_pheye, "MOST_BYTES", len(data) - 1)
    for spelt in (text, text * 3, " " * len(text) * 2 + text):
        with pytest.raises(ValueError, match="is more than 0 MB of data"):
            pixels(spelt)


# --- Downloads ---


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(image_opening_pheye, "DOWNLOAD_SECONDS", 0.5)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "handle",
    [
        drip(b"HTTP/1.1 200 OK\r\nA: "),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(b"HTTP/1.1 302 Found\r\nLocation: "),
        lambda connection: time.sleep(20),
    ],
    ids=["header", "body", "chunks", "redirect", "silence"],
)
def test_a_download_ends_in_time_and_leaves_no_thread(handle, quick):
    threads = threading.active_count()
    with server(handle) as (address, _):
        began = time.monotonic()
        with pytest.raises(ValueError, match=rf"{address}.*took longer than 0\.5 seconds.*give the file"):
            load_image(address)
        assert time.monotonic() - began < 3
        patience = time.monotonic() + 10
        while any("run" in thread.name for thread in threading.enumerate()) and time.monotonic() < patience:
            time.sleep(0.05)
        assert not [thread for thread in threading.enumerate() if "(run)" in thread.name], threads


def test_a_name_that_is_never_found_ends_in_time_too(quick, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(image_opening_pheye.Download, "__call__", lambda self, url: stop.wait(20))
    with pytest.raises(ValueError, match="took longer"):
        load_image("http://example.org/a.png")
    stop.set()


def test_a_download_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(image_opening_pheye, "MOST_BYTES", 2**20)
    zeros = gzip.compress(bytes(50 * 2**20))
    servers = {
        "endless": endless,
        "bomb": answer(zeros, Content_Encoding="gzip", Content_Length=str(len(zeros))),
        "long": answer(bytes(2**20 + 1)),
    }
    for handle in servers.values():
        with server(handle) as (address, _):
            with pytest.raises(ValueError, match=rf"{address}.*is more than 1 MB of data"):
                load_image(address)


def test_what_is_compressed_without_being_asked_for_is_read():
    data = encoded(small_image())
    for packed, name in ((gzip.compress(data), "gzip"), (data, "identity"), (data, "unknown")):
        with server(answer(packed, Content_Encoding=name)) as (address, _):
            assert torch.equal(pixels(address), pixels(data))
    twice = gzip.compress(gzip.compress(data))
    with server(answer(twice, Content_Encoding="gzip, gzip")) as (address, _):
        with pytest.raises(ValueError, match="could not be read"):
            load_image(address)


def test_redirects_lead_to_the_web_only_and_end():
    data = encoded(small_image())
    with server(answer(data)) as (address, _):
        with server(answer(status="302 Found", Location=f"{address}/b.png")) as (first, _):
            assert torch.equal(pixels(first.replace("http", "HTTP")), pixels(data))
    for place in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "http://[", "/again"):
        with server(answer(status="302 Found", Location=place)) as (address, _):
            with pytest.raises(ValueError, match=rf"{address}.*could not be fetched"):
                load_image(address)


def test_the_body_of_a_redirect_is_not_read():
    def redirect(connection):
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode())
        while True:
            connection.sendall(bytes(2**16))

    data = encoded(small_image())
    with server(answer(data)) as (target, _), server(redirect) as (address, _):
        assert torch.equal(pixels(address), pixels(data))


# --- What may be opened ---


@pytest.fixture
def places(tmp_path):
    """A folder with an image, and one beside it with another."""
    for name in ("open", "private"):
        (tmp_path / name).mkdir()
        small_image().save(tmp_path / name / "a.png")
    return tmp_path


def refused(source, sources) -> str:
    """The message, which is the same by every door."""
    with pytest.raises(ValueError) as first:
        load_image(source, sources=sources)
    with pytest.raises(ValueError) as second:
        pixels(source, sources=sources)
    with pytest.raises(ValueError) as third:
        PheyeImageProcessor(sources=sources).fetch_images([source])
    assert str(first.value) == str(second.value) == str(third.value)
    return str(first.value)


def test_bytes_and_base64_may_always_be_opened(places):
    data = encoded(small_image())
    for sources in ("any", "data", "local", "remote", places, str(places)):
        for source in (data, base64.b64encode(data).decode(), small_image()):
            assert torch.equal(pixels(source, sources=sources), pixels(data))


def test_data_alone_looks_at_no_file_and_asks_no_server(places, monkeypatch):
    with server(answer(encoded(small_image()))) as (address, requests):
        for source in (address, str(places / "open" / "a.png"), places / "open" / "a.png", str(places / "none.png")):
            assert "sources='data'" in refused(source, "data")
        assert not requests
    there, not_there = (refused(str(places / name), "data") for name in ("open/a.png", "open/b.png"))
    assert there.replace("a.png", "b.png") == not_there
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: pytest.fail("a file was looked for"))
    for source in (str(places / "open" / "a.png"), places / "open" / "a.png"):
        with pytest.raises(ValueError):
            load_image(source, sources="data")


def test_local_opens_files_and_asks_no_server(places):
    path = places / "open" / "a.png"
    assert torch.equal(pixels(path, sources="local"), pixels(str(path), sources="local"))
    with server(answer(encoded(small_image()))) as (address, requests):
        assert "it is a URL, and sources='local'" in refused(address, "local")
        assert not requests


@unix
def test_a_folder_opens_what_lies_in_it(places, monkeypatch):
    folder, private = places / "open", places / "private" / "a.png"
    (folder / "out.png").symlink_to(private)
    (folder / "out").symlink_to(private.parent)
    (folder / "in.png").symlink_to("a.png")
    monkeypatch.chdir(places)
    for source in (folder / "a.png", folder / "in.png", Path("open/a.png"), Path("private/../open/a.png")):
        assert pixels(source, sources=folder).shape == pixels(str(source), sources="open").shape
    out = [private, folder / ".." / "private" / "a.png", folder / "out.png", folder / "out" / "a.png"]
    for source in [*out, places / "open" / ".." / "no.png", Path("/etc/passwd"), Path("opener/a.png")]:
        assert "sources=" in refused(source, folder)
        assert "there is no such file in" in refused(str(source), folder)
    assert "it is a URL" in refused("http://127.0.0.1:9/a.png", folder)
    assert "there is no such file in" in refused("a" * 10_000, folder)
    assert "there is no such file in" in refused("a\0b", folder)


def test_remote_opens_public_addresses_only(places, monkeypatch):
    data = encoded(small_image())
    with server(answer(data)) as (address, requests):
        assert "127.0.0.1, which is no public address" in refused(f"{address}/admin", "remote")
        assert "no public address" in refused(address.replace("127.0.0.1", "localhost"), "remote")
        assert not requests
        monkeypatch.setattr(image_opening_pheye, "check_public", lambda address: None)
        assert torch.equal(pixels(address, sources="remote"), pixels(data))
    for source in (places / "open" / "a.png", str(places / "open" / "a.png")):
        assert "sources='remote'" in refused(source, "remote")


@pytest.mark.skipif(sys.platform != "linux", reason="needs two addresses of this machine")
def test_a_redirect_to_an_address_inside_is_refused_before_it_is_asked(monkeypatch):
    def check(address):
        if address == "127.0.0.2":
            check_public(address)

    monkeypatch.setattr(image_opening_pheye, "check_public", check)
    with server(answer(encoded(small_image())), "127.0.0.2") as (inner, asked):
        with server(answer(status="302 Found", Location=f"{inner}/admin?do=it")) as (address, requests):
            assert "127.0.0.2, which is no public address" in refused(address, "remote")
            assert requests and not asked
            assert pixels(address, sources="any").shape[0] == 1


def test_a_name_that_leads_elsewhere_the_second_time_is_refused(monkeypatch):
    import socket

    look_up, times = socket.getaddrinfo, []

    def public_at_first(host, port, *args, **kwargs):
        times.append(host)
        found = look_up(host, port, *args, **kwargs)
        return [(*found[0][:4], ("8.8.8.8", port))] if len(times) == 1 else found

    with server(answer(encoded(small_image()))) as (address, requests):
        monkeypatch.setattr(socket, "getaddrinfo", public_at_first)
        with pytest.raises(ValueError, match="no public address"):
            load_image(address, sources="remote")
        assert len(times) == 2 and requests in ([], [""])


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "0.0.0.0", "100.64.0.1", "::1", "fd00::1",
                "fe80::1%1", "::ffff:10.0.0.1", "::ffff:127.0.0.1"]
)  # fmt: skip
def test_private_addresses_are_refused(address):
    with pytest.raises(ValueError, match="no public address"):
        check_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_pass(address):
    check_public(address)


@pytest.mark.parametrize("sources", ["lcoal", "", "/no/such/folder", Path("/no/such/folder")])
def test_other_sources_are_refused_by_name(sources):
    for use in (lambda: load_image(b"", sources=sources), lambda: PheyeImageProcessor(sources=sources),
                lambda: pixels(small_image(), sources=sources)):  # fmt: skip
        with pytest.raises(ValueError, match=r"sources=.*any, data, local, remote, or a folder"):
            use()


def test_what_may_be_opened_is_not_saved_with_a_model(places, tmp_path):
    processor = PheyeImageProcessor(sources="data")
    assert "sources" not in processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert PheyeImageProcessor.from_pretrained(tmp_path).sources == "any"
    assert PheyeImageProcessor.from_pretrained(tmp_path, sources="local").sources == "local"


@pytest.mark.parametrize("by", ["argument", "messages", "attribute"])
def test_a_server_can_forbid_paths_in_chat_messages_and_calls(by, places, processor, monkeypatch):
    path, text = str(places / "open" / "a.png"), {"type": "text", "text": "What is it?"}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}

    def ask(image, **sources):
        if by == "argument":
            return processor(images=image, text="What is it?", return_tensors="pt", **sources)
        part = {"type": "image", "image": image}
        sources = {"processor_kwargs": sources} if sources else {}
        return processor.apply_chat_template([{"role": "user", "content": [part, text]}], **options, **sources)

    chosen = {"sources": "data"}
    if by == "attribute":
        monkeypatch.setattr(processor.image_processor, "sources", chosen.pop("sources"))
    else:
        assert ask(path)["pixel_values"].shape[0] == 1
    with pytest.raises(ValueError, match="sources='data'"):
        ask(path, **chosen)
    data = base64.b64encode(encoded(small_image())).decode()
    assert ask(data, **chosen)["pixel_values"].shape[0] == 1


@unix
def test_names_inside_a_folder(places):
    folder = places / "open"
    (folder / "out").symlink_to("../private")
    (folder / "in").symlink_to(".")
    for name in ("a.png", "in/a.png", "b/../a.png", str(folder / "a.png"), "none.png"):
        assert inside(folder, name) == os.path.join(folder, name)
    for name in ("../private/a.png", "out/a.png", "/etc/passwd", str(places / "opener"), "..", "in/../../a.png"):
        with pytest.raises(ValueError, match=r"leads out of the folder .*open"):
            inside(folder, name)
    assert inside("/", "/etc/passwd") == "/etc/passwd"
    with pytest.raises(ValueError, match="characters"):
        inside(folder, "a/" * 10**6)


def test_every_seed_is_read():
    for name, data in seeds().items():
        assert pixels(data).isfinite().all(), name
