"""From what a user or a stranger names to a picture: what may be opened, what it may cost, and one error for the rest.

Everything that a picture can cost is bounded here: its pixels, the bytes and seconds of a download, the kinds of file.
"""

import base64
import contextlib
import ipaddress
import math
import os
import re
import socket
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from io import BytesIO

from PIL import Image
from transformers.image_utils import httpx

MOST_PIXELS = 89_478_485  # what Pillow allows by default without a warning; Pillow refuses twice as many, and so do we
PIXELS_PER_COLUMN = 18  # that take as much memory as the weights of a resize for a column: 9 numbers of 8 bytes
MOST_SCANNED = 100 * MOST_PIXELS  # scans of a JPEG file times its pixels: some seconds
SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")  # how each begins
MOST_BYTES = 64 * 2**20  # of a download, or of an image as base64 text
DOWNLOAD_SECONDS = 60  # for the whole of a download
SILENCE_SECONDS = 5  # of a server
REDIRECTS = 20
SOURCES = ("any", "data", "local", "remote")
LONGEST_PATH = 4096
WEB = ("http://", "https://")
BLANKS = dict.fromkeys(code for code in range(0x3001) if chr(code).isspace())
ADDRESS = re.compile(r"<_io\.BytesIO object at \w+>")  # in messages of Pillow; another one in each run


class ImageError(ValueError):
    """What is wrong with an image, and what to do; the message begins with "The image", until `naming` names it."""


@contextlib.contextmanager
def naming(image, before: str = "") -> Iterator[None]:
    """Whatever goes wrong with `image` inside the block becomes a ValueError that names it, after the text `before`.

    Pillow and its plugins raise errors of some twenty types for broken files, without a name.
    """
    name = before + name_of(image)
    try:
        yield
    except ImageError as error:
        raise ValueError(name + str(error).removeprefix("The image")) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {str(error).rstrip('.')}. {how_to_reduce()}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{name} is no image: there is no such file.") from error
    except MemoryError as error:
        raise ValueError(f"{name} needs more memory than there is; reduce the image.") from error
    except Exception as error:
        reason = ADDRESS.sub("the data", str(error)).rstrip(".! ") or type(error).__name__
        advice = "Check that the file is whole."
        if isinstance(image, Image.Image):
            advice = "Check that its file is whole, and that it stays open until the image is read."
        elif not isinstance(image, (str, bytes, os.PathLike)):
            advice = "Give a PIL image, or a plain array or tensor."
        raise ValueError(f"{name} could not be read as an image: {reason}. {advice}") from error


def name_of(image) -> str:
    if isinstance(image, bytes):
        return "the image in the given bytes"
    if isinstance(image, (str, os.PathLike)):
        return repr(str(image)[:200])
    return repr(str(image.filename)) if getattr(image, "filename", "") else "The image"


def how_to_reduce() -> str:
    return "Reduce the image, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."


def most_pixels() -> float:
    """`MOST_PIXELS`, or more where the user has raised Pillow's limit."""
    return math.inf if Image.MAX_IMAGE_PIXELS is None else max(MOST_PIXELS, Image.MAX_IMAGE_PIXELS)


def check_size(size: tuple[int, int], columns: int = 1):
    """Refuse an image of `size` (width, height) that is empty, or takes too much memory, itself or while it is
    stretched to `columns` pixels in each row and only then upright: a few bytes can hold a very tall image.

    Raises:
        ImageError: if it does.
    """
    width, height = size
    if 0 in size:
        raise ImageError(f"The image is empty: its size is {width} x {height} pixels.")
    most = most_pixels()
    if width * height > 2 * most:
        raise ImageError(
            f"The image is too large: its {width} x {height} pixels are more than {2 * most}. {how_to_reduce()}"
        )
    if max(height * columns, width * PIXELS_PER_COLUMN) > most:
        raise ImageError(
            f"The image is too {'tall' if height > width else 'wide'} to be resized: {width} x {height} pixels. Cut "
            "it into parts, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        )


# --- What may be opened ---


def check_sources(sources: str | os.PathLike):
    """Raise ValueError unless `sources` is one of `SOURCES`, or a folder."""
    if sources not in SOURCES and not (isinstance(sources, (str, os.PathLike)) and os.path.isdir(sources)):
        raise ValueError(f"sources={sources!r} must be one of {', '.join(SOURCES)}, or a folder that exists.")


def inside(folder: str | os.PathLike, name: str | os.PathLike) -> str:
    """The path of `name` in `folder`; names come from strangers, so they may not lead out, by links neither.

    Raises:
        ValueError: if it does.
    """
    path = os.path.join(folder, name)
    if len(path) > LONGEST_PATH:
        raise ValueError(f"{str(name)[:200]!r}... is no name of a file: it has {len(str(name))} characters.")
    if not is_inside(folder, path):
        raise ValueError(f"{str(name)!r} leads out of the folder {str(folder)!r}, to {os.path.realpath(path)!r}.")
    return path


def is_inside(folder: str | os.PathLike, path: str | os.PathLike) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([folder, os.path.realpath(path)]) == folder


def load_image(
    source: str | os.PathLike | bytes, least_side: int | None = None, sources: str | os.PathLike = "any"
) -> Image.Image:
    """Open an image from a path, an http(s) URL, base64 text or encoded bytes; the first frame if it is animated.

    Args:
        least_side: a JPEG whose sides stay at least that long is decoded at 1/2, 1/4 or 1/8 of its scale.
        sources: what may be opened beside bytes and base64 text, which always may: with "any", files and URLs; with
            "data", nothing else; with "local", files; with "remote", URLs that lead to public addresses; with a
            folder, the files inside it, links followed. For paths and URLs that others give.

    Raises:
        ValueError: if there is no such file, if it does not hold a whole image that Pillow can read, if it is too
            large, or if `sources` does not allow it. No other error.
    """
    check_sources(sources)
    with naming(source):
        return open_image(source, least_side, sources)


def open_image(
    source: str | os.PathLike | bytes, least_side: int | None, sources: str | os.PathLike, columns: int = 1
) -> Image.Image:
    """As `load_image`, for a block that `naming` guards; `columns` as in `check_size`."""
    if isinstance(source, bytes):
        return decode(BytesIO(source), least_side, columns)
    if isinstance(source, str) and source[:8].lower().startswith(WEB):
        if sources not in ("any", "remote"):
            raise ImageError(f"The image may not be opened: it is a URL, and sources={str(sources)!r}.")
        return decode(BytesIO(download(source, only_public=sources == "remote")), least_side, columns)
    is_text = isinstance(source, str)
    if may_be_file(source, sources):
        if not is_text or os.path.exists(source):
            check_file(source)
            return decode(source, least_side, columns)
    elif not is_text:
        raise ImageError(f"The image may not be opened: it is a file, and sources={str(sources)!r}.")
    try:
        return decode(BytesIO(from_base64(source)), least_side, columns)
    except (ImageError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(f"The image is no image: {what_is_missing(sources)}.") from error


def may_be_file(source: str | os.PathLike, sources: str | os.PathLike) -> bool:
    """Whether `sources` allows the file of this name. Nothing is said, or looked up, about others."""
    if sources in SOURCES:
        return sources in ("any", "local")
    name = str(source)
    return "\0" not in name and len(name) <= LONGEST_PATH and is_inside(sources, source)


def what_is_missing(sources: str | os.PathLike) -> str:
    """What a text is not, if it is nothing that `sources` allows."""
    url = "a URL that starts with http:// or https://"
    if sources == "data":
        return f"it is no base64 text of an image, and sources={sources!r}"
    if sources == "remote":
        return f"it is neither {url} nor base64 text of an image, and sources={sources!r}"
    if sources == "any":
        return f"there is no such file, and it is neither {url} nor base64 text of an image"
    where = "" if sources == "local" else f" in {str(sources)!r}"
    return f"there is no such file{where}, and it is no base64 text of an image"


def check_file(path: str | os.PathLike):
    """Refuse what is no file before it is opened: a pipe never ends, and opening a device may do things."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe or device"
        raise ImageError(f"The image is no image: it is {kind}, not a file.")
    if about.st_size == 0:  # so are /proc's files, which may wait for ever
        raise ImageError("The image could not be read as an image: it is empty. Check that the file is whole.")


def from_base64(text: str) -> bytes:
    if len(text) > 2 * MOST_BYTES:
        raise too_many_bytes()
    if text[:5].lower() == "data:":
        text = text.rpartition(",")[2]
    data = base64.b64decode(text.translate(BLANKS), validate=True)
    if len(data) > MOST_BYTES:
        raise too_many_bytes()
    return data


def too_many_bytes() -> ImageError:
    return ImageError(f"The image is more than {MOST_BYTES // 2**20} MB of data; reduce it, or give it as a file.")


def decode(source: str | os.PathLike | BytesIO, least_side: int | None, columns: int) -> Image.Image:
    try:
        return decode_strictly(source, least_side, columns)
    except (ImageError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        data = content(source)
        refuse_other_formats(data)
        mended = without_broken_metadata(data)
        if mended is None:
            raise
        with contextlib.suppress(Exception):
            return decode_strictly(BytesIO(mended), least_side, columns)
        raise


def content(source: str | os.PathLike | BytesIO) -> bytes:
    if isinstance(source, BytesIO):
        return source.getvalue()
    with open(source, "rb") as file:
        return file.read(MOST_BYTES)


def refuse_other_formats(data: bytes):
    """Name the formats that people take for images and Pillow does not read."""
    head = data[:1000]
    heic = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")
    if head[4:8] == b"ftyp" and head[8:12] in heic and b"avif" not in head[:40]:
        raise ImageError(
            "The image is HEIC, which Pillow does not read; convert it to JPEG, or install pillow-heif and call "
            "pillow_heif.register_heif_opener() first."
        )
    if head.lstrip().startswith((b"<svg", b"<?xml")) and b"<svg" in head:
        raise ImageError("The image is SVG, a drawing without pixels; save it as a PNG first.")


def without_broken_metadata(data: bytes) -> bytes | None:
    """The file without what Pillow stumbles over and browsers pass over; None if nothing of this kind is in it.

    AVIF: the EXIF block. PNG: chunks that the pixels do not need, but for an EXIF block whose checksum is right.
    """
    if data[4:8] == b"ftyp" and b"avif" in data[8:40] and b"Exif" in data:
        return data.replace(b"Exif", b"none")
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    kept, place = [data[:8]], 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind, checksum = data[place + 4 : place + 8], data[end - 4 : end]
        is_whole_exif = kind == b"eXIf" and zlib.crc32(data[place + 4 : end - 4]).to_bytes(4, "big") == checksum
        if kind[:1].isupper() or is_whole_exif:
            kept.append(data[place:end])
        place = end
    mended = b"".join(kept)
    return None if mended == data else mended


def decode_strictly(source: str | os.PathLike | BytesIO, least_side: int | None, columns: int) -> Image.Image:
    with Image.open(source) as image:
        if least_side is not None:
            check_decoder(image)  # before the size becomes another
            image.draft(None, (least_side, least_side))
        load(image, columns)
        return image


def load(image: Image.Image, columns: int = 1):
    """Decode a picture that may have been opened only, once it is known what that costs."""
    check_size(image.size, columns)
    if getattr(image, "tile", None):  # not decoded yet
        check_decoder(image)
    image.load()


def check_decoder(image: Image.Image):
    """Refuse what takes long to decode whatever its size: programs, and JPEG files whose pixels are gone over
    thousands of times, in a few bytes each time."""
    if image.format == "EPS":
        raise ImageError("The image is PostScript, a program that may do anything; save it as a PNG first.")
    if image.format not in ("JPEG", "MPO", "BLP") or image.fp is None:
        return
    place, count, rest = image.fp.tell(), 0, b""
    image.fp.seek(0)
    while piece := image.fp.read(2**20):
        count += len(SCAN.findall(rest + piece))
        rest = piece[-4:]
    image.fp.seek(place)
    if count * image.width * image.height > MOST_SCANNED:
        raise ImageError(f"The image has {count} scans, which would take very long to decode; save it anew.")


# --- Downloads ---


def download(url: str, only_public: bool) -> bytes:
    """What an http(s) URL leads to, if it comes whole within `DOWNLOAD_SECONDS` and is no more than `MOST_BYTES`.

    On a thread, because finding an address, connecting, and headers that drip have no time limit of their own.
    """
    future, fetch = Future(), Download(only_public)

    def run():
        try:
            future.set_result(fetch(url))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(DOWNLOAD_SECONDS)
    except ImageError:
        raise
    except Exception as error:
        fetch.hang_up()
        is_late = isinstance(error, TimeoutError)
        reason = f"it took longer than {DOWNLOAD_SECONDS} seconds" if is_late else str(error).rstrip(".! ")
        raise ImageError(
            f"The image could not be fetched: {reason or type(error).__name__}. Check the address, or give the file."
        ) from error


class Download:
    """One download, which another thread may stop."""

    def __init__(self, only_public: bool):
        self.only_public, self.end = only_public, time.monotonic() + DOWNLOAD_SECONDS
        self.sockets = []

    def hang_up(self):
        """Let a thread that still waits for the server find the connection closed."""
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __call__(self, url: str) -> bytes:
        # Proxies have addresses inside the house, and connect to whatever they are asked for.
        client = httpx.Client(timeout=SILENCE_SECONDS, trust_env=not self.only_public)
        try:
            with client:
                request = client.build_request(
                    "GET", url, headers={"Accept-Encoding": "identity"}, extensions={"trace": self.watch}
                )
                for _ in range(REDIRECTS + 1):
                    response = client.send(request, stream=True)  # a redirect's own body is never read
                    with contextlib.closing(response):
                        if response.next_request is None:
                            return self.read(response)
                    request = response.next_request
                raise ValueError(f"there are more than {REDIRECTS} redirects")
        finally:
            for connection in self.sockets:
                connection.close()

    def watch(self, event: str, info: dict):
        """Called by httpx for all that it does: raises before a connection that may not be made, and right after it,
        when nothing has been asked yet."""
        if event.endswith("connect_tcp.started") and self.only_public:
            for *_, address in socket.getaddrinfo(info["host"], info["port"], type=socket.SOCK_STREAM):
                check_public(address[0])
        if event.endswith("connect_tcp.complete"):
            stream = info["return_value"]
            self.sockets.append(stream.get_extra_info("socket").dup())
            if self.only_public:  # names may lead elsewhere when they are looked up again
                check_public(stream.get_extra_info("server_addr")[0])
            if time.monotonic() > self.end:  # too late for `hang_up`
                raise TimeoutError

    def read(self, response) -> bytes:
        if not response.is_success:
            raise ValueError(f"the server answers {response.status_code} {response.reason_phrase}")
        data = bytearray()
        for piece in response.iter_raw():
            data += piece
            if len(data) > MOST_BYTES:
                raise too_many_bytes()
            if time.monotonic() > self.end:
                raise TimeoutError
        if response.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate"):  # although not asked for
            data = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise too_many_bytes()
        return bytes(data)


def check_public(address: str):
    """Raise unless anybody in the world could reach this address: others may be doors into the house."""
    found = ipaddress.ip_address(address)
    if not (getattr(found, "ipv4_mapped", None) or found).is_global:
        raise ImageError(f"The image may not be fetched from {address}, which is no public address.")
