"""Visualization of vision-language models: how far a language model read each visual token, over the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..core.modality import is_of
from ..pruning.trace import PruneTrace
from .kept_tokens import INK, PAPER, TINT, contact_sheet, font, grid

_MARGIN, _LINE, _BOX = 8, 20, 12  # pixels: around text, from line to line, and of a key of the legend


def layers_read(traces: Sequence[PruneTrace]) -> tuple[list[np.ndarray], int]:
    """How many layers of the language model read each visual token of one prompt.

    A token that others were merged into counts as it stands; those others were not read.

    Args:
        traces: Of one call, `forward` or `generate`, on one prompt, as `collect` gives them.

    Returns:
        For each image int64 [visual tokens], in their order, 0 for a token that did not enter the language model. And how many
        layers read a token that stayed to the end: 1 where the language model prunes nothing.

    Raises:
        ValueError: If the traces are of several prompts, or of no image.
    """
    by_tower = {trace.tower: trace for trace in traces}
    if "image" not in by_tower:
        raise ValueError("there is no trace of an image tower: call a pruned model on images within vltprune.collect()")
    image, language = by_tower["image"], by_tower.get("language")
    assert image.output_tokens is not None
    entered, left = image.input_tokens, image.output_tokens
    reads = []
    for index in range(entered.layout.batch):
        patches = entered.position[(entered.layout.instance == index) & entered.free]
        reads.append(torch.isin(patches, left.position[left.layout.instance == index]).long().cpu().numpy())
    if language is None:
        return reads, 1

    tokens = language.input_tokens
    visual = tokens.position[(tokens.layout.instance == 0) & is_of(tokens, "image")]
    if sum(int(read.sum()) for read in reads) != len(visual):
        raise ValueError(
            f"{len(reads)} images gave other visual tokens than the prompt has, {len(visual)}: draw one prompt at a time"
        )
    counts, there = torch.zeros_like(visual), torch.ones_like(visual, dtype=torch.bool)
    for layer in language.layers:
        stays = torch.isin(visual, layer.position[layer.layout.instance == 0])
        # who leaves before a layer is not read by it
        counts += stays if any(step.place == "before" for step in layer.steps) else there
        there = stays
    number = iter(counts.tolist())
    return [np.array([next(number) if kept else 0 for kept in read]) for read in reads], len(language.layers)


def shaded(image: Image.Image, read: np.ndarray, depth: int) -> Image.Image:
    """Draw an image in color where a language model read it to the end, teal where its first layers did, else almost black.

    Args:
        image: The image that the visual tokens tile.
        read: [visual tokens], how many layers read each, row by row; the more, the lighter.
        depth: How many layers there are.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If the visual tokens do not tile the image.
    """
    cells = Image.fromarray(read.reshape(grid(len(read), *image.size)).astype(np.uint8))
    layers = np.asarray(cells.resize(image.size, Image.Resampling.NEAREST), np.float32)[..., None]
    pixels = np.asarray(image.convert("RGB"), np.float32)
    gray = pixels.mean(-1, keepdims=True)
    teal = 0.25 * gray + _tint(layers / depth)
    drawn = np.where(layers == 0, 0.13 * gray, np.where(layers < depth, teal, pixels))
    return Image.fromarray(drawn.clip(0, 255).astype(np.uint8))


def _tint(share: np.ndarray | float) -> np.ndarray:
    """What is added where a share of the layers read a token."""
    return (0.2 + 0.9 * share) * TINT


def draw_prompt(
    images: Sequence[Image.Image], traces: Sequence[PruneTrace], prompt: str, answer: str = "", side: int = 288
) -> Image.Image:
    """Draw what a pruned vision-language model read of its images, with the prompt above and the answer below.

    Args:
        images: The prompt's images, in their order, as the model's processor crops them; of any size.
        traces: Of one call on one prompt, as `collect` gives them.
        prompt: The prompt, as people read it.
        answer: What the model said; none is left out.
        side: Longer side of each drawn image, in pixels.

    Returns:
        An RGB image.

    Raises:
        ValueError: If traces and images do not fit each other, or if visual tokens do not tile an image: those of several tiles
            of an image do not.

    Example:
        >>> import vltprune as vp
        >>> from PIL import Image
        >>> from vltprune.data import SyntheticPairs
        >>> from vltprune.data.llava import statement_inputs
        >>> from vltprune.viz import draw_prompt
        >>> model = vp.prune(vp.create_model("llava_tiny"), "divprune", keep="count(16)")
        >>> pair = SyntheticPairs("test", 1)[0]
        >>> with vp.collect() as traces:
        ...     said = model.generate(**statement_inputs([pair.images], pair.sentences[0]), max_new_tokens=2)
        >>> draw_prompt([Image.fromarray(image) for image in pair.images], traces, pair.sentences[0]).size
        (594, 360)
    """
    reads, depth = layers_read(traces)
    if len(images) != len(reads):
        raise ValueError(f"{len(images)} images are given, and the traces are of {len(reads)}: give those of the call")
    cells = []
    for image, read in zip(images, reads, strict=True):
        scale = side / max(image.size)
        size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
        picture = shaded(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), read, depth)
        cells.append(
            (picture, f"{int((read > 0).sum())} of {len(read)} tokens enter, {int((read == depth).sum())} stay")
        )
    sheet = contact_sheet(cells, 4)
    return _with_text(sheet, prompt, answer, _keys(reads, depth))


def _keys(reads: Sequence[np.ndarray], depth: int) -> list[tuple[tuple[int, ...], str]]:
    """The legend: a color and what it means, for what there is."""
    unread = any((read == 0).any() for read in reads)
    keys: list[tuple[tuple[int, ...], str]] = [((22, 24, 28), "black: not read")] if unread else []
    layers = sorted({int(read) for each in reads for read in each if 0 < read < depth})
    for layer in layers:
        color = (0.25 * 128 + _tint(layer / depth)).astype(int).clip(0, 255)
        keys.append((tuple(color.tolist()), f"{'teal: ' if layer == layers[0] else ''}left behind layer {layer}"))
    return [*keys, ((154, 167, 181), "in color: read to the end")]


def _with_text(
    sheet: Image.Image, prompt: str, answer: str, keys: Sequence[tuple[tuple[int, ...], str]]
) -> Image.Image:
    """The sheet with the prompt above, and answer and legend below."""
    width = sheet.width
    above, below = (_wrapped(text, width - 2 * _MARGIN) for text in (prompt, answer and f"answer: {answer}"))
    legend = [*_rows(keys, width)]
    height = sheet.height + _LINE * (len(above) + len(below) + len(legend)) + _MARGIN
    picture = Image.new("RGB", (width, height), PAPER)
    pen, top = ImageDraw.Draw(picture), _MARGIN // 2
    for line in above:
        pen.text((_MARGIN, top), line, INK, font(14))
        top += _LINE
    picture.paste(sheet, (0, top))
    top += sheet.height
    for line in below:
        pen.text((_MARGIN, top), line, INK, font(14))
        top += _LINE
    for row in legend:
        for left, color, meaning in row:
            pen.rectangle((left, top + 2, left + _BOX, top + 2 + _BOX), color)
            pen.text((left + _BOX + 5, top + 1), meaning, INK, font(12))
        top += _LINE
    return picture


def _rows(keys: Sequence[tuple[tuple[int, ...], str]], width: int) -> Iterator[list[tuple[int, tuple[int, ...], str]]]:
    """The keys of a legend with the place of each, line by line."""
    row, left = [], _MARGIN
    for color, meaning in keys:
        needed = _BOX + 5 + round(font(12).getlength(meaning)) + 2 * _MARGIN
        if row and left + needed > width:
            yield row
            row, left = [], _MARGIN
        row.append((left, color, meaning))
        left += needed
    yield row


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines of a width in pixels; none for no text."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(14).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
