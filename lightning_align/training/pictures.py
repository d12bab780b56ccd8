"""Pictures of matrices with labels, drawn with Pillow, which TensorBoard needs anyway."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GRID = (32, 32, 32), (255, 255, 255), (235, 235, 235)
LOW, HIGH = np.array((247, 251, 255)), np.array((8, 48, 107))
"""The colors of 0 and of the largest value."""
LONGEST = 16
"""Characters of a label."""


def heatmap(
    values: npt.NDArray[Any],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_axis: str,
    column_axis: str,
    title: str,
    size: int = 22,
) -> Image.Image:
    """Draw a matrix as colored cells, with a label for each row and column.

    Args:
        values: (R, C) values of 0 or more. The largest has the darkest color.
        rows: R labels, from top to bottom.
        columns: C labels, from left to right.
        row_axis: What the rows are.
        column_axis: What the columns are.
        title: The text above.
        size: The width and height of a cell, in pixels. Smaller if the picture would have more than 2,000 pixels.

    Returns:
        The picture.
    """
    assert values.shape == (len(rows), len(columns))
    size = max(10, min(size, 2000 // max(1, *values.shape)))
    font, small = ImageFont.load_default(14), ImageFont.load_default(max(8, min(13, size - 5)))
    names = [[visible(label) for label in labels] for labels in (rows, columns)]
    left = 34 + max((int(small.getlength(name)) for name in names[0]), default=0)
    bottom = 34 + max((int(small.getlength(name)) for name in names[1]), default=0)
    top, bar = 40, 90
    width = max(left + size * len(columns) + bar, int(font.getlength(title)) + 24, left + int(font.getlength(column_axis)) + 12)
    height = max(top + size * len(rows) + bottom, top + 40 + int(font.getlength(row_axis)))
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((10, 10), title, INK, font)
    largest = float(values.max(initial=0.0)) or 1.0
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            corner = (left + x * size, top + y * size)
            draw.rectangle((*corner, corner[0] + size - 1, corner[1] + size - 1), _color(value / largest), GRID)
    for y, name in enumerate(names[0]):
        draw.text((left - 6, top + (y + 0.5) * size), name, INK, small, anchor="rm")
    for x, name in enumerate(names[1]):
        _upright(image, name, (left + int((x + 0.5) * size), top + size * len(rows) + 6), small)
    draw.text((left, height - 20), column_axis, INK, font)
    _upright(image, row_axis, (14, top), font)
    _legend(draw, (left + size * len(columns) + 16, top), largest, small)
    return image


def visible(text: str) -> str:
    """Return a label in one line in which white space can be seen."""
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\N{MIDDLE DOT}")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _color(share: float) -> tuple[int, ...]:
    return tuple(int(part) for part in LOW + (HIGH - LOW) * max(0.0, min(1.0, share)))


def _upright(image: Image.Image, text: str, place: tuple[int, int], font: Any) -> None:
    """Draw text from bottom to top, with its end at the top of a place."""
    length = max(1, int(font.getlength(text)) + 2)
    strip = Image.new("RGB", (length, 20), PAPER)
    ImageDraw.Draw(strip).text((0, 10), text, INK, font, anchor="lm")
    turned = strip.rotate(90, expand=True)
    image.paste(turned, (place[0] - 10, place[1]))


def _legend(draw: ImageDraw.ImageDraw, place: tuple[int, int], largest: float, font: Any) -> None:
    x, y = place
    for i in range(60):
        draw.rectangle((x, y + i, x + 12, y + i), _color(1 - i / 59))
    draw.text((x + 18, y), f"{largest:.2g}", INK, font, anchor="lt")
    draw.text((x + 18, y + 59), "0", INK, font, anchor="lb")
