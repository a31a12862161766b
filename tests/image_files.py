"""Small images as files of many formats, what damages them, and servers that misbehave."""

import contextlib
import io
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF tiff:Orientation="1"/></x:xmpmeta>'
FORMATS = ("DDS", "GIF", "ICO", "IM", "JPEG2000", "MSP", "PCX", "PPM", "QOI", "SGI", "SPIDER", "TGA", "XBM")
MODES = {"GIF": "P", "ICO": "RGBA", "MSP": "1", "SPIDER": "F", "XBM": "1"}


def small_image(mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((40, 28), Image.Resampling.BILINEAR)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int = 1) -> bytes:
    data = Image.Exif()
    data[0x010F], data[0x0112], data[0x011A] = "maker", orientation, 72.0
    data.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return data.tobytes()


def texts() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "text")
    info.add_itxt("b", "text" * 10, zip=True)
    info.add_text("c", "text" * 10, zip=True)
    return info


def with_metadata() -> dict[str, bytes]:
    """The same image with all the metadata that each format has."""
    image, icc = small_image(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    every = {"exif": exif(), "icc_profile": icc}
    return {
        "PNG": encoded(image, "PNG", pnginfo=texts(), dpi=(72, 72), **every),
        "PNG, palette": encoded(small_image("P"), "PNG", transparency=3, **every),
        "JPEG": encoded(image, "JPEG", dpi=(72, 72), comment=b"hello", xmp=XMP, **every),
        "JPEG without density": encoded(image, "JPEG", **every),
        "MPO": encoded(image, "MPO", save_all=True, append_images=[small_image(seed=1)], **every),
        "WEBP": encoded(image, "WEBP", xmp=XMP, **every),
        "AVIF": encoded(image, "AVIF", xmp=XMP, **every),
    }


def seeds() -> dict[str, bytes]:
    """Valid files to begin a search with."""
    found = {
        **with_metadata(),
        "PNG, animated": encoded(small_image(), "PNG", save_all=True, append_images=[small_image(seed=1)]),
        "GIF, animated": encoded(small_image(), "GIF", save_all=True, append_images=[small_image(seed=1)]),
        "WEBP, animated": encoded(small_image(), "WEBP", save_all=True, append_images=[small_image(seed=1)]),
        "JPEG, progressive": encoded(small_image(), "JPEG", progressive=True),
        "JPEG, inks": encoded(small_image("CMYK"), "JPEG"),
        "TIFF, turned": encoded(small_image(), "TIFF", tiffinfo={0x0112: 6}),
        "PSD": photoshop(),
    }
    found |= {f"PNG, {mode}": encoded(small_image(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")}
    found |= {f"BMP, {mode}": encoded(small_image(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")}
    found |= {f"TIFF, {mode}": encoded(small_image(mode), "TIFF") for mode in ("I;16", "F", "CMYK", "P", "RGBA")}
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"TIFF, {compression}"] = encoded(small_image(), "TIFF", compression=compression)
    return found | {format: encoded(small_image(MODES.get(format, "RGB")), format) for format in FORMATS}


def photoshop(width: int = 20, height: int = 12) -> bytes:
    """A Photoshop file without layers, which Pillow can read but not write."""
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3) + struct.pack(">III", 0, 0, 0)
    return head + struct.pack(">H", 0) + bytes(range(240)) * 3


# --- PNG by hand ---


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def chunks(png: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Where each chunk begins, its kind and its body."""
    place = len(PNG_SIGNATURE)
    while place < len(png):
        size = int.from_bytes(png[place : place + 4], "big")
        yield place, png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        place += 12 + size


def black_png(width: int, height: int) -> bytes:
    """A PNG of black pixels, one bit each, made without them all being in memory: a bomb if it is large."""
    pack, line = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    starts = range(0, height, 100_000)
    body = b"".join(pack.compress(line * min(100_000, height - start)) for start in starts) + pack.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return PNG_SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# --- Damage ---


def metadata_places(name: str, data: bytes) -> list[tuple[int, int]]:
    """Where in one of `with_metadata` the bytes lie that are no pixels, nor say where they are."""
    found, place = [], 2
    if name.startswith("PNG"):
        needed = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
        return [(at + 8, at + 12 + len(body)) for at, kind, body in chunks(data) if kind not in needed]
    if name == "WEBP":
        place = 12
        while place + 8 <= len(data):
            size = int.from_bytes(data[place + 4 : place + 8], "little")
            if data[place : place + 4] in (b"EXIF", b"ICCP", b"XMP "):
                found.append((place + 8, place + 8 + size))
            place += 8 + size + size % 2
        return found
    if name == "AVIF":
        return [(data.index(part), data.index(part) + size) for part, size in ((b"MM\0*", 60), (XMP, len(XMP)))]
    while data[place + 1] != 0xDA:  # JPEG: until the pixels begin
        size = int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xE0 <= data[place + 1] <= 0xEF or data[place + 1] == 0xFE:
            found.append((place + 4, place + 2 + size))
        place += 2 + size
    return found


def damaged(data: bytes, places: list[tuple[int, int]], draw: random.Random) -> bytes:
    """`data` with one to five changes inside these places."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        start, end = draw.choice(places)
        at = draw.randrange(start, end)
        for place in range(at, min(end, at + draw.choice((1, 4, 20, 200)))):
            changed[place] = draw.randrange(256)
    if data.startswith(PNG_SIGNATURE) and draw.random() < 0.5:  # with checksums that are right again
        rest = b"".join(chunk(kind, body) for _, kind, body in chunks(bytes(changed)))
        return PNG_SIGNATURE + rest
    return bytes(changed)


# --- Servers ---


@contextlib.contextmanager
def server(handle: Callable[[socket.socket], None], host: str = "127.0.0.1"):
    """A server that lets `handle` do what it likes with each connection; gives its address, and a list that gets the
    first line of each request."""
    requests = []
    with socket.create_server((host, 0)) as listener:

        def serve(connection):
            with connection, contextlib.suppress(OSError):
                requests.append(connection.recv(2**16).split(b"\r\n")[0].decode())
                handle(connection)

        def listen():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_PROXY", "127.0.0.1,127.0.0.2")
            patch.setenv("no_proxy", "127.0.0.1,127.0.0.2")
            yield f"http://{host}:{listener.getsockname()[1]}", requests


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> Callable:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return lambda connection: connection.sendall("\r\n".join([*lines, "\r\n"]).encode() + body)


def drip(head: bytes, piece: bytes = b"x", seconds: float = 0.05) -> Callable:
    """Sends `piece` for ever, slowly."""

    def handle(connection):
        connection.sendall(head)
        while True:
            time.sleep(seconds)
            connection.sendall(piece)

    return handle


def endless(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(2**16))
