"""Image preprocessing: one global view and k x k local crops of the whole image (section 3.1)."""

# ruff: noqa: E402 - the check comes before what older releases lack

import base64
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.utils.versions import require_version

require_version("transformers>=5.17.0", "Upgrade it: pip install --upgrade transformers")

from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    httpx,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

EXIF_ORIENTATION = 0x0112
REDUCED_JPEG_GAP = 2  # a JPEG decoded at reduced scale keeps at least this many times the pixels along each side


def resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """`image` stretched to `size` (width, height), horizontally first and then vertically.

    Two one-axis calls, because Pillow 13 orders the passes of a single call by the image's shape, and the order
    moves pixels; in this order every Pillow gives what the published models were trained on.
    """
    width, height = size
    return image.resize((width, image.height), resample).resize((width, height), resample)


def crop_boxes(tiles_per_side: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Boxes (left, upper, right, lower) of the crops in the enlarged image, column by column."""
    return [
        (column * width, row * height, (column + 1) * width, (row + 1) * height)
        for column in range(tiles_per_side)
        for row in range(tiles_per_side)
    ]


def cut_views(
    image: Image.Image, tiles_per_side: int, size: tuple[int, int], resample: int = Image.Resampling.BICUBIC
) -> np.ndarray:
    """The views of an RGB image: the whole at `size` (height, width), then the k x k crops of the whole at k * `size`.

    Both are resized from the original, without keeping its aspect ratio. Returns uint8 (1 + k * k, height, width, 3).
    """
    height, width = size
    global_view = np.asarray(resize(image, (width, height), resample))
    enlarged = np.asarray(resize(image, (width * tiles_per_side, height * tiles_per_side), resample))
    crops = [
        enlarged[top:bottom, left:right] for left, top, right, bottom in crop_boxes(tiles_per_side, height, width)
    ]
    return np.stack([global_view, *crops])


def load_image(source: str | os.PathLike | bytes, least_side: int | None = None) -> Image.Image:
    """Open an image from a path, an http(s) URL, base64 text or encoded bytes; the first frame if it is animated.

    With `least_side`, a JPEG whose sides stay at least that long is decoded at 1/2, 1/4 or 1/8 of its scale.

    Raises:
        ValueError: if there is no such file, or if it does not hold a whole image that Pillow can read.
    """
    name = "the given bytes" if isinstance(source, bytes) else repr(str(source)[:200])
    is_text = isinstance(source, str) and not os.path.isfile(source) and not source.startswith(("http://", "https://"))
    try:
        return _decode(_from_base64(source) if is_text else _read(source), least_side)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large: {error}. Reduce the image, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    except FileNotFoundError as error:
        raise ValueError(f"{name} is no image: there is no such file.") from error
    except (OSError, RuntimeError, SyntaxError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
        if is_text:
            raise ValueError(
                f"{name} is no image: there is no such file, and it is neither a URL that starts with http:// or "
                "https:// nor base64 text of an image."
            ) from error
        raise ValueError(f"{name} could not be read as an image: {error}. Check that the file is whole.") from error


def _read(source: str | os.PathLike | bytes) -> str | os.PathLike | BytesIO:
    """What `Image.open` can take: a path, or a buffer with the encoded image."""
    if isinstance(source, bytes):
        return BytesIO(source)
    if isinstance(source, os.PathLike) or os.path.isfile(source):
        return source
    return BytesIO(httpx.get(source, follow_redirects=True).raise_for_status().content)


def _from_base64(text: str) -> BytesIO:
    text = text.split(",")[-1] if text.startswith("data:") else text
    return BytesIO(base64.b64decode("".join(text.split()), validate=True))


def _decode(source: str | os.PathLike | BytesIO, least_side: int | None) -> Image.Image:
    with Image.open(source) as image:
        if least_side is not None:
            image.draft(None, (least_side, least_side))
        image.load()
        return image


def to_rgb(image: "Image.Image | np.ndarray | torch.Tensor", input_data_format: str | None = None) -> Image.Image:
    """`image` upright and in mode RGB: the one place for EXIF rotation and mode conversion.

    - 8-bit modes as Pillow's `convert("RGB")` does it: palettes are looked up, CMYK is converted, alpha is dropped.
    - 16-bit gray (modes I and I;16, uint16 arrays): the high byte.
    - Float (mode F, float arrays): from 0 (black) to 1 (white), rounded to 256 steps.
    - Arrays and tensors: (H, W), or with 1, 3 or 4 channels, first or last; `input_data_format` ("channels_first" or
      "channels_last") settles a shape that could be either.

    Raises:
        TypeError: if it is no image. ValueError: if it is empty, holds NaN or is out of range for its type.
    """
    if isinstance(image, Image.Image):
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            array = np.asarray(image)
            image = _from_array(array if image.mode == "F" else _checked_range(array, 2**16).astype(np.uint16))
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        image = _from_array(_channels_last(image, input_data_format))
    else:
        raise TypeError(
            f"{type(image).__name__} is no image; give a PIL image, an array, a tensor, a path, a URL or bytes."
        )
    if 0 in image.size:
        raise ValueError(f"The image is empty: its size is {image.width} x {image.height} pixels.")
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"An image of mode {image.mode!r} cannot become RGB; convert it first.") from error


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """An array of any layout as (H, W) or (H, W, 3 or 4)."""
    if array.ndim not in (2, 3):
        raise ValueError(f"An image array has 2 or 3 dimensions, not {array.ndim} (shape {array.shape}).")
    if array.ndim == 3:
        if 0 in array.shape:
            raise ValueError(f"The image is empty: its shape is {array.shape}.")
        if input_data_format is None:
            try:
                input_data_format = infer_channel_dimension_format(array, num_channels=(1, 3, 4)).value
            except ValueError:
                raise ValueError(
                    f"An image array has 1, 3 or 4 channels, first or last; its shape is {array.shape}."
                ) from None
        shape = array.shape
        if str(getattr(input_data_format, "value", input_data_format)) == "channels_first":
            array = np.moveaxis(array, 0, -1)
        if array.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"With input_data_format={input_data_format!r}, an image of shape {shape} has {array.shape[-1]} "
                "channels; it must have 1, 3 or 4."
            )
        if array.shape[-1] == 1:
            array = array[..., 0]
    return array


def _from_array(array: np.ndarray) -> Image.Image:
    """A PIL image of 8 bits from (H, W) or (H, W, C) values of any type, each in its own range."""
    if array.dtype.kind not in "buif":
        raise TypeError(f"An image array holds numbers or truth values, not {array.dtype}; convert it first.")
    if array.dtype == np.uint16:
        array = array >> 8
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        array = np.rint(_checked_range(array, 1) * 255)
    elif array.dtype != np.uint8:
        array = _checked_range(array, 2**8)
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


def _checked_range(array: np.ndarray, limit: int) -> np.ndarray:
    """`array` if all values lie in 0 <= value < `limit` for integers, 0 <= value <= 1 for floats."""
    if array.size and np.isnan(array).any():
        raise ValueError("The image holds NaN; replace these values first.")
    top = limit if np.issubdtype(array.dtype, np.floating) else limit - 1
    if array.size and not (array.min() >= 0 and array.max() <= top):
        raise ValueError(
            f"The image's values run from {array.min()} to {array.max()}, but {array.dtype} images must lie in "
            f"0 to {top}; rescale them, or convert them to uint8."
        )
    return array


def _check_tiles(tiles_per_side: int):
    if isinstance(tiles_per_side, bool) or not isinstance(tiles_per_side, int) or tiles_per_side < 1:
        raise ValueError(f"tiles_per_side={tiles_per_side!r} must be an integer of at least 1.")


def _map(function: Callable, items: Sequence) -> list:
    """`function` of each item, on as many threads as torch may use: Pillow and numpy let them run side by side."""
    threads = min(len(items), torch.get_num_threads())
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


class PheyeImageProcessorKwargs(ImagesKwargs, total=False):
    """
    tiles_per_side (`int`, *optional*): k, the number of crops along each side of the image.
    """

    tiles_per_side: int


class PheyeImageProcessor(PilBackend):
    """Turns images into `pixel_values` (B, 1 + k * k, 3, height, width), float32: global view, then crops by column.

    `size` is that of one view; `image_mean` and `image_std` are those of the vision tower's own preprocessor. An image
    may be a path, a URL, base64 text, encoded bytes, a PIL image, an array or a tensor; see `to_rgb` for modes.
    Several images are worked on side by side, on as many threads as torch may use.

    With `reduce_jpegs` (an attribute, no argument of the call), JPEG files far larger than the views are decoded at
    reduced scale: several times faster, at a small change of the pixels (docs/usage.md).
    """

    valid_kwargs = PheyeImageProcessorKwargs
    tiles_per_side = 3
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    reduce_jpegs = False

    def __init__(self, **kwargs: Unpack[PheyeImageProcessorKwargs]):
        super().__init__(**kwargs)
        _check_tiles(self.tiles_per_side)

    def fetch_images(self, images):
        """Every path, URL, base64 text or bytes in `images` opened; nesting and everything else stays as it is."""
        if isinstance(images, (list, tuple)):
            return _map(self.fetch_images, images)
        if isinstance(images, (str, bytes, os.PathLike)):
            least_side = REDUCED_JPEG_GAP * self.tiles_per_side * max(self.size.height, self.size.width)
            return load_image(images, least_side if self.reduce_jpegs else None)
        return images

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        """All images in `images`, however nested, opened and in one list; an array of four dimensions is a batch."""
        return self._flatten(self.fetch_images(images))

    def _flatten(self, images) -> list:
        if isinstance(images, (list, tuple)):
            return [image for entry in images for image in self._flatten(entry)]
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            return list(images)
        return [images]

    def process_image(self, image, input_data_format: str | None = None, **kwargs) -> Image.Image:
        return to_rgb(image, input_data_format)

    def _validate_preprocess_kwargs(self, size: SizeDict, tiles_per_side: int, **kwargs):
        _check_tiles(tiles_per_side)
        if not (size.height and size.width):
            raise ValueError(f"size={dict(size)} must name the height and width of one view.")
        for option in ("do_center_crop", "do_pad"):
            if kwargs.get(option):
                raise ValueError(f"{option}=True has no meaning here: the views always show the whole image.")
        for option in ("do_resize", "do_convert_rgb"):
            if kwargs.get(option) is False:
                raise ValueError(f"{option}=False is not possible: views are RGB and have one size.")
        if kwargs.get("data_format") not in (None, "channels_first", ChannelDimension.FIRST):
            raise ValueError(
                f"data_format={kwargs['data_format']!r} is not possible: pixel_values have channels first."
            )
        super()._validate_preprocess_kwargs(size=size, **kwargs)

    def _preprocess(
        self,
        images: list[Image.Image],
        tiles_per_side: int,
        size: SizeDict,
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        def views_of(image: Image.Image) -> np.ndarray:
            views = cut_views(image, tiles_per_side, (size.height, size.width), resample)  # (V, H, W, 3)
            views = np.ascontiguousarray(views.transpose(0, 3, 1, 2)).astype(np.float32)  # (V, 3, H, W)
            if do_rescale:
                views /= np.float32(1 / rescale_factor)  # value / 255, which rounds better than value * (1 / 255)
            if do_normalize:
                views -= np.array(image_mean, np.float32)[:, None, None]
                views /= np.array(image_std, np.float32)[:, None, None]
            return views

        return BatchFeature({"pixel_values": _map(views_of, images)}, tensor_type=return_tensors)


PheyeImageProcessor.register_for_auto_class()
