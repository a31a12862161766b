"""Pictures of Pheye-nano: everything in them is where it is said to be."""

import random

import numpy as np
import pytest
from PIL import Image

from pheye.nano.drawing import fonts, pictures

pytestmark = pytest.mark.once


def any_font() -> str:
    return next(iter(fonts.families(True).values()))[0]


@pytest.mark.parametrize("seed", range(5))
def test_letters_lie_in_their_boxes(seed):
    mask, boxes, height = pictures.letter_mask(random.Random(seed), "HOUND BED", any_font(), 40, pictures.MARGINS)
    assert abs(height - 40) <= 2
    ink = np.asarray(mask) > 128
    outside = ink.copy()
    for character, box in zip("HOUND BED", boxes, strict=True):
        assert (box is None) == (character == " ")
        if box:
            left, top, right, bottom = (round(edge) for edge in box)
            assert ink[top:bottom, left:right].any()
            outside[top - 2 : bottom + 2, left - 1 : right + 1] = False
    assert outside.sum() < 0.01 * ink.sum()


def test_homography_maps_the_corners_and_the_warp_follows_it():
    source = pictures.corner_points((0, 0, 60, 40))
    target = [(5.0, 3.0), (70.0, 9.0), (64.0, 50.0), (2.0, 44.0)]
    matrix = pictures.homography(source, target)
    assert np.allclose(pictures.mapped(matrix, source), target)
    dot = Image.new("L", (60, 40))
    dot.paste(255, (19, 9, 22, 12))  # around (20.5, 10.5)
    inverse = np.linalg.inv(matrix)
    data = tuple((inverse / inverse[2, 2]).flatten()[:8])
    warped = np.asarray(dot.transform((80, 60), Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR), float)
    y, x = np.mgrid[:60, :80] + 0.5
    centre = (warped * x).sum() / warped.sum(), (warped * y).sum() / warped.sum()
    assert centre == pytest.approx(pictures.mapped(matrix, [(20.5, 10.5)])[0], abs=0.3)


def test_a_picture_is_a_function_of_its_seed_and_within_its_ranges():
    for seed in range(6):
        one, same = (
            pictures.scene(random.Random(seed), True, sizes=(300, 700), cap_heights=(0.025, 0.06)) for _ in range(2)
        )
        assert one.image.tobytes() == same.image.tobytes() and one.letters == same.letters
        width, height = one.image.size
        assert min(width, height) >= 300 and max(width, height) <= 700 and 0.49 <= width / height <= 2.05
        assert 0.02 < one.cap_height < 0.07  # rounded to whole pixels
        assert len(one.signs) == 1
        assert "".join(letter.character for letter in one.letters) == one.signs[0].replace(" ", "")
        for letter in one.letters:
            assert all(-2 <= x <= width + 2 and -2 <= y <= height + 2 for x, y in letter.corners)


def test_letters_have_the_pixels_that_one_asks_for():
    options = {"sizes": (300, 360), "cap_heights": (0.012, 0.03)}
    plain, clear = (
        [pictures.scene(random.Random(seed), True, **options, least_pixels=least) for seed in range(8)]
        for least in (0, 7)
    )
    assert min(round(drawn.cap_height * drawn.image.height) for drawn in plain) < 7
    assert min(round(drawn.cap_height * drawn.image.height) for drawn in clear) >= 7


def test_a_page_is_as_sharp_as_the_view_that_will_show_it(monkeypatch):
    blurs = []
    monkeypatch.setattr(pictures.ImageFilter, "GaussianBlur", lambda radius: blurs.append(radius))
    monkeypatch.setattr(Image.Image, "filter", lambda image, _: image)
    for view_size in (224, 672):
        for seed in range(12):
            caps = (0.2 * view_size, 0.3 * view_size)
            pictures.page(random.Random(seed), True, 896, 896, caps, view_size=view_size)
    coarse, fine = blurs[: len(blurs) // 2], blurs[len(blurs) // 2 :]
    assert coarse == pytest.approx([3 * radius for radius in fine])


def test_shapes_have_their_colour_where_they_are_said_to_be():
    rng = random.Random(1)
    for _ in range(4):
        picture = pictures.Picture(Image.new("RGB", (400, 300), (120, 120, 120)))
        pictures.add_shapes(rng, picture, 5, [])
        assert picture.shapes
        for shape in picture.shapes:
            pixel = picture.image.getpixel(tuple(round(place) for place in shape.centre))
            assert max(abs(a - b) for a, b in zip(pixel, pictures.COLOURS[shape.colour], strict=True)) <= 12


def test_the_background_is_named():
    names = set()
    for seed in range(20):
        picture = pictures.empty_picture(random.Random(seed), 60, 40, False)
        names.add(picture.background)
        assert (len(picture.image.getcolors(60 * 40)) == 1) == (picture.background == "plain")
    assert names == {"plain", "gradient", "noise", "texture", "photograph"}


def test_it_is_known_which_signs_have_a_board():
    rng, grey, boards = random.Random(3), (120, 120, 120), []
    for _ in range(12):
        picture = pictures.Picture(Image.new("RGB", (600, 300), grey))
        taken = []
        assert pictures.add_sign(rng, picture, "HOUND", 40, True, taken)
        left, top, _, bottom = taken[0]
        is_grey = picture.image.getpixel((left + 9, (top + bottom) // 2)) == grey
        assert is_grey == (not picture.boards[0])
        boards += picture.boards
    assert set(boards) == {True, False}
