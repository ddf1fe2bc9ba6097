"""A picture as a file's bytes: PNG, by Pillow, or SVG."""

import io
from collections.abc import Iterator
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from ckptfs.api.picture import COLOURS, WORDS, Kind, Picture, Row
from ckptfs.errors import CommandError
from ckptfs.migration.size import format_size
from ckptfs.namespace.status import printable

_CELL = 4
_LEFT, _TOP, _LINE, _MARGIN = 110, 12, 18, 16
_EVERY = 16
"""Rows between two addresses."""

_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)


class _Label(NamedTuple):
    x: int
    y: int
    text: str
    swatch: Kind | None = None


def png(picture: Picture) -> bytes:
    """The picture as PNG. Raises CommandError without Pillow."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise CommandError("PNG needs Pillow: pip install 'ckptfs[pictures]'; or name it .svg") from None
    image = Image.new("RGB", _size(picture), _BACKGROUND)
    for top, row in _placed(picture):
        cells = row.colours[np.newaxis].repeat(_CELL, axis=0).repeat(_CELL, axis=1)
        image.paste(Image.fromarray(cells), (_LEFT, top))
    pen = ImageDraw.Draw(image)
    for label in _labels(picture):
        if label.swatch is not None:
            pen.rectangle((label.x - 16, label.y, label.x - 6, label.y + 10), COLOURS[label.swatch])
        pen.text((label.x, label.y), label.text, _INK)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def svg(picture: Picture) -> bytes:
    """The picture as SVG: neighbours of one colour are one rectangle."""
    width, height = _size(picture)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" shape-rendering="crispEdges">',
        f'<rect width="{width}" height="{height}" fill="{_hex(_BACKGROUND)}"/>',
        *_rectangles(picture),
    ]
    for label in _labels(picture):
        if label.swatch is not None:
            fill = _hex(COLOURS[label.swatch])
            lines.append(f'<rect x="{label.x - 16}" y="{label.y}" width="10" height="10" fill="{fill}"/>')
        lines.append(f'<text x="{label.x}" y="{label.y + 10}" fill="{_hex(_INK)}">{escape(label.text)}</text>')
    return ("\n".join([*lines, "</svg>"]) + "\n").encode()


def _rectangles(picture: Picture) -> Iterator[str]:
    for top, row in _placed(picture):
        edges = np.flatnonzero((np.diff(row.colours.astype(np.int16), axis=0) != 0).any(axis=1)) + 1
        for start, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(row.colours)], strict=True):
            place = f'x="{_LEFT + start * _CELL}" y="{top}"'
            size = f'width="{(stop - start) * _CELL}" height="{_CELL}"'
            red, green, blue = row.colours[start].tolist()
            yield f'<rect {place} {size} fill="{_hex((red, green, blue))}"/>'


def _placed(picture: Picture) -> Iterator[tuple[int, Row]]:
    """Each row with its place from the top; before a part there is room for its name."""
    top = _TOP
    for row in picture.rows:
        top += 0 if row.name is None else _LINE + _MARGIN
        yield top, row
        top += _CELL


def _size(picture: Picture) -> tuple[int, int]:
    return _LEFT + picture.columns * _CELL + _MARGIN, _bottom(picture) + 3 * _LINE


def _bottom(picture: Picture) -> int:
    return max((top for top, _ in _placed(picture)), default=_TOP) + _CELL


def _labels(picture: Picture) -> Iterator[_Label]:
    yield _Label(_MARGIN, 8, picture.title)
    last = 0
    for top, row in _placed(picture):
        if row.name is not None:
            yield _Label(_LEFT, top - _LINE, printable(row.name))
        if row.name is not None or top - last >= _EVERY * _CELL:
            last = top
            yield _Label(_MARGIN, top - 4, f"{row.address:#x}")
    x, y = _LEFT + 16, _bottom(picture) + 10
    for kind, count in picture.kinds.items():
        text = f"{WORDS[kind]} {count}"
        yield _Label(x, y, text, kind)
        x += 40 + 7 * len(text)
    yield _Label(_LEFT, y + _LINE, f"a cell is {format_size(picture.cell_length)}")


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
