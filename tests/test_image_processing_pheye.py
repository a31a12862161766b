"""Pixels: equal to the published implementation's, the same by every route, and no picture misread in silence."""

import base64
import contextlib
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pheye import PheyeImageProcessor
from pheye.canvases_pheye import crop_boxes
from pheye.image_opening_pheye import load_image
from pheye.image_processing_pheye import cut_views, resize

from tiny import tiny_image

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = {"x2-448": 2, "x4-672": 3}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ORIENTATION = 0x0112
TALL, WIDE = (40, 231), (250, 37)


def small_processor(**kwargs) -> PheyeImageProcessor:
    return PheyeImageProcessor(**{"tiles_per_side": 2, "size": {"height": 32, "width": 32}, **kwargs})


def pixels(images, **kwargs) -> torch.Tensor:
    return small_processor()(images=images, return_tensors="pt", **kwargs)["pixel_values"]


def noise(width: int = 9, height: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def seen(image, height: int = 6, width: int = 9, **kwargs) -> np.ndarray:
    """The RGB values (height, width, 3) that the model sees: the global view at the picture's own size, unscaled."""
    processor = small_processor(
        tiles_per_side=1, size={"height": height, "width": width}, do_rescale=False, do_normalize=False
    )
    return processor(images=image, return_tensors="np", **kwargs)["pixel_values"][0, 0].transpose(1, 2, 0)


def encoded(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def with_orientation(image: Image.Image, orientation: int) -> Image.Image:
    image.getexif()[ORIENTATION] = orientation
    return image


def reference(image: Image.Image, k: int, size: int, mean=CLIP_MEAN, std=CLIP_STD) -> np.ndarray:
    """Section 2 of the specification, slowly: (1 + k * k, 3, size, size)."""

    def stretched(side: int) -> Image.Image:
        wide = image.resize((side, image.height), Image.Resampling.BICUBIC)
        return wide.resize((side, side), Image.Resampling.BICUBIC)

    views = [stretched(size)]
    for x in range(k):
        for y in range(k):
            views.append(stretched(k * size).crop((x * size, y * size, (x + 1) * size, (y + 1) * size)))
    result = np.empty((len(views), 3, size, size))
    for number, view in enumerate(views):
        for channel in range(3):
            result[number, channel] = (np.asarray(view)[..., channel] / 255 - mean[channel]) / std[channel]
    return result


@contextlib.contextmanager
def serve(pages: dict[str, bytes]):
    """A web server on the loopback address that has `pages` and answers 404 to all else; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()


# --- Pixels of the published implementation ---


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_the_published_implementation(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    pictures = [GOLDEN / case / name for name in ("image0.png", "image1.png")]
    values = PheyeImageProcessor(tiles_per_side=CASES[case])(images=pictures, return_tensors="pt")["pixel_values"]

    probe = expected["pixel_values_probe"]
    assert values.shape == (2, 1 + CASES[case] ** 2, 3, 224, 224) and values.dtype == torch.float32
    torch.testing.assert_close(values[..., ::16, ::16], probe, atol=1e-6, rtol=0)
    torch.testing.assert_close(values.mean((-1, -2)), expected["pixel_values_mean"], atol=1e-6, rtol=0)
    torch.testing.assert_close(values.std((-1, -2)), expected["pixel_values_std"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("width_height", [(64, 64), TALL, WIDE, (7, 5)])
def test_pixels_equal_a_slow_reference(k, width_height):
    image = Image.fromarray(noise(*width_height))
    values = pixels(image, tiles_per_side=k)
    assert values.shape == (1, 1 + k * k, 3, 32, 32) and values.dtype == torch.float32
    np.testing.assert_allclose(values[0].numpy(), reference(image, k, 32), atol=1e-6, rtol=0)


def test_rescaling_and_normalizing_is_exact_for_every_value():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    values = pixels(gray, tiles_per_side=1, size={"height": 16, "width": 16})[0, 0]
    expected = torch.from_numpy(gray).permute(2, 0, 1).float() / 255
    expected = (expected - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert torch.equal(values, expected)


def test_crops_come_column_by_column_after_the_global_view():
    k, cell = 3, 40
    colours = noise(k, k)  # colours[row, column]
    picture = Image.fromarray(colours.repeat(cell, axis=0).repeat(cell, axis=1))
    processor = small_processor(tiles_per_side=k, do_rescale=False, do_normalize=False)
    views = processor(images=picture, return_tensors="np")["pixel_values"][0]

    centres = views[1:, :, 16, 16]
    expected = [colours[row, column] for column in range(k) for row in range(k)]
    np.testing.assert_array_equal(centres, expected)
    # The global view holds all cells, at a third of the size.
    for row in range(k):
        for column in range(k):
            middle = views[0, :, 32 * (2 * row + 1) // (2 * k), 32 * (2 * column + 1) // (2 * k)]
            np.testing.assert_allclose(middle, colours[row, column], atol=2)


def test_crop_boxes_cover_the_enlarged_image_once():
    boxes = crop_boxes(2, 2, height=3, width=5)
    assert boxes == [(0, 0, 5, 3), (0, 3, 5, 6), (5, 0, 10, 3), (5, 3, 10, 6)]


@pytest.mark.parametrize("width_height", [TALL, WIDE])
def test_resize_goes_horizontally_first_and_then_vertically(width_height):
    image = Image.fromarray(noise(*width_height))
    bicubic = Image.Resampling.BICUBIC
    horizontal_first = image.resize((64, image.height), bicubic).resize((64, 48), bicubic)
    vertical_first = image.resize((image.width, 48), bicubic).resize((64, 48), bicubic)

    result = np.asarray(resize(image, (64, 48), bicubic))
    np.testing.assert_array_equal(result, np.asarray(horizontal_first))
    assert not np.array_equal(result, np.asarray(vertical_first))


def test_crops_are_resized_from_the_original_and_not_from_the_global_view():
    image = Image.fromarray(noise(200, 150))
    views = cut_views(image, (2, 2), (32, 32))
    whole = np.block([[[views[1]], [views[3]]], [[views[2]], [views[4]]]])
    np.testing.assert_array_equal(whole, np.asarray(resize(image, (64, 64), Image.Resampling.BICUBIC)))
    blown_up = np.asarray(resize(Image.fromarray(views[0]), (64, 64), Image.Resampling.BICUBIC))
    assert np.abs(whole.astype(int) - blown_up).mean() > 5


# --- Options ---


def test_defaults_are_those_of_the_published_672_px_models():
    processor = PheyeImageProcessor()
    assert processor.tiles_per_side == 3
    assert dict(processor.size) == {"height": 224, "width": 224}
    assert tuple(processor.image_mean) == CLIP_MEAN and tuple(processor.image_std) == CLIP_STD


def test_size_mean_and_std_of_another_vision_transformer():
    siglip = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 24, "width": 24}}
    image = tiny_image()
    values = small_processor(**siglip)(images=image, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 5, 3, 24, 24)
    np.testing.assert_allclose(
        values[0].numpy(), reference(image, 2, 24, mean=(0.5,) * 3, std=(0.5,) * 3), atol=1e-6, rtol=0
    )


def test_views_need_not_be_square():
    image = tiny_image()
    values = pixels(image, size={"height": 20, "width": 44}, do_rescale=False, do_normalize=False)
    assert values.shape == (1, 5, 3, 20, 44)
    enlarged = np.asarray(resize(image, (88, 40), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(values[0, 2].permute(1, 2, 0), enlarged[20:, :44])  # column 0, row 1


@pytest.mark.parametrize("return_tensors, kind", [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_return_types(return_tensors, kind):
    values = small_processor()(images=[tiny_image(0), tiny_image(1)], return_tensors=return_tensors)["pixel_values"]
    assert isinstance(values, kind) and len(values) == 2
    assert all(str(row.dtype).endswith("float32") and row.shape == (5, 3, 32, 32) for row in values)
    np.testing.assert_array_equal(
        np.stack([np.asarray(row) for row in values]), pixels([tiny_image(0), tiny_image(1)])
    )


@pytest.mark.parametrize(
    "option",
    [
        {"tiles_per_side": 3},
        {"size": {"height": 16, "width": 16}},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_std": [0.5, 0.6, 0.7]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": Image.Resampling.NEAREST},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_of_the_call_acts_like_one_of_the_processor_and_leaves_it_alone(option):
    image, processor = tiny_image(), small_processor()
    before = processor.to_dict()
    by_call = processor(images=image, return_tensors="pt", **option)["pixel_values"]
    by_init = small_processor(**option)(images=image, return_tensors="pt")["pixel_values"]
    plain = processor(images=image, return_tensors="pt")["pixel_values"]

    assert torch.equal(by_call, by_init)
    assert by_call.shape != plain.shape or not torch.equal(by_call, plain)
    assert processor.to_dict() == before


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "2"])
def test_bad_tiles_per_side_is_refused_by_name(value):
    refusal = (ValueError, StrictDataclassFieldValidationError)  # the library checks an argument's type
    with pytest.raises(refusal, match=rf"(?s)tiles_per_side.*{value}"):
        small_processor()(images=tiny_image(), tiles_per_side=value)
    with pytest.raises(refusal, match=rf"(?s)tiles_per_side.*{value}"):
        small_processor(tiles_per_side=value)(images=tiny_image())


@pytest.mark.parametrize(
    "option",
    [
        {"do_center_crop": True},
        {"do_pad": True},
        {"do_resize": False},
        {"do_convert_rgb": False},
        {"size": {"shortest_edge": 32}},
        {"data_format": "channels_last"},
        {"crop_size": {"height": 16, "width": 16}},
        {"pad_size": {"height": 16, "width": 16}},
        {"disable_grouping": True},
        {"device": "cuda"},
        {"input_data_format": "channels_middle"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_without_meaning_are_refused_by_name(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        small_processor()(images=tiny_image(), return_tensors="pt", **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        small_processor(**option)(images=tiny_image())


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("tiles_per_side", value) for value in (1000, 10**6, 10**30)],
        *[("size", {"height": side, "width": side}) for side in (0, -1, 10**5, 2.5, "32", True, None)],
        *[("size", value) for value in ({"longest_edge": 32}, "x")],
        *[("image_mean", (value, 0.5, 0.5)) for value in (NAN, INF, -INF, 1e308, 10**400, "0.5", None, True)],
        *[("image_mean", value) for value in ((), (0.5,), (0.5, 0.5), (0.5,) * 4, 0.5, "abc")],
        *[("image_std", (value, 0.5, 0.5)) for value in (0, 0.0, -1, NAN, INF, 1e-30, 1e308, "0.5", False)],
        *[("image_std", value) for value in ((), (0.5,), (0.5,) * 4, 0.5, 0, "abc")],
        *[("rescale_factor", value) for value in (0.0, -1.0, NAN, INF, 1e-320, 1e300, 10**400, "1", True)],
        *[("resample", value) for value in (-1, 99, 2.5, "bicubic", True)],
        *[(name, "no") for name in ("do_rescale", "do_normalize", "do_resize")],
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_that_can_only_be_mistakes_are_refused_at_construction_and_at_the_call(option, value, tmp_path):
    refusal = (ValueError, StrictDataclassFieldValidationError)  # the library checks an argument's type
    with pytest.raises(ValueError, match=option):
        small_processor(**{option: value})
    with pytest.raises(refusal, match=option):
        small_processor()(images=tiny_image(), **{option: value})
    if isinstance(value, int) and value > 2**64:
        return
    small_processor().save_pretrained(tmp_path)
    written = tmp_path / "preprocessor_config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), option: value}))
    with pytest.raises(ValueError, match=option):
        PheyeImageProcessor.from_pretrained(tmp_path)


def test_numbers_of_an_option_that_is_off_do_not_matter():
    values = pixels(tiny_image(), do_normalize=False, image_mean=(0.5,), do_rescale=False, rescale_factor=0.0)
    assert torch.equal(values, pixels(tiny_image(), do_normalize=False, do_rescale=False))


def test_numbers_at_the_edge_are_accepted():
    edges = {"image_mean": [0.0, 1.0, 0.5], "image_std": [1.0, 0.001, 2.0], "rescale_factor": 1 / 65535}
    for option, value in edges.items():
        assert pixels(tiny_image(), **{option: value}).isfinite().all()
    for mean in (np.array([0.4, 0.5, 0.6]), [np.float32(0.5)] * 3, [0, 1, 0]):
        assert small_processor(image_mean=mean)(tiny_image())["pixel_values"][0].shape == (5, 3, 32, 32)


def test_unknown_options_are_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="tiles_pre_side"):
        small_processor()(images=tiny_image(), tiles_pre_side=2)


def test_save_and_reload_give_the_same_processor_and_pixels(tmp_path):
    processor = small_processor(tiles_per_side=4, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.1])
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["tiles_per_side"] == 4
    assert written["auto_map"]["AutoImageProcessor"] == "image_processing_pheye.PheyeImageProcessor"

    expected = processor(images=tiny_image(), return_tensors="pt")["pixel_values"]
    for reloaded in (
        PheyeImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(reloaded).__name__ == "PheyeImageProcessor"
        assert reloaded.to_dict() == processor.to_dict()
        assert torch.equal(reloaded(images=tiny_image(), return_tensors="pt")["pixel_values"], expected)


def test_a_batch_of_unequal_pictures_equals_the_pictures_alone():
    pictures = [tiny_image(0), tiny_image(1, *TALL), noise(*WIDE), torch.from_numpy(noise(5, 8)).permute(2, 0, 1)]
    batch = pixels(pictures)
    assert batch.shape == (4, 5, 3, 32, 32)
    for row, picture in zip(batch, pictures, strict=True):
        assert torch.equal(row, pixels(picture)[0])


def test_an_array_of_pictures_is_a_batch():
    pictures = np.stack([noise(seed=0), noise(seed=1)])
    expected = torch.cat([pixels(pictures[0]), pixels(pictures[1])])
    assert torch.equal(pixels(pictures), expected)
    assert torch.equal(pixels(torch.from_numpy(pictures)), expected)


def test_threads_may_share_a_processor():
    processor = small_processor()
    jobs = [(tiny_image(seed, 60 + seed, 90 - seed), 1 + seed % 3) for seed in range(24)]

    def run(job):
        return processor(images=job[0], tiles_per_side=job[1], return_tensors="pt")["pixel_values"]

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, jobs))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


# --- The same picture by every route ---


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture stored on its side and with alpha: where it lies, its bytes, and its upright RGB values."""
    upright = noise(90, 70, channels=4, seed=3)
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(stored, exif=exif)
    path = tmp_path_factory.mktemp("pictures") / "on its side.png"
    path.write_bytes(data)
    expected = torch.from_numpy(reference(Image.fromarray(upright[..., :3]), 2, 32)).float()
    return {"path": path, "data": data, "upright": upright[..., :3].copy(), "expected": expected}


def in_memory_routes(picture) -> dict:
    upright, text = picture["upright"], base64.b64encode(picture["data"]).decode()
    opened = Image.open(picture["path"])
    return {
        "path": str(picture["path"]),
        "pathlib": picture["path"],
        "bytes": picture["data"],
        "base64": text,
        "base64 in lines": base64.encodebytes(picture["data"]).decode(),
        "data URI": f"data:image/png;base64,{text}",
        "PIL, opened from a file": opened,
        "PIL, upright": Image.fromarray(upright),
        "numpy HWC": upright,
        "numpy HWC, strided": np.asfortranarray(upright),
        "numpy CHW": upright.transpose(2, 0, 1),
        "torch HWC": torch.from_numpy(upright),
        "torch CHW": torch.from_numpy(upright).permute(2, 0, 1),
        "list": [picture["path"]],
        "tuple": (picture["path"],),
        "list of lists": [[picture["path"]]],
    }


ROUTES = [
    "path", "pathlib", "bytes", "base64", "base64 in lines", "data URI", "PIL, opened from a file", "PIL, upright",
    "numpy HWC", "numpy HWC, strided", "numpy CHW", "torch HWC", "torch CHW", "list", "tuple", "list of lists",
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_picture_gives_the_same_pixels_by_every_route(picture, processor, route):
    source = in_memory_routes(picture)[route]
    values = pixels(source)
    torch.testing.assert_close(values[0], picture["expected"], atol=1e-6, rtol=0)
    assert torch.equal(values, pixels(picture["path"]))
    assert torch.equal(processor(images=source, return_tensors="pt")["pixel_values"], values)


def test_a_url_gives_the_same_pixels(picture, processor):
    with serve({"/a/picture.png?size=full": picture["data"]}) as address:
        url = f"{address}/a/picture.png?size=full"
        assert torch.equal(pixels(url), pixels(picture["path"]))
        assert torch.equal(pixels([url, picture["path"]]), pixels([picture["path"]] * 2))
        part = {"type": "image", "url": url}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(inputs["pixel_values"], pixels(picture["path"]))


@pytest.mark.parametrize("key, route", [("path", "path"), ("path", "pathlib"), ("base64", "base64")])
def test_chat_messages_give_the_same_pixels(picture, processor, key, route):
    part = {"type": "image", key: in_memory_routes(picture)[route]}
    check_chat_part(part, picture, processor)


@pytest.mark.parametrize("route", [route for route in ROUTES if "list" not in route and route != "tuple"])
def test_images_in_chat_messages_give_the_same_pixels(picture, processor, route):
    check_chat_part({"type": "image", "image": in_memory_routes(picture)[route]}, picture, processor)


def check_chat_part(part, picture, processor):
    conversation = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], pixels(picture["path"]))


def pixels_of_generate(pipe, monkeypatch) -> list[torch.Tensor]:
    """What the pipeline's model gets from now on."""
    got, generate = [], pipe.model.generate

    def spy(*args, **kwargs):
        got.append(kwargs["pixel_values"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(pipe.model, "generate", spy)
    return got


def test_pipelines_give_the_same_pixels(picture, model_folder, monkeypatch):
    expected = pixels(picture["path"])
    routes = in_memory_routes(picture)
    names = ["path", "base64", "data URI", "PIL, opened from a file"]

    pipe = pipeline("image-to-text", model=str(model_folder), trust_remote_code=True, device="cpu")
    got = pixels_of_generate(pipe, monkeypatch)
    for name in [*names, "pathlib", "bytes", "numpy HWC", "torch CHW"]:
        pipe(routes[name], max_new_tokens=1)
    assert len(got) == len(names) + 4 and all(torch.equal(values, expected) for values in got)

    pipe = pipeline("image-text-to-text", model=str(model_folder), trust_remote_code=True, device="cpu")
    got = pixels_of_generate(pipe, monkeypatch)
    for name in names:
        pipe(images=routes[name], text="What?", generate_kwargs={"max_new_tokens": 1})
        part = {"type": "image", "image": routes[name]}
        pipe(text=[{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}], max_new_tokens=1)
    assert len(got) == 2 * len(names) and all(torch.equal(values, expected) for values in got)


# --- EXIF rotation ---

# What a camera that holds the picture turned this way writes: upright values to stored values.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_undone(orientation, tmp_path):
    upright = noise()
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(with_orientation(stored, orientation), exif=stored.getexif()))

    assert Image.open(path).getexif().get(ORIENTATION) == orientation
    np.testing.assert_array_equal(seen(path), upright)
    np.testing.assert_array_equal(seen(Image.open(path)), upright)
    np.testing.assert_array_equal(seen(stored), upright)  # a picture in memory whose tag was set by hand


def test_exif_rotation_leaves_the_callers_picture_alone():
    stored = with_orientation(Image.fromarray(noise()), 6)
    seen(stored, height=9, width=6)
    np.testing.assert_array_equal(np.asarray(stored), noise())
    assert stored.getexif()[ORIENTATION] == 6


@pytest.mark.parametrize("mode", ["L", "I;16", "F", "P", "CMYK"])
def test_exif_rotation_works_in_every_kind_of_mode(mode):
    upright = noise(channels=1)[..., 0]
    if mode == "I;16":
        stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)).astype(np.uint16) << 8)
    elif mode == "F":
        stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)).astype(np.float32) / 255)
    else:
        stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright))).convert(mode)
    expected = np.rot90(np.asarray(stored.convert("RGB")), -1) if mode in ("P", "CMYK") else gray(upright)
    np.testing.assert_array_equal(seen(with_orientation(stored, 6)), expected)


# --- Modes and layouts ---


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=2)


def mode_cases() -> dict:
    """Pictures of each mode, and the RGB values that they stand for, computed without Pillow's conversions."""
    values, colours, alpha = noise(channels=1, seed=1)[..., 0], noise(seed=2), noise(channels=1, seed=4)[..., 0]
    palette = noise(256, 1, seed=5)[0]
    wide = np.random.default_rng(6).integers(0, 2**16, values.shape, dtype=np.uint16)

    indexed = Image.fromarray(values).copy()
    indexed = Image.frombytes("P", indexed.size, indexed.tobytes())
    indexed.putpalette(palette.tobytes())
    transparent_index, transparent_bytes = indexed.copy(), indexed.copy()
    transparent_index.info["transparency"] = int(values[0, 0])
    transparent_bytes.info["transparency"] = bytes(range(256))
    palette_alpha = Image.frombytes("PA", indexed.size, np.stack([values, alpha], axis=-1).tobytes())
    palette_alpha.putpalette(palette.tobytes())
    with_alpha = np.concatenate([colours, alpha[..., None]], axis=2)
    return {
        "1": (Image.fromarray(values > 127), gray((values > 127) * 255)),
        "L": (Image.fromarray(values), gray(values)),
        "LA": (Image.frombytes("LA", (9, 6), np.stack([values, alpha], axis=-1).tobytes()), gray(values)),
        "P": (indexed, palette[values]),
        "P, one transparent colour": (transparent_index, palette[values]),
        "P, alpha for each colour": (transparent_bytes, palette[values]),
        "PA": (palette_alpha, palette[values]),
        "RGB": (Image.fromarray(colours), colours),
        "RGBA": (Image.fromarray(with_alpha), colours),
        "RGBX": (Image.frombytes("RGBX", (9, 6), with_alpha.tobytes()), colours),
        "I;16": (Image.fromarray(wide), gray(wide // 256)),
        "I;16B": (Image.frombytes("I;16B", (9, 6), wide.astype(">u2").tobytes()), gray(wide // 256)),
        "I": (Image.fromarray(wide.astype(np.int32)), gray(wide // 256)),
        "F": (Image.fromarray(values.astype(np.float32) / 255), gray(values)),
    }


@pytest.mark.parametrize("mode", mode_cases())
def test_modes_become_the_rgb_that_they_stand_for(mode):
    image, expected = mode_cases()[mode]
    assert image.mode == mode.split(",")[0]
    before = np.asarray(image).copy()
    np.testing.assert_array_equal(seen(image), expected)
    np.testing.assert_array_equal(np.asarray(image), before)  # the caller's picture stays as it is


def test_cmyk_pictures_are_mixed_from_inks():
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 128)]
    lights = [(255, 255, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0), (127, 127, 127)]
    image = Image.new("CMYK", (6, 1))
    image.putdata(inks)
    np.testing.assert_array_equal(seen(image, height=1, width=6)[0], lights)


def test_ycbcr_pictures_come_back_as_the_colours_they_were_made_of():
    colours = noise()
    image = Image.fromarray(colours).convert("YCbCr")
    assert np.abs(np.asarray(image).astype(int) - colours).max() > 20  # the stored numbers are others
    np.testing.assert_allclose(seen(image), colours, atol=4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "I;16"])
def test_modes_of_png_files(mode, tmp_path):
    image, expected = mode_cases()[mode]
    image.save(tmp_path / "picture.png")
    np.testing.assert_array_equal(seen(tmp_path / "picture.png"), expected)


def array_cases() -> dict:
    """Arrays of each type and layout, and the RGB values that they stand for."""
    colours, alpha = noise(), noise(channels=1, seed=4)
    values = noise(channels=1, seed=1)
    wide = np.random.default_rng(6).integers(0, 2**16, (6, 9, 3), dtype=np.uint16)
    four = np.concatenate([colours, alpha], axis=2)
    return {
        "uint8 HW": (values[..., 0], gray(values[..., 0])),
        "uint8 HW1": (values, gray(values[..., 0])),
        "uint8 1HW": (values.transpose(2, 0, 1), gray(values[..., 0])),
        "uint8 HW3": (colours, colours),
        "uint8 3HW": (colours.transpose(2, 0, 1), colours),
        "uint8 HW4": (four, colours),
        "uint8 4HW": (four.transpose(2, 0, 1), colours),
        "int64 HW3": (colours.astype(np.int64), colours),
        "float32 HW3": ((colours / 255).astype(np.float32), colours),
        "float64 3HW": ((colours / 255).transpose(2, 0, 1), colours),
        "float16 HW3": ((colours / 255).astype(np.float16), colours),
        "float32 HW": ((values[..., 0] / 255).astype(np.float32), gray(values[..., 0])),
        "uint16 HW3": (wide, (wide // 256).astype(np.uint8)),
        "uint16 HW": (wide[..., 0], gray(wide[..., 0] // 256)),
        "bool HW": (values[..., 0] > 127, gray((values[..., 0] > 127) * 255)),
        "bool 3HW": ((colours > 127).transpose(2, 0, 1), ((colours > 127) * 255).astype(np.uint8)),
    }


@pytest.mark.parametrize("layout", array_cases())
def test_arrays_of_every_type_and_layout(layout):
    array, expected = array_cases()[layout]
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    for image in (array, [array], tensor, [tensor]):
        np.testing.assert_array_equal(seen(image), expected)


def test_floats_are_rounded_to_the_nearest_of_256_steps():
    steps = np.arange(54, dtype=np.float64).reshape(6, 9)
    for offset in (-0.4, 0.0, 0.4):
        np.testing.assert_array_equal(seen(np.clip((steps + offset) / 255, 0, 1)[None]), gray(steps))
    np.testing.assert_array_equal(seen(np.full((1, 6, 9), 0.999)), gray(np.full((6, 9), 255)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors(dtype):
    colours = (noise() > 127) * np.uint8(255)  # black and white survive any precision
    np.testing.assert_array_equal(seen(torch.from_numpy(colours / 255).to(dtype)), colours)


def test_tensors_that_require_a_gradient():
    colours = noise()
    np.testing.assert_array_equal(seen(torch.from_numpy(colours / 255).requires_grad_()), colours)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_input_data_format_settles_shapes_that_could_be_either(channels):
    square = noise(channels, channels, channels, seed=channels)
    rgb = gray(square[..., 0]) if channels == 1 else square[..., :3]
    size = {"height": channels, "width": channels}
    np.testing.assert_array_equal(seen(square, **size, input_data_format="channels_last"), rgb)
    first = square.transpose(2, 0, 1)
    np.testing.assert_array_equal(seen(first, **size, input_data_format="channels_first"), rgb)
    np.testing.assert_array_equal(
        seen(torch.from_numpy(first.copy()), **size, input_data_format="channels_first"), rgb
    )


@pytest.mark.parametrize("last", [1, 3, 4])
@pytest.mark.parametrize("first", [1, 3, 4])
def test_shapes_that_could_be_either_are_refused_with_the_remedy(first, last):
    thin = np.zeros((first, 50, last), np.uint8)
    for image in (thin, torch.from_numpy(thin), [thin]):
        message = rf"\({first}, 50, {last}\) could have its channels first or last; say which by input_data_format"
        with pytest.raises(ValueError, match=message):
            pixels(image)
    assert pixels(thin, input_data_format="channels_last").shape == (1, 5, 3, 32, 32)


def test_lines_of_a_page_are_those_that_pillow_sees():
    for height in (1, 2, 3, 4, 5):
        line = noise(50, height)
        options = {} if height in (2, 5) else {"input_data_format": "channels_last"}
        assert torch.equal(pixels(line, **options), pixels(Image.fromarray(line)))


def test_input_data_format_that_the_array_contradicts_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 7, 9\)"):
        pixels(np.zeros((3, 7, 9), np.uint8), input_data_format="channels_last")


def test_of_an_animated_picture_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (9, 6), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 3
    for source in (path, path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(seen(source), np.asarray(frames[0]))


@pytest.mark.parametrize("width_height", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes_work(width_height, tmp_path):
    image = Image.fromarray(noise(*width_height))
    np.testing.assert_allclose(pixels(image)[0].numpy(), reference(image, 2, 32), atol=1e-6, rtol=0)
    image.save(tmp_path / "thin.png")
    assert torch.equal(pixels(tmp_path / "thin.png"), pixels(image))


# --- Bad input ---


def broken_files() -> dict[str, bytes]:
    whole, jpeg = encoded(tiny_image()), encoded(tiny_image(), "JPEG")
    middle = len(whole) // 2
    return {
        "truncated.png": whole[:middle],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "cut-in-the-header.png": whole[:20],
        "corrupt.png": whole[:middle]
        + bytes(255 - byte for byte in whole[middle : middle + 40])
        + whole[middle + 40 :],
        "text.png": b"this is no picture\n" * 40,
        "empty.png": b"",
        "page.html": b"<html><body>Not found</body></html>",
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_refused_by_name(name, tmp_path):
    data = broken_files()[name]
    path = tmp_path / name
    path.write_bytes(data)
    for source in (path, str(path), [tiny_image(), path]):
        with pytest.raises(ValueError, match=rf"{name}.*could not be read as an image.*file is whole"):
            pixels(source)
    with pytest.raises(ValueError, match="the given bytes could not be read as an image"):
        pixels(data)
    with pytest.raises(ValueError, match=r"as an image|is no image"):
        pixels(base64.b64encode(data).decode())
    with serve({f"/{name}": data}) as address:
        with pytest.raises(ValueError, match=rf"{address}/{name}.*could not be read as an image"):
            pixels(f"{address}/{name}")


def test_a_truncated_picture_that_was_opened_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match="truncated"):
        pixels(Image.open(io.BytesIO(broken_files()["truncated.png"])))


@pytest.mark.parametrize("name", ["missing.png", "no such folder/missing.jpg", "missing"])
def test_missing_files_are_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.*no such file"):
        pixels(str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"{name}.*[Nn]o such file"):
        pixels(tmp_path / name)


def test_a_missing_file_whose_name_could_be_base64_is_refused_as_missing():
    with pytest.raises(ValueError, match=r"pictures/dog.*no such file"):
        pixels("pictures/dog")


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=tmp_path.name):
        pixels(tmp_path)
    with pytest.raises(ValueError, match=tmp_path.name):
        pixels(str(tmp_path))


def test_urls_that_have_no_picture_are_refused_by_name():
    with serve({}) as address:
        with pytest.raises(ValueError, match=rf"{address}/gone.png.*404"):
            pixels(f"{address}/gone.png")
    with pytest.raises(ValueError, match=rf"{address}/gone.png"):  # the server is down by now
        pixels(f"{address}/gone.png")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:port/x\.png"):
        pixels("http://127.0.0.1:port/x.png")


def test_text_that_is_neither_file_nor_url_nor_base64_is_refused_by_name():
    with pytest.raises(ValueError, match=r"a red bus\?.*no such file.*http.*base64"):
        pixels("a red bus?")


def test_a_decompression_bomb_is_refused_with_its_remedy(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    tiny_image().save(path)
    assert pixels(path).shape == (1, 5, 3, 32, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb.png.*too large.*6300 pixels[^.]*\. Reduce.*MAX_IMAGE_PIXELS"):
        pixels(path)
    with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS"):
        pixels(path.read_bytes())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.5, 255.0])
def test_floats_that_are_nan_or_out_of_range_are_refused(bad):
    array = np.full((6, 9, 3), 0.5, dtype=np.float32)
    array[2, 3, 1] = bad
    expected = "NaN; replace" if np.isnan(bad) else rf"{np.float32(bad)}.*0 to 1; rescale"
    for image in (array, torch.from_numpy(array), Image.fromarray(array[..., 1])):
        with pytest.raises(ValueError, match=expected):
            pixels(image)


@pytest.mark.parametrize("bad", [-1, 256])
def test_integers_out_of_range_are_refused(bad):
    array = np.full((6, 9, 3), 7)
    array[2, 3, 1] = bad
    for image in (array, torch.from_numpy(array)):
        with pytest.raises(ValueError, match=rf"{bad}.*0 to 255; rescale"):
            pixels(image)
    with pytest.raises(ValueError, match=r"-1.*0 to 65535"):
        pixels(Image.fromarray(np.full((6, 9), -1, dtype=np.int32)))


@pytest.mark.parametrize("shape", [(6, 9, 2), (2, 6, 9), (6, 9, 5), (7, 6, 9)])
def test_a_wrong_number_of_channels_is_refused_with_its_shape(shape):
    message = rf"1, 3 or 4 channels.*\({', '.join(map(str, shape))}\)"
    for image in (np.zeros(shape, np.uint8), torch.zeros(shape)):
        with pytest.raises(ValueError, match=message):
            pixels(image)


@pytest.mark.parametrize("shape", [(9,), (1, 1, 6, 9, 3)])
def test_a_wrong_number_of_dimensions_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=rf"dimensions.*\({', '.join(map(str, shape))}"):
        pixels(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(0, 9, 3), (6, 0, 3), (3, 0, 9), (0, 9), (6, 9, 0)])
def test_empty_arrays_are_refused(shape):
    with pytest.raises(ValueError, match=r"empty|channels"):
        pixels(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_empty_pictures_are_refused(size):
    with pytest.raises(ValueError, match=f"empty.*{size[0]} x {size[1]}"):
        pixels(Image.new("RGB", size))


@pytest.mark.parametrize(
    "thing", [object(), 3, {"a": 1}, None, io.BytesIO(b"")], ids=lambda thing: type(thing).__name__
)
def test_things_that_are_no_image_are_refused_with_what_would_be(thing):
    for images in (thing, [thing], [tiny_image(), thing])[: 1 if thing is None else 3]:  # None in a list is no image
        with pytest.raises(ValueError, match=rf"{type(thing).__name__}.*PIL image"):
            pixels(images)


ODD_TENSORS = {
    "meta": lambda: torch.empty(6, 9, 3, device="meta"),
    "sparse": lambda: torch.zeros(6, 9).to_sparse(),
    "sparse batch": lambda: torch.zeros(2, 6, 9, 3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)]),
    "conjugate": lambda: torch.zeros(6, 9, dtype=torch.complex64).conj(),
    "float8": lambda: torch.zeros(6, 9).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_odd_tensors_are_refused_in_words(kind):
    with pytest.raises(ValueError, match=r"The image .*(Give a PIL image|numbers or truth values)"):
        pixels(ODD_TENSORS[kind]())


def test_a_tensor_with_the_negative_bit_is_read():
    values = torch.from_numpy(noise() / 255)
    negative = torch.complex(torch.zeros_like(values), values).conj().imag.neg()
    assert torch.equal(pixels(negative), pixels(values))


def test_masked_values_are_refused_with_the_remedy():
    values = noise()
    with pytest.raises(ValueError, match=r"masked.*filled"):
        pixels(np.ma.masked_array(values, values > 100))
    assert torch.equal(pixels(np.ma.masked_array(values)), pixels(values))


def test_lists_that_hold_themselves_or_are_nested_without_end_are_refused():
    endless, deep = [], tiny_image()
    endless.append(endless)
    endless.append(endless)
    for _ in range(900):
        deep = [deep]
    for images in (endless, deep):
        for use in (pixels, small_processor().fetch_images):
            with pytest.raises(ValueError, match="nested more than 8 deep"):
                use(images)


@pytest.mark.parametrize("dtype", [object, complex, "U3"])
def test_arrays_of_what_is_no_number_are_refused_by_type(dtype):
    with pytest.raises(ValueError, match=str(np.dtype(dtype))):
        pixels(np.zeros((6, 9, 3)).astype(dtype))


# --- Speed: threads, and JPEGs decoded at reduced scale ---


@pytest.fixture
def jpeg(tmp_path):
    """A smooth picture of 800 x 600 pixels with an edge."""
    array = np.linspace(0, 255, 800)[None, :, None] * np.ones((600, 1, 3))
    array[200:400, 300:500] = 30
    path = tmp_path / "large.jpg"
    Image.fromarray(array.astype(np.uint8)).save(path, quality=95)
    return path


def test_images_worked_on_side_by_side_come_out_as_one_by_one(monkeypatch, tmp_path):
    paths = []
    for seed in range(7):
        paths.append(tmp_path / f"{seed}.png")
        tiny_image(seed, width=40 + seed).save(paths[-1])
    one_by_one = torch.cat([pixels(path) for path in paths])
    threads = set()

    def record(*args):
        threads.add(threading.get_ident())
        return cut_views(*args)

    monkeypatch.setattr("pheye.image_processing_pheye.cut_views", record)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(pixels(paths), one_by_one)
    assert torch.equal(pixels([[path] for path in paths]), one_by_one)
    assert threading.get_ident() not in threads
    paths[4].write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"4\.png"):
        pixels(paths)


def test_jpegs_are_decoded_at_reduced_scale_only_if_asked(jpeg, tmp_path):
    full, reduced = small_processor(), small_processor(reduce_jpegs=True)  # views of 32 pixels, 2 x 2 crops
    assert load_image(jpeg).size == (800, 600)
    assert torch.equal(pixels(jpeg), full(Image.open(jpeg), return_tensors="pt")["pixel_values"])
    assert load_image(jpeg, 128).size == (200, 150)  # half of that would be less than 128 pixels high
    expected = full(load_image(jpeg, 128), return_tensors="pt")["pixel_values"]
    assert torch.equal(reduced(jpeg, return_tensors="pt")["pixel_values"], expected)
    difference = (expected - pixels(jpeg)).abs().mean()
    assert 0 < difference < 0.02  # of values that run over 4 units

    reduced.save_pretrained(tmp_path)
    loaded = PheyeImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(str(jpeg), return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(loaded(jpeg.read_bytes(), return_tensors="pt")["pixel_values"], expected)


def test_reduced_scale_leaves_small_jpegs_and_other_formats_alone(jpeg, tmp_path):
    small, png = tmp_path / "small.jpg", tmp_path / "large.png"
    Image.open(jpeg).resize((200, 150)).save(small)
    Image.open(jpeg).save(png)
    reduced = small_processor(reduce_jpegs=True)
    for path in (small, png):
        assert torch.equal(reduced(path, return_tensors="pt")["pixel_values"], pixels(path))


def test_a_factor_that_makes_huge_pixels_is_refused_also_without_normalizing():
    with pytest.raises(ValueError, match=r"rescale_factor=40 must be a number from 1e-06 to 39\.2"):
        PheyeImageProcessor(rescale_factor=40, do_normalize=False)
