"""Per-layer visualization of token pruning: which image patches each layer kept, merged or dropped, drawn from traces."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pruning.trace import PruneTrace

LEGEND = "in color: kept     teal: merged into another token     black: dropped"
INK, PAPER = (40, 44, 52), (255, 255, 255)
# No color of the synthetic shapes (red, green, blue, yellow, purple, white) may mean anything here.
TINT = np.array((0, 122, 128), np.float32)
_GAP, _LABEL = 6, 18  # pixels: between images, and under each for its label


class TokenState(enum.IntEnum):
    """What a layer left of a token that entered the tower."""

    DROPPED = 0
    MERGED = 1
    KEPT = 2


def token_states(trace: PruneTrace) -> Tensor:
    """The `TokenState` of every token that entered a tower, after each block.

    A token is merged once it shares a row with other tokens.

    Args:
        trace: The trace of one call of the tower.

    Returns:
        uint8 [blocks, total tokens that entered].
    """
    rows = []
    for depth, layer in enumerate(trace.layers):
        row = trace.provenance(depth)
        present = row >= 0
        tokens_in_row = torch.bincount(row[present], minlength=sum(layer.lengths))
        state = torch.where(tokens_in_row[row.clamp(min=0)] > 1, TokenState.MERGED, TokenState.KEPT)
        rows.append(torch.where(present, state, TokenState.DROPPED).to(torch.uint8))
    return torch.stack(rows)


def instance_states(trace: PruneTrace, instance: int) -> np.ndarray:
    """The `TokenState` of one instance's unprotected tokens, in their order; of an image, these are its patches.

    Args:
        trace: The trace of one call of the tower.
        instance: The image's or text's index in the traced batch.

    Returns:
        uint8 [blocks, unprotected tokens].
    """
    columns = (trace.input_tokens.layout.instance == instance) & trace.input_tokens.free
    return token_states(trace)[:, columns].cpu().numpy()


def grid(patches: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of an image's square patches.

    Args:
        patches: Number of patches.
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.

    Returns:
        Rows and columns; their product is `patches`.

    Raises:
        ValueError: If no grid of square patches has this number of patches.
    """
    rows = max(round((patches * height / width) ** 0.5), 1)
    if rows * (patches // rows) != patches:
        raise ValueError(f"{patches} patches do not tile an image of {width} x {height}: square patches are needed")
    return rows, patches // rows


def overlay(image: Image.Image, states: np.ndarray) -> Image.Image:
    """Draw an image with dropped patches almost black and merged patches teal.

    Args:
        image: The image that the patches tile.
        states: `TokenState` of each patch, [patches], row by row.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If the patches do not tile the image.
    """
    rows, columns = grid(len(states), *image.size)
    cells = Image.fromarray(states.reshape(rows, columns).astype(np.uint8))
    mask = np.asarray(cells.resize(image.size, Image.Resampling.NEAREST))[..., None]

    pixels = np.asarray(image.convert("RGB"), np.float32)
    gray = pixels.mean(-1, keepdims=True)
    dimmed = np.where(mask == TokenState.MERGED, 0.35 * gray + 0.45 * TINT, 0.13 * gray)
    return Image.fromarray(np.where(mask == TokenState.KEPT, pixels, dimmed).astype(np.uint8))


def layer_strip(image: Image.Image, trace: PruneTrace, instance: int, side: int = 128, across: int = 7) -> Image.Image:
    """Draw an image and, after each block of its tower, an overlay of what the block kept.

    Labels give the number of tokens that leave a block, class token included.

    Args:
        image: What the tower was given, of any size.
        trace: The trace of the image tower's call.
        instance: The image's index in the traced batch.
        side: Longer side of each drawn image, in pixels.
        across: Images in a row.

    Returns:
        An RGB image: the input and one overlay a block, row by row.

    Raises:
        ValueError: If the tower's patches do not tile the image.
    """
    scale = side / max(image.size)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    entered = trace.input_tokens.layout.lengths[instance]
    cells = [(image, f"input: {entered}")]
    for depth, states in enumerate(instance_states(trace, instance)):
        cells.append((overlay(image, states), f"layer {depth + 1}: {trace.lengths[depth][instance]}"))
    return contact_sheet(cells, across)


def record_strip(images: Sequence[Image.Image], trace: PruneTrace) -> Image.Image:
    """Draw the layer strips of all images of a record that was traced alone, one under another.

    Args:
        images: The record's images, in the order of the traced batch.
        trace: The trace of the image tower's call.

    Returns:
        An RGB image, without a legend.

    Raises:
        ValueError: If the tower's patches do not tile an image.
    """
    strips = [layer_strip(image, trace, instance) for instance, image in enumerate(images)]
    return stack_strips(strips, legend=False)


def stack_strips(strips: Sequence[Image.Image], titles: Sequence[str] = (), legend: bool = True) -> Image.Image:
    """Draw strips one under another, each below its title if it has one, and a legend at the end.

    Args:
        strips: Images of any size, at least one.
        titles: The titles of the first strips; an empty one is left out.
        legend: Whether to write what the colors mean.

    Returns:
        An RGB image.
    """
    titles = [*titles, *[""] * (len(strips) - len(titles))]
    lines = [*titles, LEGEND if legend else ""]
    width = max(*(strip.width for strip in strips), *(round(font(12).getlength(line)) + 2 * _GAP for line in lines))
    height = sum(strip.height for strip in strips) + _LABEL * sum(map(bool, lines))
    sheet = Image.new("RGB", (width, height), PAPER)

    pen, top = ImageDraw.Draw(sheet), 0
    for line, strip in zip(lines, [*strips, None], strict=True):
        if line:
            pen.text((_GAP, top + 3), line, INK, font(12))
            top += _LABEL
        if strip is not None:
            sheet.paste(strip, (0, top))
            top += strip.height
    return sheet


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font."""
    return ImageFont.load_default(size)


def contact_sheet(cells: Sequence[tuple[Image.Image, str]], across: int) -> Image.Image:
    """Draw images in rows, each above its label; those smaller than the largest stand in the middle of their place.

    Args:
        cells: Images and their labels, at least one.
        across: Images in a row.

    Returns:
        An RGB image.
    """
    width, height = (max(sizes) for sizes in zip(*(image.size for image, _ in cells), strict=True))
    columns, rows = min(across, len(cells)), -(-len(cells) // across)
    size = columns * (width + _GAP) + _GAP, rows * (height + _LABEL + _GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(cells):
        left = _GAP + index % across * (width + _GAP)
        top = index // across * (height + _LABEL + _GAP) + _GAP
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        pen.text((left + width / 2, top + height + 2), label, INK, font(12), anchor="ma")
    return sheet
