"""Losses of pruned training besides the task's own."""

from __future__ import annotations

import torch
from einops import reduce, repeat
from torch import Tensor

from ..core import precision

_EPS = 1e-10


def alignment(image: Tensor, text: Tensor, images: int = 1) -> Tensor:
    """MADTP's alignment loss (arXiv 2403.02991, section 3.2): 1 - cosine of the anchors' pooled tokens of two towers.

    Args:
        image: [groups * images, anchors, dim], `PruneTrace.aligned` of the image tower. A group is one or more consecutive
            images that k consecutive sentences describe.
        text: [groups * k, anchors, dim], `PruneTrace.aligned` of the text tower.
        images: the number of images of a group, which are averaged first. NLVR2 has 2.

    Returns:
        The mean over sentences and anchors, a scalar.

    Raises:
        ValueError: for batches that do not fit together.
    """
    groups = len(image) // images
    if len(image) % images or groups == 0 or len(text) % groups:
        raise ValueError(
            f"{len(text)} sentences cannot be aligned with {len(image)} images at {images} images a sentence"
        )
    image = reduce(image, "(groups images) anchors dim -> groups anchors dim", "mean", images=images)
    image = repeat(image, "groups anchors dim -> (groups k) anchors dim", k=len(text) // groups)
    return (1 - (_unit(image) * _unit(text)).sum(-1)).mean()


def _unit(x: Tensor) -> Tensor:
    x = precision.single(x)  # half overflows in the sum of squares, and has no 1e-10
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + _EPS)
