"""Image preprocessing: one global view and local crops of the whole image (section 3.1)."""

# ruff: noqa: E402 - the check comes before what older releases lack

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from transformers.utils.versions import require_version

require_version("transformers>=5.17.0", "Upgrade it: pip install --upgrade transformers")

from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .canvases_pheye import Box, Place, crop_boxes, place_image, scale
from .configuration_pheye import read_canvases
from .image_opening_pheye import ImageError, check_size, check_sources, load, load_image, naming, open_image

EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # what undoes each orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
REDUCED_JPEG_GAP = 2  # a JPEG decoded at reduced scale keeps at least this many times the pixels along each side
HIGH_RES_OPTIONS = ("high_res_tile_size", "high_res_image_mean", "high_res_image_std")
MOST_VIEW_PIXELS = 2**26  # of the enlarged image: 8192 x 8192
LARGEST_VALUE = 1e4  # no vision tower is trained on values that come near
DEEPEST_LIST = 8
LAYOUTS = ("channels_first", "channels_last")
WITHOUT_EFFECT = ("crop_size", "pad_size", "disable_grouping", "image_seq_length")


def resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """`image` stretched to `size` (width, height), horizontally first and then vertically.

    Two one-axis calls, because Pillow 13 orders the passes of a single call by the image's shape, and the order
    moves pixels; in this order every Pillow gives what the published models were trained on.

    Raises:
        ValueError: if the image is so tall or wide that this would take gigabytes.
    """
    width, height = size
    check_size(image.size, width)
    return image.resize((width, image.height), resample).resize((width, height), resample)


def paint(image: Image.Image, size: tuple[int, int], box: Box | None, resample: int) -> np.ndarray:
    """`image` stretched into `box` of a black canvas of `size` (width, height), or onto all of it: uint8 (H, W, 3)."""
    if box in (None, (0, 0, *size)):
        return np.asarray(resize(image, size, resample))
    left, top, right, bottom = box
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    canvas[top:bottom, left:right] = np.asarray(resize(image, (right - left, bottom - top), resample))
    return canvas


def cut_crops(
    image: Image.Image,
    grid: tuple[int, int],
    size: tuple[int, int],
    resample: int = Image.Resampling.BICUBIC,
    box: Box | None = None,
) -> list[np.ndarray]:
    """The crops of an RGB image, each of `size` (height, width), uint8 (height, width, 3), column by column.

    grid: rows and columns of crops. box: where on the canvas of all crops the image lies; all of it without.
    """
    (rows, columns), (height, width) = grid, size
    painted = paint(image, (columns * width, rows * height), box, resample)
    return [painted[top:bottom, left:right] for left, top, right, bottom in crop_boxes(rows, columns, height, width)]


def cut_views(
    image: Image.Image,
    grid: tuple[int, int],
    size: tuple[int, int],
    resample: int = Image.Resampling.BICUBIC,
    box: Box | None = None,
) -> np.ndarray:
    """The views of an RGB image: its canvas at `size` (height, width), then its crops, each of that size.

    Both are resized from the original. Returns uint8 (1 + crops, height, width, 3); else as `cut_crops`.
    """
    (rows, columns), (height, width) = grid, size
    small = None if box is None else scale(box, (columns * width, rows * height), (width, height))
    return np.stack([paint(image, (width, height), small, resample), *cut_crops(image, grid, size, resample, box)])


def to_rgb(image: "Image.Image | np.ndarray | torch.Tensor", input_data_format: str | None = None) -> Image.Image:
    """`image` upright and in mode RGB: the one place for EXIF rotation and mode conversion.

    - 8-bit modes as Pillow's `convert("RGB")` does it: palettes are looked up, CMYK is converted, alpha is dropped.
    - 16-bit gray (modes I and I;16, uint16 arrays): the high byte.
    - Float (mode F, float arrays): from 0 (black) to 1 (white), rounded to 256 steps.
    - Arrays and tensors: (H, W), or with 1, 3 or 4 channels, first or last; `input_data_format` ("channels_first" or
      "channels_last") settles a shape that could be either.

    Raises:
        ValueError: if it is no image, is empty, holds NaN, is out of range for its type, could be of either layout, is
            too large, or cannot be decoded; the message names it and says what to do. No other error.
    """
    with naming(image):
        return upright_rgb(image, input_data_format)


def upright_rgb(image, input_data_format: str | None, columns: int = 1) -> Image.Image:
    """As `to_rgb`, for a block that `naming` guards; `columns` as in `check_size`."""
    if isinstance(image, Image.Image):
        load(image, columns)
        turn = _turn(image)
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith(("I", "F")):
            array = np.asarray(image)
            image = _from_array(array if image.mode == "F" else _checked_range(array, 2**16).astype(np.uint16))
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        array = _channels_last(_as_array(image), input_data_format)
        check_size(array.shape[1::-1], columns)
        image = _from_array(array)
    else:
        raise ImageError(
            f"The image is of the type {type(image).__name__}, which is no image; give a PIL image, an array, a "
            "tensor, a path, a URL or bytes."
        )
    check_size(image.size, columns)  # turned by now, and not always as large as its file says
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"The image has the mode {image.mode!r}, which cannot become RGB; convert it first."
        ) from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright. One whose metadata cannot be read is taken as it lies: its pixels are whole."""
    try:
        return UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
    except Exception:
        return None


def _as_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        image = image.detach().resolve_conj().resolve_neg().cpu()
        return (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if np.ma.is_masked(image):
        raise ImageError("The image has masked values; fill them first, with array.filled(0) for example.")
    return image


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """An array of any layout as (H, W) or (H, W, 3 or 4)."""
    shape, input_data_format = array.shape, _layout(input_data_format)
    if array.ndim not in (2, 3):
        raise ImageError(f"The image has {array.ndim} dimensions (shape {shape}); it must have 2 or 3 dimensions.")
    if 0 in shape:
        raise ImageError(f"The image is empty: its shape is {shape}.")
    if array.ndim == 2:
        return array
    if input_data_format is None:
        channels = zip(LAYOUTS, (shape[0], shape[-1]), strict=True)
        possible = [layout for layout, count in channels if count in (1, 3, 4)]
        if len(possible) > 1:
            raise ImageError(
                f"The image's shape {shape} could have its channels first or last; say which by "
                'input_data_format="channels_last" or "channels_first".'
            )
        if not possible:
            raise ImageError(f"The image must have 1, 3 or 4 channels, first or last; its shape is {shape}.")
        input_data_format = possible[0]
    if input_data_format == "channels_first":
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] not in (1, 3, 4):
        raise ImageError(
            f"The image of shape {shape} has {array.shape[-1]} channels with input_data_format={input_data_format!r}; "
            "it must have 1, 3 or 4."
        )
    return array[..., 0] if array.shape[-1] == 1 else array


def _layout(input_data_format: str | ChannelDimension | None) -> str | None:
    layout = getattr(input_data_format, "value", input_data_format)
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"input_data_format={input_data_format!r} must be one of {', '.join(LAYOUTS)}.")
    return layout


def _from_array(array: np.ndarray) -> Image.Image:
    """A PIL image of 8 bits from (H, W) or (H, W, C) values of any type, each in its own range."""
    if array.dtype.kind not in "buif":
        raise ImageError(f"The image must hold numbers or truth values, not {array.dtype}; convert it first.")
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
        raise ImageError("The image holds NaN; replace these values first.")
    top = limit if np.issubdtype(array.dtype, np.floating) else limit - 1
    if array.size and not (array.min() >= 0 and array.max() <= top):
        raise ImageError(
            f"The image's values run from {array.min()} to {array.max()}, but {array.dtype} images must lie in "
            f"0 to {top}; rescale them, or convert them to uint8."
        )
    return array


# --- The processor ---


def _map(function: Callable, items: Sequence) -> list:
    """`function` of each item, on as many threads as torch may use: Pillow and numpy let them run side by side."""
    threads = min(len(items), torch.get_num_threads())
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def _flatten(images, depth: int = 0) -> list:
    """All images in `images`, however nested, in one list; an array of four dimensions is a batch."""
    if isinstance(images, (list, tuple)):
        _check_depth(depth)
        return [image for entry in images for image in _flatten(entry, depth + 1)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        with naming(images):
            return list(images)
    return [images]


def _check_depth(depth: int):
    if depth > DEEPEST_LIST:
        raise ValueError(f"The images lie in lists nested more than {DEEPEST_LIST} deep; give one list.")


def pad_rows(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What rows become in a batch: each row's tensors by name, filled up with zeros along their first dimension."""

    def fill(values: torch.Tensor, length: int) -> torch.Tensor:
        missing = length - len(values)
        return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values

    batch = {}
    for name in rows[0]:
        length = max(len(row[name]) for row in rows)
        batch[name] = torch.utils.data.default_collate([fill(row[name], length) for row in rows])
    return batch


class PheyeImageProcessorKwargs(ImagesKwargs, total=False):
    """
    tiles_per_side (`int`, *optional*): k, the number of crops along each side of the image.
    canvases (`list[list[int]]`, *optional*): grids of crops in place of k x k, or the name of a list; see PheyeConfig.
    max_images (`int`, *optional*): how many images a prompt may have.
    high_res_tile_size (`int`, *optional*): pixels along each side of a tile for the model's high-resolution branch; a
        tile shows what a crop shows. None where the model has no branch.
    high_res_image_mean, high_res_image_std (`list[float]`, *optional*): those of the branch's own preprocessor.
    sources (`str` or `os.PathLike`, *optional*): what may be opened; see `load_image`. It is not saved.
    """

    tiles_per_side: int
    canvases: list[list[int]] | str | None
    max_images: int
    high_res_tile_size: int | None
    high_res_image_mean: list[float] | None
    high_res_image_std: list[float] | None
    sources: str | os.PathLike


class PheyeImageProcessor(PilBackend):
    """Turns images into `pixel_values` (B, 1 + k * k, 3, height, width), float32: global view, then crops by column.

    With `canvases`, an image keeps its aspect ratio on the one that suits it, with black around it, and has as many
    crops as that. `pixel_values` are then filled up with zeros to the most views of any row, and `image_grids`
    (B, I, 2) has rows and columns of each image's canvas, (0, 0) where there is none. `image_grids` also comes where a
    prompt may have several images (`max_images`), or has none: in a list of lists, each holds the images of a prompt,
    and None stands for none.

    With `high_res_tile_size` T also into `high_res_pixel_values` (B, crops, 3, T, T): the whole image at T pixels a
    side for each crop, as tiles in the crops' order. Both are resized from the original; a smaller image is enlarged.

    `size` is that of one view; `image_mean` and `image_std` are those of the vision tower's own preprocessor. An image
    may be a path, a URL, base64 text, encoded bytes, a PIL image, an array or a tensor; see `to_rgb` for modes.
    Several images are worked on side by side, on as many threads as torch may use. An image that cannot be used is a
    ValueError that names it and says what to do, whatever is wrong with it.

    Where others choose the paths and URLs, as on a server, `sources` says what may be opened: "data" (bytes and base64
    text only), "local", "remote" or a folder; see `load_image`.

    With `reduce_jpegs` (an attribute, no argument of the call), JPEG files far larger than the views are decoded at
    reduced scale: several times faster, at a small change of the pixels (docs/usage.md).
    """

    valid_kwargs = PheyeImageProcessorKwargs
    tiles_per_side = 3
    canvases = None
    max_images = 1
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    high_res_tile_size = None
    high_res_image_mean = IMAGENET_DEFAULT_MEAN
    high_res_image_std = IMAGENET_DEFAULT_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    sources = "any"
    reduce_jpegs = False

    def __init__(self, **kwargs: Unpack[PheyeImageProcessorKwargs]):
        super().__init__(**kwargs)
        self.canvases = read_canvases(self.canvases)
        # But for do_convert_rgb, which transformers' own tests set to see it kept; calls refuse it.
        options = {name: getattr(self, name, None) for name in self._valid_kwargs_names if name != "do_convert_rgb"}
        self._validate_preprocess_kwargs(**self._standardize_kwargs(**options))

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that images become."""
        has_grids = self.canvases is not None or self.max_images > 1
        has_branch = self.high_res_tile_size is not None
        return ["pixel_values"] + ["image_grids"] * has_grids + ["high_res_pixel_values"] * has_branch

    def to_dict(self) -> dict:
        """What is saved: all but `sources`, which is a matter of the machine and not of the model, and settings of
        what the model has not."""
        left_out = {"sources"}
        if self.high_res_tile_size is None:
            left_out.update(HIGH_RES_OPTIONS)
        if self.canvases is None:
            left_out.add("canvases")
        if self.max_images == 1:
            left_out.add("max_images")
        return {name: value for name, value in super().to_dict().items() if name not in left_out}

    def place_of(self, image: Image.Image) -> Place:
        """Which canvas an upright image is put onto, and where."""
        canvases, view = read_canvases(self.canvases), (self.size.height, self.size.width)
        return place_image(*image.size, self.tiles_per_side, canvases, view)

    def fetch_images(self, images, depth: int = 0):
        """Every path, URL, base64 text or bytes in `images` opened; nesting and everything else stays as it is."""
        if isinstance(images, (list, tuple)):
            _check_depth(depth)
            return _map(partial(self.fetch_images, depth=depth + 1), images)
        if isinstance(images, (str, bytes, os.PathLike)):
            grids = grids_of(self.tiles_per_side, self.canvases)
            return load_image(images, self._least_side(grids, self.size, self.high_res_tile_size), self.sources)
        return images

    def _least_side(self, grids: list[list[int]], size: SizeDict, high_res_tile_size: int | None) -> int | None:
        cell = max(size.height, size.width, high_res_tile_size or 0)
        return REDUCED_JPEG_GAP * max(map(max, grids)) * cell if self.reduce_jpegs else None

    def _validate_preprocess_kwargs(
        self,
        size: SizeDict,
        tiles_per_side: int,
        canvases: list[list[int]] | str | None = None,
        max_images: int = 1,
        high_res_tile_size: int | None = None,
        high_res_image_mean: list[float] | None = None,
        high_res_image_std: list[float] | None = None,
        sources: str | os.PathLike = "any",
        **kwargs,
    ):
        check_sources(sources)
        _check_count("tiles_per_side", tiles_per_side)
        _check_count("max_images", max_images)
        grids = grids_of(tiles_per_side, canvases)
        _check_shape(grids, size)
        _check_meaning(**kwargs)
        super()._validate_preprocess_kwargs(size=size, **kwargs)
        _check_numbers(**kwargs)
        if high_res_tile_size is not None:
            _check_shape(grids, SizeDict(height=high_res_tile_size, width=high_res_tile_size))
            _check_numbers(**{**kwargs, "image_mean": high_res_image_mean, "image_std": high_res_image_std})

    def _preprocess_image_like_inputs(self, images, *args, return_tensors=None, **options) -> BatchFeature:
        """Each image goes all the way to its views by itself, so that a thread holds one whole image at a time."""
        has_grids = options.get("canvases") is not None or options.get("max_images", 1) > 1
        prompts = _prompts(images, has_grids)
        found = [image for prompt in prompts for image in prompt]
        has_grids |= any(len(prompt) != 1 for prompt in prompts)
        if prompts and not found:
            raise ValueError("No prompt has an image; leave `images` out.")
        check_images(prompts, options.get("max_images", 1))

        def inputs_of(place: int) -> dict[str, np.ndarray]:
            image = found[place]
            has_name = len(found) == 1 or isinstance(image, (str, os.PathLike))
            with naming(image, "" if has_name else f"Image {place + 1} of {len(found)}: "):
                return self.inputs_of(image, **options)

        # An image that stands at several places is worked on once: no two threads may load one object of Pillow.
        first = {}
        for place, image in enumerate(found):
            first.setdefault(id(image), place)
        made = dict(zip(first, _map(inputs_of, list(first.values())), strict=True))
        rows = [made[id(image)] for image in found]
        if has_grids:
            return BatchFeature(pad_rows(_rows(rows, prompts)), tensor_type=return_tensors)
        names = [name for name in (rows[0] if rows else self.model_input_names) if name != "image_grids"]
        return BatchFeature({name: [row[name] for row in rows] for name in names}, tensor_type=return_tensors)

    def inputs_of(
        self,
        image,
        tiles_per_side: int,
        size: SizeDict,
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        input_data_format: str | None,
        sources: str | os.PathLike,
        canvases: list[list[int]] | str | None = None,
        high_res_tile_size: int | None = None,
        high_res_image_mean: tuple[float, ...] | None = None,
        high_res_image_std: tuple[float, ...] | None = None,
        **kwargs,
    ) -> dict[str, np.ndarray]:
        """What one image becomes, whatever it is given as: (V, 3, H, W), its grid (1, 2) and, for a branch,
        (V - 1, 3, T, T)."""

        def to_pixels(views: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
            views = np.ascontiguousarray(views.transpose(0, 3, 1, 2)).astype(np.float32)  # (V, 3, H, W)
            if do_rescale:
                views /= np.float32(1 / rescale_factor)  # value / 255, which rounds better than value * (1 / 255)
            if do_normalize:
                views -= np.array(mean, np.float32)[:, None, None]
                views /= np.array(std, np.float32)[:, None, None]
            return views

        grids = grids_of(tiles_per_side, canvases)
        widest = max(columns for _, columns in grids) * max(size.width, high_res_tile_size or 0)
        if isinstance(image, (str, bytes, os.PathLike)):
            least_side = self._least_side(grids, size, high_res_tile_size)
            image = open_image(image, least_side, sources, widest)
        image = upright_rgb(image, input_data_format, widest)
        view = size.height, size.width
        rows, columns, box = place_image(*image.size, tiles_per_side, canvases and grids, view)
        views = cut_views(image, (rows, columns), view, resample, box)  # (V, H, W, 3)
        inputs = {
            "pixel_values": to_pixels(views, image_mean, image_std),
            "image_grids": np.array([[rows, columns]]),
        }
        if high_res_tile_size is not None:
            side = high_res_tile_size
            if box is not None:
                box = scale(box, (columns * size.width, rows * size.height), (columns * side, rows * side))
            tiles = np.stack(cut_crops(image, (rows, columns), (side, side), resample, box))
            inputs["high_res_pixel_values"] = to_pixels(tiles, high_res_image_mean, high_res_image_std)
        return inputs


# --- Prompts with several images, or none ---


def grids_of(tiles_per_side: int, canvases: list[list[int]] | str | None) -> list[list[int]]:
    """The grids of crops that an image may have."""
    return read_canvases(canvases) or [[tiles_per_side, tiles_per_side]]


def _prompts(images, are_nested: bool) -> list[list]:
    """The images of each prompt. In a list of lists, each is a prompt's, if prompts may have another number than one;
    None is a prompt without an image."""
    if not isinstance(images, (list, tuple)):
        return [[image] for image in _flatten(images)]
    has_empty = any(entry is None or (isinstance(entry, (list, tuple)) and not entry) for entry in images)
    if not are_nested and not has_empty:
        return [[image] for image in _flatten(images)]
    prompts = []
    for entry in images:
        found = [] if entry is None else _flatten(entry)
        prompts += [found] if isinstance(entry, (list, tuple, type(None))) else [[image] for image in found]
    return prompts


def check_images(prompts: list[list], max_images: int):
    """Raise ValueError if a prompt has more images than the model takes."""
    for row, images in enumerate(prompts):
        if len(images) > max_images:
            raise ValueError(
                f"Prompt {row} has {len(images)} images, but this model takes {max_images} (max_images); ask about "
                "fewer at once."
            )


def _rows(images: list[dict[str, np.ndarray]], prompts: list[list]) -> list[dict[str, torch.Tensor]]:
    """What the images of each prompt became, one behind another; of a prompt without any, nothing of that shape."""
    rows, place = [], 0
    for prompt in prompts:
        own = images[place : place + len(prompt)] or [{name: values[:0] for name, values in images[0].items()}]
        rows.append({name: torch.from_numpy(np.concatenate([image[name] for image in own])) for name in own[0]})
        place += len(prompt)
    return rows


# --- Options that can only be mistakes ---


def _is_number(value, least: float, most: float) -> bool:
    """Whether it lies between the two, without them. NaN does not."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and least < value < most


def _check_count(name: str, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def _check_shape(grids: list[list[int]], size: SizeDict):
    sides = (size.height, size.width) if isinstance(size, SizeDict) else ()
    if not sides or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        shown = dict(size) if isinstance(size, SizeDict) else size
        raise ValueError(f"size={shown} must name the height and width of one view, as integers of at least 1.")
    rows, columns = max(grids, key=math.prod)
    if rows * columns * size.height * size.width > MOST_VIEW_PIXELS:
        raise ValueError(
            f"{rows} x {columns} crops (tiles_per_side or canvases) and size={dict(size)} make more than "
            f"{MOST_VIEW_PIXELS} pixels of an image; choose smaller ones."
        )


def _check_meaning(**options):
    """Refuse options that would do nothing, or that the views have no room for."""
    for option in ("do_center_crop", "do_pad"):
        if options.get(option):
            raise ValueError(f"{option}=True has no meaning here: the views always show the whole image.")
    for option in ("do_resize", "do_convert_rgb"):
        if options.get(option) is False:
            raise ValueError(f"{option}=False is not possible: views are RGB and have one size.")
    for option in ("do_resize", "do_convert_rgb", "do_rescale", "do_normalize"):
        if options.get(option) not in (None, True, False):
            raise ValueError(f"{option}={options[option]!r} must be True or False.")
    if options.get("data_format") not in (None, "channels_first", ChannelDimension.FIRST):
        raise ValueError(f"data_format={options['data_format']!r} is not possible: pixel_values have channels first.")
    _layout(options.get("input_data_format"))
    for option in WITHOUT_EFFECT:
        if options.get(option) is not None:
            raise ValueError(f"{option}={options[option]!r} would change nothing here; leave it out.")
    if options.get("device") is not None and str(options["device"]) != "cpu":
        raise ValueError(
            f"device={str(options['device'])!r} is not possible: images are processed on the CPU. Move the result "
            "there, with .to(device)."
        )


def _check_numbers(resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std, **options):
    """Refuse numbers that give pixels which no vision tower was trained on, or none that are numbers."""
    if isinstance(resample, bool) or not isinstance(resample, int) or resample not in list(Image.Resampling):
        raise ValueError(f"resample={resample!r} must be one of PIL.Image.Resampling, such as BICUBIC (3).")
    if do_rescale and not _is_number(rescale_factor, 1e-6, LARGEST_VALUE / 255):
        raise ValueError(
            f"rescale_factor={rescale_factor!r} must be a number from 1e-06 to {LARGEST_VALUE / 255:.1f}."
        )
    if not do_normalize:
        return
    for name, values, least in (("image_mean", image_mean, -LARGEST_VALUE), ("image_std", image_std, 0)):
        is_three = isinstance(values, (list, tuple, np.ndarray)) and len(values) == 3
        if not is_three or not all(_is_number(value, least, LARGEST_VALUE) for value in values):
            bounds = f"{'greater than' if least == 0 else 'from'} {least:.0f} and at most {LARGEST_VALUE:.0f}"
            raise ValueError(f"{name}={values!r} must be three numbers, for red, green and blue, each {bounds}.")
    white = 255 * (rescale_factor if do_rescale else 1)
    for mean, std in zip(image_mean, image_std, strict=True):
        if not max(abs(mean), abs(white - mean)) / std < LARGEST_VALUE:
            raise ValueError(
                f"image_mean={image_mean!r} and image_std={image_std!r} make pixel values of {LARGEST_VALUE:.0f} and "
                "more; those of the vision tower's preprocessor make some units."
            )


PheyeImageProcessor.register_for_auto_class()
