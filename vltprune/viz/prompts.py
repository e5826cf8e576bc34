"""Visualization of vision-language models: how far a language model read each visual token, over the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..pruning.trace import PruneTrace
from .kept_tokens import INK, PAPER, TINT, contact_sheet, font, grid, stack_strips
from .visual_reads import View, layers_read

_MARGIN, _LINE, _BOX = 8, 20, 12  # pixels: around text, from line to line, and of a key of the legend


def shaded(image: Image.Image, read: np.ndarray, depth: int) -> Image.Image:
    """Draw an image in color where a language model read it to the end, teal where its first layers did, else almost black.

    Args:
        image: The image that the visual tokens tile.
        read: How many layers read each visual token, [rows, columns], or [visual tokens] row by row; the more, the lighter.
        depth: How many layers there are.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If the visual tokens do not tile the image.
    """
    shape = read.shape if read.ndim == 2 else grid(len(read), *image.size)
    cells = Image.fromarray(read.reshape(shape).astype(np.uint8))
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
    images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]],
    traces: Sequence[PruneTrace],
    prompt: str | Sequence[str],
    answer: str | Sequence[str] = "",
    side: int = 288,
) -> Image.Image:
    """Draw what a pruned vision-language model read of its images, with the prompt above and the answer below.

    LLaVA-NeXT and LLaVA-OneVision, pruned behind the projector, put the tiles of an image together: give the image, which is
    drawn twice, as tiles and scaled down. Where an image is cut into tiles elsewhere, give the tiles, as `seen_images` does.

    Args:
        images: The prompt's images, in their order, as the model's processor crops them; of any size. Of a batch of prompts
            a list for each.
        traces: Of one call, as `collect` gives them.
        prompt: The prompt, as people read it; of a batch a list.
        answer: What the model said; none is left out. Of a batch a list.
        side: Longer side of each drawn image, in pixels.

    Returns:
        An RGB image, prompts one below the other.

    Raises:
        ValueError: If traces and images do not fit each other, if visual tokens do not tile an image, and for videos.

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
    views, depth = layers_read(traces)
    alone = isinstance(prompt, str)
    groups: Any = [images] if alone else images
    prompts = [prompt] if isinstance(prompt, str) else prompt
    answers = [answer] * len(prompts) if isinstance(answer, str) else answer
    if not len(groups) == len(prompts) == len(answers):
        raise ValueError(
            f"{len(prompts)} prompts with {len(groups)} lists of images and {len(answers)} answers: give one of each for every "
            "prompt"
        )
    given = sum(map(len, groups))
    if given != len(views):
        raise ValueError(
            f"{given} images are given, and the model saw {len(views)}: give these, the images of the call in order, and where "
            "it cuts them into tiles vltprune.viz.seen_images(inputs, processor)"
        )
    following = iter(views)
    drawn = []
    for group, asked, said in zip(groups, prompts, answers, strict=True):
        pairs = [(image, view) for image in group for view in next(following)]
        if pairs:
            sheet = contact_sheet([_cell(image, view, depth, side) for image, view in pairs], 4)
        else:
            sheet = Image.new("RGB", (2 * side, 1), PAPER)
        drawn.append(_with_text(sheet, asked, said, _keys([view.read for _, view in pairs], depth)))
    return drawn[0] if alone else stack_strips(drawn, legend=False)


def _cell(image: Image.Image, view: View, depth: int, side: int) -> tuple[Image.Image, str]:
    """A view of an image, and what to write below it."""
    scale, read = side / max(image.size), view.read
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    picture = shaded(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), read, depth)
    label = f"{int((read > 0).sum())} of {read.size} tokens enter, {int((read == depth).sum())} stay"
    return picture, f"{view.title}: {label}" if view.title else label


def seen_images(inputs: Mapping[str, Any], processor: Any) -> list[Image.Image]:
    """The images that a model sees: cropped, or cut into tiles, in the order of its visual tokens.

    Args:
        inputs: What a processor of transformers made of images and prompts.
        processor: The processor.

    Returns:
        The images of `pixel_values`; tiles of padding are left out.

    Raises:
        ValueError: For inputs without `pixel_values`, or with patches in their place, as Qwen-VL has them.
    """
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() not in (4, 5):
        found = "missing" if pixels is None else f"{list(pixels.shape)}, which are no images"
        raise ValueError(f"pixel_values are {found}: draw over the images that you gave the processor")
    if pixels.dim() == 5:
        pixels = pixels.flatten(0, 1)
        pixels = pixels[(pixels != 0).flatten(1).any(1)]
    prepared = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (prepared.image_mean, prepared.image_std))
    shown = (255 * (pixels.float().cpu() * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(one.numpy()) for one in shown]


def _keys(reads: Sequence[np.ndarray], depth: int) -> list[tuple[tuple[int, ...], str]]:
    """The legend: a color and what it means, for what there is."""
    unread = any((read == 0).any() for read in reads)
    keys: list[tuple[tuple[int, ...], str]] = [((22, 24, 28), "black: not read")] if unread else []
    layers = sorted({int(read) for each in reads for read in each.flat if 0 < read < depth})
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
