"""Images of kept tokens: which patches each layer kept, drawn from traces with Pillow."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pruning.trace import PruneTrace

LEGEND = "clear: kept     teal: merged into another token     black: dropped"
_INK, _PAPER = (40, 44, 52), (255, 255, 255)
# the demo draws in red, green, blue, yellow, purple and white: none of them may mean anything here
_TINT = np.array((0, 122, 128), np.float32)
_GAP, _LABEL = 6, 18  # pixels: between pictures, and under each for its label


class TokenState(enum.IntEnum):
    """What became of a token that entered the tower."""

    DROPPED = 0
    MERGED = 1
    KEPT = 2


def token_states(trace: PruneTrace) -> Tensor:
    """The TokenState of every token that entered, after each block: [depths, entered total] uint8.

    A token is merged once its contents live on in a row that it shares with others.
    """
    rows = []
    for depth, step in enumerate(trace.layers):
        owner = trace.provenance(depth)
        there = owner >= 0
        crowd = torch.bincount(owner[there], minlength=sum(step.lengths))
        fate = torch.where(crowd[owner.clamp(min=0)] > 1, TokenState.MERGED, TokenState.KEPT)
        rows.append(torch.where(there, fate, TokenState.DROPPED).to(torch.uint8))
    return torch.stack(rows)


def instance_states(trace: PruneTrace, instance: int) -> np.ndarray:
    """The fates of one instance's unprotected tokens, in their order (of an image: its patches): uint8 [depths, n]."""
    columns = (trace.input_tokens.layout.instance == instance) & trace.input_tokens.free
    return token_states(trace)[:, columns].cpu().numpy()


def grid(patches: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of an image's patches, told by the image's shape in pixels. ValueError where none fit."""
    rows = max(round((patches * height / width) ** 0.5), 1)
    if rows * (patches // rows) != patches:
        raise ValueError(f"{patches} patches do not tile an image of {width} x {height}: square patches are needed")
    return rows, patches // rows


def overlay(picture: Image.Image, fate: np.ndarray) -> Image.Image:
    """The picture with dropped patches almost black and merged ones teal: fate [patches], row by row."""
    rows, columns = grid(len(fate), *picture.size)
    cells = Image.fromarray(fate.reshape(rows, columns).astype(np.uint8))
    mask = np.asarray(cells.resize(picture.size, Image.Resampling.NEAREST))[..., None]

    pixels = np.asarray(picture.convert("RGB"), np.float32)
    grey = pixels.mean(-1, keepdims=True)
    dimmed = np.where(mask == TokenState.MERGED, 0.35 * grey + 0.45 * _TINT, 0.13 * grey)
    return Image.fromarray(np.where(mask == TokenState.KEPT, pixels, dimmed).astype(np.uint8))


def layer_strip(
    picture: Image.Image, trace: PruneTrace, instance: int, side: int = 128, across: int = 7
) -> Image.Image:
    """What an image tower kept of one image, block after block: the picture, then one overlay a block.

    picture: what the tower saw, of any size; instance: its place in the traced batch; side: the longer side of each
    picture in pixels; across: pictures in a row. Labels give the tokens that leave a block, class token included.
    """
    scale = side / max(picture.size)
    size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    picture = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    entered = trace.input_tokens.layout.lengths[instance]
    cells = [(picture, f"input: {entered}")]
    for depth, fate in enumerate(instance_states(trace, instance)):
        cells.append((overlay(picture, fate), f"layer {depth + 1}: {trace.lengths[depth][instance]}"))
    return _contact(cells, across)


def record_strip(pictures: Sequence[Image.Image], trace: PruneTrace) -> Image.Image:
    """What an image tower kept of a record that was traced alone: a film for each of its pictures, one above another."""
    return stack_strips([layer_strip(picture, trace, place) for place, picture in enumerate(pictures)], legend=False)


def stack_strips(films: Sequence[Image.Image], titles: Sequence[str] = (), legend: bool = True) -> Image.Image:
    """Films one under another, each under its title if it has one, and the legend: what `predict` and `prune` write."""
    titles = [*titles, *[""] * (len(films) - len(titles))]
    words = [*titles, LEGEND if legend else ""]
    width = max(*(film.width for film in films), *(round(font(12).getlength(line)) + 2 * _GAP for line in words))
    height = sum(film.height for film in films) + _LABEL * sum(map(bool, words))
    sheet = Image.new("RGB", (width, height), _PAPER)

    pen, top = ImageDraw.Draw(sheet), 0
    for line, film in zip(words, [*films, None], strict=True):
        if line:
            pen.text((_GAP, top + 3), line, _INK, font(12))
            top += _LABEL
        if film is not None:
            sheet.paste(film, (0, top))
            top += film.height
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def _contact(cells: Sequence[tuple[Image.Image, str]], across: int) -> Image.Image:
    """Pictures of one size with their labels, `across` in a row."""
    width, height = cells[0][0].size
    columns, rows = min(across, len(cells)), -(-len(cells) // across)
    size = columns * (width + _GAP) + _GAP, rows * (height + _LABEL + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (picture, label) in enumerate(cells):
        left = _GAP + place % across * (width + _GAP)
        top = place // across * (height + _LABEL + _GAP) + _GAP
        sheet.paste(picture, (left, top))
        pen.text((left + width / 2, top + height + 2), label, _INK, font(11), anchor="ma")
    return sheet
