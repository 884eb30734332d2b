"""The contact sheet: the original on top, one row per format, and beside each picture its amplified difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

AMPLIFICATION = 8

_MARGIN, _LABEL, _THUMB, _GAP, _BETWEEN = 36, 344, 96, 6, 30
_HEADER, _HEADING, _PITCH, _FOOTER = 128, 54, 108, 26
_BAR_FULL_DB = 60.0
_BACKGROUND, _PANEL, _LINE = (17, 19, 24), (30, 33, 41), (52, 57, 69)
_TEXT, _SOFT, _ACCENT = (238, 240, 245), (158, 166, 182), (96, 178, 255)
_GOOD, _FAIR, _POOR = (94, 205, 140), (236, 190, 84), (236, 110, 100)


@dataclass(frozen=True, slots=True)
class SheetRow:
    """group: the heading that it stands under; rows of one group are neighbours.

    pictures: float [C, 3, H, W] in [0, 1].
    """

    group: str
    name: str
    title: str
    facts: tuple[str, ...]
    output_snr_db: float
    pictures: Tensor


@dataclass(frozen=True, slots=True)
class Sheet:
    """title, subtitle: what is shown, and how it was sampled. columns: the pictures' names.

    original: pictures as above.
    """

    title: str
    subtitle: str
    columns: tuple[str, ...]
    original_facts: tuple[str, ...]
    original: Tensor
    rows: tuple[SheetRow, ...]


def sheet_size(columns: int, groups: int, rows: int) -> tuple[int, int]:
    """Pixels (width, height) of a sheet with these many picture columns, headings, and rows below the original."""
    strip = _strip_width(columns)
    return (
        2 * _MARGIN + _LABEL + strip + _BETWEEN + strip,
        _HEADER + _PITCH * (1 + rows) + _HEADING * groups + _FOOTER,
    )


def draw_sheet(sheet: Sheet) -> Image.Image:
    groups = [(heading, list(rows)) for heading, rows in groupby(sheet.rows, key=lambda row: row.group)]
    size = sheet_size(len(sheet.columns), len(groups), len(sheet.rows))
    image = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(image)
    pictures_x = _MARGIN + _LABEL
    differences_x = pictures_x + _strip_width(len(sheet.columns)) + _BETWEEN
    _draw_header(pen, sheet, pictures_x, differences_x)
    y = _HEADER
    _label(pen, y, "original", "bf16, not quantized", sheet.original_facts)
    _paste(image, sheet.original, pictures_x, y)
    _draw_legend(pen, differences_x, y, _strip_width(len(sheet.columns)))
    y += _PITCH
    for heading, rows in groups:
        pen.line([(_MARGIN, y + 8), (size[0] - _MARGIN, y + 8)], fill=_LINE)
        _write(pen, (_MARGIN, y + 18), heading, 17, _ACCENT, bold=True)
        y += _HEADING
        for row in rows:
            _label(pen, y, row.name, row.title, row.facts)
            _draw_bar(pen, y, row.output_snr_db)
            _paste(image, row.pictures, pictures_x, y)
            _paste(image, difference(sheet.original, row.pictures), differences_x, y)
            y += _PITCH
    return image


def difference(original: Tensor, pictures: Tensor) -> Tensor:
    """|pictures - original| * AMPLIFICATION, clipped to 1. Black where nothing changed."""
    return ((pictures - original).abs() * AMPLIFICATION).clamp(0, 1)


def _strip_width(columns: int) -> int:
    return columns * _THUMB + (columns - 1) * _GAP


def _columns(start: int, count: int) -> Iterator[int]:
    return iter(range(start, start + count * (_THUMB + _GAP), _THUMB + _GAP))


def _paste(image: Image.Image, pictures: Tensor, x: int, y: int) -> None:
    for left, picture in zip(_columns(x, len(pictures)), pictures, strict=True):
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        image.paste(Image.fromarray(pixels).resize((_THUMB, _THUMB), Image.Resampling.LANCZOS), (left, y))


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    bold: bool = False,
    anchor: str = "la",
) -> None:
    # Pillow's own font is on every machine; it has one weight, so bold is a hair of stroke.
    font = ImageFont.load_default(size)
    pen.text(at, text, fill=colour, font=font, anchor=anchor, stroke_width=0.35 if bold else 0, stroke_fill=colour)


def _draw_header(pen: ImageDraw.ImageDraw, sheet: Sheet, pictures_x: int, differences_x: int) -> None:
    _write(pen, (_MARGIN, 20), sheet.title, 27, _TEXT, bold=True)
    _write(pen, (_MARGIN, 56), sheet.subtitle, 15, _SOFT)
    for x, heading in (
        (pictures_x, "pictures"),
        (differences_x, f"difference from the original, {AMPLIFICATION} times"),
    ):
        _write(pen, (x, 84), heading, 15, _TEXT, bold=True)
        for left, name in zip(_columns(x, len(sheet.columns)), sheet.columns, strict=True):
            _write(pen, (left, 105), name, 13, _SOFT)


def _draw_legend(pen: ImageDraw.ImageDraw, x: int, y: int, width: int) -> None:
    pen.rounded_rectangle([(x, y), (x + width - 1, y + _THUMB - 1)], radius=6, fill=_PANEL)
    lines = (
        "Black: nothing changed. Same noise, same steps in every row.",
        "Output SNR: one step of the model, from the original's own latents.",
        "Picture PSNR: after all steps, where small errors add up or cancel.",
        "More dB are better; the bar is the output SNR.",
    )
    for i, line in enumerate(lines):
        _write(pen, (x + 14, y + 10 + 20 * i), line, 14, _SOFT)


def _label(pen: ImageDraw.ImageDraw, y: int, name: str, title: str, facts: Sequence[str]) -> None:
    _write(pen, (_MARGIN, y - 2), name, 18, _TEXT, bold=True)
    _write(pen, (_MARGIN, y + 23), title, 14, _SOFT)
    for i, fact in enumerate(facts):
        _write(pen, (_MARGIN, y + 42 + 20 * i), fact, 15, _TEXT)


def _draw_bar(pen: ImageDraw.ImageDraw, y: int, snr_db: float) -> None:
    """Full at 60 dB."""
    left, top, width = _MARGIN, y + _THUMB - 8, _LABEL - 34
    share = 1.0 if snr_db == math.inf else min(max(snr_db / _BAR_FULL_DB, 0.0), 1.0)
    colour = _GOOD if snr_db >= 35 else _FAIR if snr_db >= 20 else _POOR
    pen.rounded_rectangle([(left, top), (left + width, top + 6)], radius=3, fill=_PANEL)
    if share > 0:
        pen.rounded_rectangle([(left, top), (left + max(6, int(share * width)), top + 6)], radius=3, fill=colour)
