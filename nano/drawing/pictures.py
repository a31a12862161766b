"""Draws pictures to learn from: coloured shapes and signs on varied backgrounds, with the place of everything in them.

A picture is a function of its random generator and of whether it shows held-out words and fonts.
"""

import functools
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from skimage import data

from . import fonts, words

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 205),
    "yellow": (245, 215, 50),
    "orange": (245, 135, 30),
    "purple": (130, 50, 160),
    "black": (22, 22, 24),
    "white": (245, 245, 243),
}
KINDS = ("circle", "square", "triangle", "star")
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
HELD_OUT_PHOTOGRAPHS = ("camera.png", "coffee.png", "rocket.jpg")
LEAST_CONTRAST = 90  # of 255, between letters and what lies behind them
CIRCLE_CORNERS = 48
MARGINS = 0.3, 0.8  # around the text of a sign, in heights of a capital
TIGHT_MARGINS = 0.1, 0.4  # on a page

Point = tuple[float, float]


@dataclass
class Letter:
    """A letter of a sign: its four corners in the picture, and its place in its word."""

    character: str
    corners: list[Point]
    line: int
    word: int


@dataclass
class Shape:
    kind: str
    colour: str
    corners: list[Point]

    @property
    def centre(self) -> Point:
        xs, ys = zip(*self.corners, strict=True)
        return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


@dataclass
class Picture:
    """A drawn picture (RGB) and what is in it; `cap_height` is that of the first sign, over the picture's height.

    `background` names its maker, `boards` says which signs have a board.
    """

    image: Image.Image
    shapes: list[Shape] = field(default_factory=list)
    signs: list[str] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    cap_height: float = 0.0
    background: str = ""
    boards: list[bool] = field(default_factory=list)


# --- Backgrounds ---


@functools.cache
def photograph(name: str) -> Image.Image:
    return Image.open(Path(data.__file__).parent / name).convert("RGB")


def random_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def bright_colour(rng: random.Random) -> tuple[int, int, int]:
    return jittered(rng, (rng.randrange(180, 240),) * 3, 15)


def dark_colour(rng: random.Random) -> tuple[int, int, int]:
    return jittered(rng, (rng.randrange(15, 65),) * 3, 15)


def jittered(rng: random.Random, colour: tuple[int, int, int], by: int = 18) -> tuple[int, int, int]:
    return tuple(min(255, max(0, channel + rng.randint(-by, by))) for channel in colour)


def luminance(colour) -> float:
    red, green, blue = colour[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue


def empty_picture(rng: random.Random, width: int, height: int, held_out: bool) -> Picture:
    """A plain colour, a gradient, noise, a texture or part of a photograph."""
    maker = rng.choice((plain, gradient, noise, texture, from_photograph, from_photograph))
    return Picture(maker(rng, width, height, held_out), background=maker.__name__.removeprefix("from_"))


def plain(rng, width, height, held_out) -> Image.Image:
    return Image.new("RGB", (width, height), random_colour(rng))


def gradient(rng, width, height, held_out) -> Image.Image:
    corners = np.array([[random_colour(rng) for _ in range(2)] for _ in range(2)], dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def noise(rng, width, height, held_out) -> Image.Image:
    cells = rng.choice((4, 8, 16, 64))
    spread = rng.randint(10, 60)
    values = np.random.default_rng(rng.getrandbits(32)).normal(0, spread, (cells, cells, 3)) + random_colour(rng)
    coarse = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return coarse.resize((width, height), rng.choice((Image.Resampling.BICUBIC, Image.Resampling.NEAREST)))


def texture(rng, width, height, held_out) -> Image.Image:
    """Stripes, checks or dots of two colours."""
    colour = random_colour(rng)
    image = Image.new("RGB", (width, height), colour)
    draw, other = ImageDraw.Draw(image), jittered(rng, colour, 45)
    step = max(4, int(min(width, height) * rng.uniform(0.02, 0.12)))
    kind = rng.choice(("stripes", "checks", "dots"))
    for row, y in enumerate(range(0, height, step)):
        if kind == "stripes":
            draw.rectangle((0, y, width, y + step // 2), other)
            continue
        for x in range((row % 2) * step, width, 2 * step):
            if kind == "checks":
                draw.rectangle((x, y, x + step - 1, y + step - 1), other)
            else:
                draw.ellipse((x, y, x + step // 2, y + step // 2), other)
    return image


def from_photograph(rng, width, height, held_out) -> Image.Image:
    names = [name for name in PHOTOGRAPHS if (name in HELD_OUT_PHOTOGRAPHS) == held_out]
    picture = photograph(rng.choice(names))
    share = rng.uniform(0.4, 1.0)
    part_width, part_height = int(picture.width * share), int(picture.height * share)
    left, top = rng.randint(0, picture.width - part_width), rng.randint(0, picture.height - part_height)
    box = (left, top, left + part_width, top + part_height)
    return picture.resize((width, height), Image.Resampling.BILINEAR, box=box)


# --- Shapes ---


def outline(kind: str, x: float, y: float, radius: float, turn: float) -> list[Point]:
    """Corners of a shape around (x, y); `turn` in radians."""
    if kind == "star":
        angles = [math.pi * step / 5 for step in range(10)]
        radii = [radius if step % 2 == 0 else radius * 0.42 for step in range(10)]
    else:
        corners = {"circle": CIRCLE_CORNERS, "square": 4, "triangle": 3}[kind]
        offset = math.pi / 4 if kind == "square" else 0
        angles = [offset + 2 * math.pi * step / corners for step in range(corners)]
        radii = [radius] * corners
    return [
        (x + length * math.sin(angle + turn), y - length * math.cos(angle + turn))
        for angle, length in zip(angles, radii, strict=True)
    ]


def overlaps(box: tuple[float, float, float, float], others: list, gap: float) -> bool:
    left, top, right, bottom = box
    return any(left - gap < r and right + gap > f and top - gap < b and bottom + gap > t for f, t, r, b in others)


def mean_colour(image: Image.Image, box) -> tuple[float, ...]:
    left, top = max(0, min(image.width - 1, int(box[0]))), max(0, min(image.height - 1, int(box[1])))
    box = (left, top, max(left + 1, min(image.width, int(box[2]))), max(top + 1, min(image.height, int(box[3]))))
    return image.resize((1, 1), Image.Resampling.BOX, box=box).getpixel((0, 0))


def distance(one, other) -> float:
    return math.dist(one[:3], other[:3])


def add_shapes(rng: random.Random, picture: Picture, count: int, taken: list):
    """Draw up to `count` shapes where there is room, each unlike what lies behind it."""
    image, draw = picture.image, ImageDraw.Draw(picture.image)
    least = min(image.size)
    kinds = rng.choices(KINDS, k=count) if rng.random() < 0.6 else [rng.choice(KINDS)] * count
    for kind in kinds:
        for _ in range(20):
            radius = least * rng.uniform(0.045, 0.13)
            x, y = rng.uniform(radius, image.width - radius), rng.uniform(radius, image.height - radius)
            box = (x - radius, y - radius, x + radius, y + radius)
            if overlaps(box, taken, least * 0.01):
                continue
            behind = mean_colour(image, box)
            colours = [name for name in COLOURS if distance(COLOURS[name], behind) > 110]
            if not colours:
                continue
            name = rng.choice(colours)
            turn = rng.uniform(-0.3, 0.3) if kind in ("triangle", "star", "square") else 0.0
            shape = Shape(kind, name, outline(kind, x, y, radius, turn))
            draw.polygon(shape.corners, jittered(rng, COLOURS[name], 12))
            picture.shapes.append(shape)
            taken.append(box)
            break


# --- Signs ---


def homography(source: list[Point], target: list[Point]) -> np.ndarray:
    """The 3 x 3 matrix that maps four points to four points."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows, float), np.array(values, float)), 1).reshape(3, 3)


def mapped(matrix: np.ndarray, points: list[Point]) -> list[Point]:
    places = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    return [tuple(place) for place in places[:, :2] / places[:, 2:]]


def letter_mask(rng: random.Random, text: str, file: str, cap_height: float, margins: tuple[float, float]):
    """`text` as a mask (L), the boxes of its letters (None for a space), and the height of a capital.

    `margins`: least and most that is left free around the text, in heights of a capital.
    """
    size = max(6, round(cap_height / fonts.cap_ratio(file)))
    font = fonts.open_font(file, size)
    spacing = rng.choice((0.0, 0.0, 0.05, 0.15)) * size
    margin = max(2, round(cap_height * rng.uniform(*margins)))
    lefts = [margin + font.getlength(text[:number]) + spacing * number for number in range(len(text))]
    width = math.ceil(lefts[-1] + font.getlength(text[-1])) + margin
    _, top, _, bottom = font.getbbox("H")
    mask = Image.new("L", (width, bottom - top + 2 * margin))
    draw = ImageDraw.Draw(mask)
    boxes = []
    for character, left in zip(text, lefts, strict=True):
        draw.text((left, margin - top), character, fill=255, font=font)
        box = (left, margin - 1, left + font.getlength(character), margin + bottom - top + 1)
        boxes.append(None if character == " " else box)
    return mask, boxes, bottom - top


def corner_points(box) -> list[Point]:
    left, top, right, bottom = box
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def contrasting(rng: random.Random, behind) -> tuple[int, int, int]:
    while True:
        colour = random_colour(rng) if rng.random() < 0.6 else rng.choice(((0, 0, 0), (255, 255, 255)))
        if abs(luminance(colour) - luminance(behind)) > LEAST_CONTRAST:
            return colour


def tilted(rng: random.Random, width: int, height: int) -> list[Point]:
    """Where the corners of a sign come to lie after a slight rotation and perspective."""
    angle = math.radians(rng.gauss(0, 3)) if rng.random() < 0.6 else 0.0
    slack = 0.06 * height if rng.random() < 0.5 else 0.0
    points = [
        (
            x * math.cos(angle) - y * math.sin(angle) + rng.uniform(-slack, slack),
            x * math.sin(angle) + y * math.cos(angle) + rng.uniform(-slack, slack),
        )
        for x, y in corner_points((-width / 2, -height / 2, width / 2, height / 2))
    ]
    left, top = min(x for x, _ in points), min(y for _, y in points)
    return [(x - left, y - top) for x, y in points]


def room(rng: random.Random, image: Image.Image, size: tuple[int, int], taken: list, gap: float):
    """A corner from which `size` lies inside the picture and away from what is `taken`; None if none was found."""
    if size[0] > image.width or size[1] > image.height:
        return None
    for _ in range(20):
        x, y = rng.randint(0, image.width - size[0]), rng.randint(0, image.height - size[1])
        if not overlaps((x, y, x + size[0], y + size[1]), taken, gap):
            return x, y
    return None


def add_sign(
    rng: random.Random,
    picture: Picture,
    text: str,
    cap_height: float,
    held_out: bool,
    taken: list,
    corner: tuple[int, int] | None = None,
    paper: tuple[int, int, int] | None = None,
) -> bool:
    """Draw a sign with capitals of `cap_height` pixels where there is room; whether there was.

    With `corner` its upper left corner comes to lie there, whatever is there already and even if it does not fit; with
    `paper` it has no board, and dark letters.
    """
    image = picture.image
    families = fonts.families(held_out)
    file = rng.choice(families[rng.choice(list(families))])
    mask, boxes, height = letter_mask(rng, text, file, cap_height, MARGINS if corner is None else TIGHT_MARGINS)
    target = tilted(rng, *mask.size)
    matrix = homography(corner_points((0, 0, *mask.size)), target)
    width_there = math.ceil(max(x for x, _ in target)) + 1
    height_there = math.ceil(max(y for _, y in target)) + 1
    place = room(rng, image, (width_there, height_there), taken, 0.25 * cap_height) if corner is None else corner
    if place is None:
        return False
    x, y = place
    place = (x, y, x + width_there, y + height_there)
    inverse = np.linalg.inv(matrix)
    warp = {"size": (width_there, height_there), "method": Image.Transform.PERSPECTIVE}
    warp["data"] = tuple((inverse / inverse[2, 2]).flatten()[:8])
    behind = paper or mean_colour(image, place)
    has_board = paper is None and rng.random() < 0.7
    if has_board:
        board = random_colour(rng)
        plate = Image.new("L", mask.size, 255)
        image.paste(board, (x, y), plate.transform(resample=Image.Resampling.BILINEAR, **warp))
        behind = board
    ink = contrasting(rng, behind) if paper is None else dark_colour(rng)
    image.paste(ink, (x, y), mask.transform(resample=Image.Resampling.BICUBIC, **warp))
    taken.append(place)
    line, word = len(picture.signs), 0
    for character, letter_box in zip(text, boxes, strict=True):
        if letter_box is None:
            word += 1
            continue
        corners = [(x + u, y + v) for u, v in mapped(matrix, corner_points(letter_box))]
        picture.letters.append(Letter(character, corners, line, word))
    if not picture.signs:
        picture.cap_height = height / image.height
    picture.signs.append(text)
    picture.boards.append(has_board)
    return True


# --- Whole pictures ---


def finished(rng: random.Random, picture: Picture, view_size: int) -> Picture:
    """With slight blur and noise, as a camera has them; `view_size` is what the picture will be reduced to."""
    scale = max(1.0, min(picture.image.size) / view_size)
    if rng.random() < 0.4:
        picture.image = picture.image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7) * scale))
    if rng.random() < 0.4 and picture.image.width * picture.image.height < 1_000_000:
        pixels = np.asarray(picture.image, np.int16)
        grain = np.random.default_rng(rng.getrandbits(32)).integers(-12, 13, pixels.shape, np.int16)
        picture.image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
    return picture


def random_size(rng: random.Random, shortest: int, longest: int) -> tuple[int, int]:
    """Width and height from `shortest` to `longest`, at an aspect ratio from 1:2 to 2:1."""
    ratio = 2 ** rng.uniform(-1, 1)
    side = math.exp(rng.uniform(math.log(shortest * max(ratio, 1 / ratio) ** 0.5), math.log(longest / 2**0.5)))
    size = round(side * ratio**0.5), round(side / ratio**0.5)
    return tuple(min(longest, max(shortest, length)) for length in size)


def scene(
    rng: random.Random,
    held_out: bool = False,
    *,
    sizes: tuple[int, int] = (300, 2000),
    size: tuple[int, int] | None = None,
    cap_heights: tuple[float, float] = (0.02, 0.1),
    signs: int = 1,
    text: str | None = None,
    shapes: int | None = None,
    least_pixels: int = 0,
) -> Picture:
    """Shapes and signs on a background, of any size in `sizes` (shortest and longest side) or of one `size`.

    `cap_heights` are shares of the picture's height, drawn evenly by their logarithm; capitals have at least
    `least_pixels`. A sign too wide for its picture is drawn anew with another text and height.
    """
    width, height = size or random_size(rng, *sizes)
    least = max(cap_heights[0], least_pixels / height)
    cap_heights = least, max(least, cap_heights[1])
    picture, taken = empty_picture(rng, width, height, held_out), []
    while len(picture.signs) < signs:
        share = math.exp(rng.uniform(*map(math.log, cap_heights)))
        if not add_sign(rng, picture, text or words.sign_text(rng, held_out), share * height, held_out, taken):
            if picture.signs:
                break
            cap_heights = (cap_heights[0], max(cap_heights[0] * 1.01, cap_heights[1] * 0.98))
    add_shapes(rng, picture, rng.randint(0, 5) if shapes is None else shapes, taken)
    return finished(rng, picture, 672)


def page(
    rng: random.Random,
    held_out: bool = False,
    width: int = 224,
    height: int = 224,
    cap_heights: tuple[float, float] = (8, 44),
    is_plain: bool = False,
    view_size: int = 224,
) -> Picture:
    """Signs side by side and one below the other: many letters to learn from in one view.

    `cap_heights`: least and most of the capitals' height, in pixels of the picture when it is `view_size` pixels high;
    `is_plain`: dark on one bright colour.
    """
    picture, taken = empty_picture(rng, width, height, held_out), []
    paper = bright_colour(rng) if is_plain else None
    if is_plain:
        picture.image.paste(paper, (0, 0, width, height))
    cap = math.exp(rng.uniform(*map(math.log, cap_heights))) * height / view_size
    top = round(-rng.uniform(0, cap))
    while top < height - cap:
        left, bottom = round(-rng.uniform(0, 3 * cap)), top
        while left < width - cap:
            text = words.sign_text(rng, held_out)
            add_sign(rng, picture, text, cap * rng.uniform(0.8, 1.1), held_out, taken, (left, top), paper)
            left = taken[-1][2] + round(rng.uniform(0, 0.8) * cap)
            bottom = max(bottom, taken[-1][3])
        top = bottom + round(rng.uniform(-0.1, 0.3) * cap)
    return finished(rng, picture, view_size)
