"""What a language model read of the visual tokens of a call, and where each of them stands in an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.modality import is_of
from ..core.tokens import SOURCE
from ..layers.grid import COLUMN as GRID
from ..pruning.trace import PruneTrace


@dataclass(frozen=True)
class View:
    """Visual tokens that tile an image, and how many layers of the language model read each.

    Attributes:
        read: int64, [rows, columns], or [visual tokens] where only the image says how many rows they fill. 0 for a token that
            did not enter the language model.
        title: What of the image they show; empty where there is one view of it.
    """

    read: np.ndarray
    title: str = ""


def layers_read(traces: Sequence[PruneTrace]) -> tuple[list[tuple[View, ...]], int]:
    """How many layers of the language model read each visual token of a call.

    A token that others were merged into counts as it stands; those others were not read. Rows of an image that end a line
    are left out.

    Args:
        traces: Of one call, `forward` or `generate`, as `collect` gives them.

    Returns:
        The views of each image of the call, in order: one; two of an image whose tiles LLaVA-NeXT and LLaVA-OneVision put
        together, and scale down. Each tile is an image where they are not put together. And how many layers read a token that
        stayed to the end: 1 where the language model prunes nothing.

    Raises:
        ValueError: If the traces are of no image, of videos, or of several calls.
    """
    by_tower = {trace.tower: trace for trace in traces}
    if "image" not in by_tower:
        raise ValueError("there is no trace of an image tower: call a pruned model on images within vltprune.collect()")
    image, language = by_tower["image"], by_tower.get("language")
    if image.inputs[0] == "video" or _frames(image) > 1:
        raise ValueError("videos are not drawn: give frames of it to the model, as images")
    assert image.output_tokens is not None
    tokens = image.input_tokens
    kept = torch.isin(tokens.identity, image.output_tokens.identity)
    read, depth = kept.long(), 1
    if language is not None:
        read, depth = _read_inside(kept, tokens.free, language), len(language.layers)
    views = []
    for start, length in zip(tokens.layout.starts.tolist(), tokens.layout.lengths, strict=True):
        place = slice(start, start + length)
        grid = None if GRID not in tokens.columns else tokens.columns[GRID][place].cpu()
        views += _views(read[place].cpu().numpy(), tokens.free[place].cpu().numpy(), grid, image)
    return views, depth


def _frames(trace: PruneTrace) -> int:
    """The largest number of frames of what a tower of Qwen-VL was called with; 1 of other towers."""
    grids = [one for one in trace.inputs[1:] if isinstance(one, Tensor) and one.dim() == 2 and one.shape[1] == 3]
    return int(grids[0][:, 0].max()) if grids else 1


def _read_inside(kept: Tensor, free: Tensor, language: PruneTrace) -> Tensor:
    """[tokens of the image tower] int64: how many layers read each, of those that stayed in the tower."""
    tokens = language.input_tokens
    visual = is_of(tokens, "image")
    if SOURCE in tokens.columns:
        rows = tokens.columns[SOURCE][visual]
    else:
        rows, repeats = _in_order(kept, free, int(visual.sum()), tokens.layout.batch)
        visual &= tokens.layout.instance % repeats == 0
    there = tokens.identity[visual]
    counts, stays = torch.zeros_like(there), torch.ones_like(there, dtype=torch.bool)
    for layer in language.layers:
        former, stays = stays, torch.isin(there, layer.identity)
        # who leaves before a layer is not read by it
        counts += stays if any(step.place == "before" for step in layer.steps) else former
    return torch.zeros_like(kept, dtype=torch.int64).index_put((rows,), counts)


def _in_order(kept: Tensor, free: Tensor, number: int, prompts: int) -> tuple[Tensor, int]:
    """The tokens of the image tower that are the visual ones of prompts, in order, and how often beams repeat a prompt.

    ValueError for another number.
    """
    # under LLaVA's strategy "full" the class token is visual too
    for enters in (kept & free, kept):
        repeats, rest = divmod(number, max(int(enters.sum()), 1))
        if repeats and not rest and prompts % repeats == 0:
            return enters.nonzero().squeeze(1), repeats
    raise ValueError(
        f"the image tower gave {int((kept & free).sum())} visual tokens, and the prompts have {number}: collect the traces of "
        "one call"
    )


def _views(read: np.ndarray, free: np.ndarray, grid: Tensor | None, trace: PruneTrace) -> list[tuple[View, ...]]:
    """The views of the images of an instance."""
    first = int(free.argmax())
    ends = np.flatnonzero(~free[first:])
    shown = read[free]
    if len(ends):
        return [_of_lines(shown, ends)]
    if grid is None:
        return [(View(shown),)]
    height, width = (int(side) + 1 for side in grid[torch.from_numpy(free)].amax(0))
    pixels = trace.inputs[0]
    # square tiles, one below the other
    tiles = height // width if isinstance(pixels, Tensor) and pixels.dim() == 5 else 1
    if height * width != len(shown):
        return [(View(shown),)]
    return [(View(one),) for one in np.split(shown.reshape(height, width), tiles)]


def _of_lines(shown: np.ndarray, ends: np.ndarray) -> tuple[View, ...]:
    """The views of an image whose lines end with a newline: tiles put together, and behind them the image scaled down.

    Args:
        shown: [visual tokens], how many layers read each: of the image scaled down, then of lines.
        ends: Where newlines stand between them.
    """
    width = int(ends[1] - ends[0]) - 1 if len(ends) > 1 else 0
    overview = len(shown) - width * len(ends)
    side = round(overview**0.5)
    if side**2 != overview:
        return (View(shown),)
    whole = View(shown[:overview].reshape(side, side), "overview" if width else "")
    return (View(shown[overview:].reshape(-1, width), "tiles"), whole) if width else (whole,)
