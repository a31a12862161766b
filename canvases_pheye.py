"""Canvases: how many crops an image is cut into, where on them it lies, and which view of which image is which.

A canvas is a grid of crops, [rows, columns]. With `canvases`, an image keeps its aspect ratio on the one that suits
its shape, with black around it (after FILA, arXiv 2412.08378); without, it is stretched onto k x k crops (Pheye, arXiv
2501.02584, section 3.1). All views of an image show the same canvas: the global view whole, each crop a cell of it.
Cells are counted column by column.

Shapes: B rows of a batch, I images of a row, V views of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers.image_processing_utils import select_best_resolution

Box = tuple[int, int, int, int]  # left, upper, right, lower


def choose_canvas(width: int, height: int, canvases: list[list[int]], view: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the canvas on which an image of this size keeps most of its pixels, and wastes least.

    view: height and width of a crop, in pixels.
    """
    sizes = [(rows * view[0], columns * view[1]) for rows, columns in canvases]
    chosen_height, chosen_width = select_best_resolution((height, width), sizes)
    return chosen_height // view[0], chosen_width // view[1]


def fit(width: int, height: int, canvas_width: int, canvas_height: int) -> Box:
    """Where an image lies on a canvas (in pixels): as large as it fits with its aspect ratio, in the middle."""
    if width * canvas_height > height * canvas_width:
        new_width, new_height = canvas_width, max(1, round(height * canvas_width / width))
    else:
        new_width, new_height = max(1, round(width * canvas_height / height)), canvas_height
    left, top = (canvas_width - new_width) // 2, (canvas_height - new_height) // 2
    return left, top, left + new_width, top + new_height


class Place(NamedTuple):
    """Where an image lies: its grid of crops, and the box in it (in pixels of the crops), None for all of it."""

    rows: int
    columns: int
    box: Box | None

    def shares(self, view: tuple[int, int]) -> tuple[float, float, float, float]:
        """The box in shares of the canvas, whose crops have this height and width: left, upper, right, lower."""
        if self.box is None:
            return 0.0, 0.0, 1.0, 1.0
        width, height = self.columns * view[1], self.rows * view[0]
        return tuple(edge / side for edge, side in zip(self.box, (width, height) * 2, strict=True))


def place_image(
    width: int, height: int, tiles_per_side: int, canvases: list[list[int]] | None, view: tuple[int, int]
) -> Place:
    """Where an image of this size lies: stretched onto k x k crops, or with its shape on one of the canvases.

    view: height and width of a crop, in pixels.
    """
    if canvases is None:
        return Place(tiles_per_side, tiles_per_side, None)
    rows, columns = choose_canvas(width, height, canvases, view)
    return Place(rows, columns, fit(width, height, columns * view[1], rows * view[0]))


def scale(box: Box, old: tuple[int, int], new: tuple[int, int]) -> Box:
    """A box on a canvas of the size `old` (width, height), on the same canvas at the size `new`; never empty."""
    edges = []
    for low, high, before, after in zip(box[:2], box[2:], old, new, strict=True):
        start = min(round(low * after / before), after - 1)
        edges.append((start, max(round(high * after / before), start + 1)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def cells(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row and column of each crop, in the crops' order."""
    return [(row, column) for column in range(columns) for row in range(rows)]


def crop_boxes(rows: int, columns: int, height: float, width: float) -> list[tuple[float, float, float, float]]:
    """Boxes (left, upper, right, lower) of the crops of a canvas whose cells have this height and width."""
    return [
        (column * width, row * height, (column + 1) * width, (row + 1) * height)
        for row, column in cells(rows, columns)
    ]


# --- Which view is which ---

# Columns of a view table.
IMAGE, VIEW, ROW, ROWS, COLUMN, COLUMNS = range(6)


def views_in(grid: Sequence[int]) -> int:
    """Views of an image with this grid of crops, the global one included; of no image (0, 0), none."""
    rows, columns = grid
    return 1 + rows * columns if rows else 0


def view_table(grids: list[list[list[int]]]) -> torch.Tensor:
    """What each view of a batch shows: the one place from which an index of a view is computed.

    Args:
        grids: (B, I, 2), rows and columns of each image's canvas; (0, 0) where there is no image.

    Returns:
        (B, V, 6) on the CPU, V the most views of any row: the image's number in its row, the view's in its image (0:
        the global view), row, rows, column and columns of what it shows (the global view: 0 of 1). All are -1 behind a
        row's last view.
    """
    rows = []
    for images in grids:
        found = []
        for image, (height, width) in enumerate(grid for grid in images if grid[0]):
            found.append((image, 0, 0, 1, 0, 1))
            places = enumerate(cells(height, width), start=1)
            found += [(image, view, row, height, column, width) for view, (row, column) in places]
        rows.append(found)
    table = torch.full((len(rows), max(map(len, rows), default=0), 6), -1)
    for number, found in enumerate(rows):
        if found:
            table[number, : len(found)] = torch.tensor(found)
    return table


class ImagePlace(NamedTuple):
    """An image of a batch."""

    row: int
    first_tile: int  # among the crops of its row
    rows: int
    columns: int


def images_in(table: torch.Tensor) -> list[ImagePlace]:
    """The images of a `view_table`, row by row."""
    found = []
    for row, views in enumerate(table.tolist()):
        starts = [place for place, view in enumerate(views) if view[VIEW] == 0]
        for number, first in enumerate(starts):
            crop = views[first + 1]
            found.append(ImagePlace(row, first - number, crop[ROWS], crop[COLUMNS]))
    return found
