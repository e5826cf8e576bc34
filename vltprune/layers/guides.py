"""What both towers agree on: an AlignmentGuide says how close a token is to anchors that image and text share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from .. import segments
from ..registry import guides
from ..tokens import PackedTokens
from .site import Site


@dataclass(frozen=True)
class Guidance:
    """How the tokens of one block relate to the anchors.

    affinity  [total, anchors]: raw logits, larger is closer
    mapped    tokens in the anchors' space, x [total, anchor dim]
    attend    "softmax" or "sparsemax": how logits become weights over the tokens of an instance
    """

    affinity: Tensor
    mapped: PackedTokens
    attend: Literal["softmax", "sparsemax"] = "softmax"

    def attention(self, temperature: float, dtype: torch.dtype | None = None) -> Tensor:
        """Weights over the unprotected tokens of each instance, one distribution per anchor: [total, anchors]."""
        normalise = segments.sparsemax if self.attend == "sparsemax" else segments.softmax
        return normalise(
            self.affinity.to(dtype or self.affinity.dtype) / temperature, self.mapped.layout, self.mapped.free
        )

    @cached_property
    def pooled(self) -> Tensor:
        """What each anchor gathered, [batch, anchors, anchor dim]; computed when first asked for.

        MADTP (arXiv 2403.02991), section 3.2: attention of the anchors over the tokens, scaled by sqrt(anchor dim).
        """
        weight = self.attention(self.mapped.x.shape[-1] ** 0.5)
        return segments.mix(weight, self.mapped.x, self.mapped.layout)


class AlignmentGuide(nn.Module, ABC):
    """Relates the tokens of every tower to the same anchors. One instance serves all towers of a model.

    Implementations take `sites`, one Site per tower name, and their own arguments.
    """

    @abstractmethod
    def forward(self, tokens: PackedTokens, tower: str) -> Guidance:
        """tokens: a block's input, x [total, dim of the tower] -> Guidance."""

    @property
    @abstractmethod
    def is_untrained(self) -> bool:
        """Whether the anchors are still the noise they were born as."""

    @abstractmethod
    def fit(self, mapped: Tensor, seed: int = 0) -> None:
        """Place the anchors among calibration tokens: mapped [tokens, anchor dim]."""

    def map(self, x: Tensor, tower: str) -> Tensor:
        """Tokens of a tower [total, dim] in the anchors' space [total, anchor dim]; by default unchanged."""
        return x


@guides.register("codebook")
class Codebook(AlignmentGuide):
    """MAG: learnable tokens that both modalities share (MADTP, arXiv 2403.02991, section 3.2).

    affinity = q T^T for tokens q and anchors T, unscaled. `project` puts a linear map of each tower in front, as the
    paper draws it and as towers of different widths need it (None: only then); without it the tokens are used as they
    are, as the reference does for BLIP. `attend` is "softmax" (the reference) or "sparsemax" (the paper).

    Arguments: anchors, how many shared tokens; dim, their width (None: the common width of the towers); project; attend.
    Raises ValueError for widths that differ without `project` and for arguments outside their range.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        anchors: int = 100,
        dim: int | None = None,
        project: bool | None = None,
        attend: Literal["softmax", "sparsemax"] = "softmax",
    ):
        super().__init__()
        if anchors < 1:
            raise ValueError(f"codebook needs anchors >= 1, got {anchors}")
        if attend not in ("softmax", "sparsemax"):
            raise ValueError(f"codebook(attend={attend!r}): write attend='softmax' or attend='sparsemax'")
        widths = {tower: site.dim for tower, site in sites.items()}
        width = dim or max(widths.values())
        fits = all(w == width for w in widths.values())
        if not fits and project is False:
            raise ValueError(
                f"codebook(project=False) cannot serve towers of width {widths} with dim {width}: use project=True"
            )

        self.attend: Literal["softmax", "sparsemax"] = attend
        self.anchors = nn.Parameter(torch.randn(anchors, width))
        self.maps = nn.ModuleDict({t: nn.Linear(w, width) for t, w in widths.items()} if project or not fits else {})
        self.register_buffer("birth", self.anchors.detach().double().sum())

    def map(self, x: Tensor, tower: str) -> Tensor:
        return self.maps[tower](x) if self.maps else x

    def forward(self, tokens: PackedTokens, tower: str) -> Guidance:
        mapped = tokens.with_x(self.map(tokens.x, tower))
        return Guidance(mapped.x @ self.anchors.t(), mapped, self.attend)

    @property
    def is_untrained(self) -> bool:
        return bool(self.anchors.detach().double().sum() == self.birth)

    @torch.no_grad()
    def fit(self, mapped: Tensor, seed: int = 0) -> None:
        """Anchors at the k-means centres of calibration tokens, mapped [tokens, anchor dim] (Lloyd, seeded, 20 rounds)."""
        if len(mapped) < len(self.anchors):
            raise ValueError(f"{len(self.anchors)} anchors need at least as many calibration tokens, got {len(mapped)}")
        self.anchors.copy_(_kmeans(mapped.float(), len(self.anchors), seed))


def _kmeans(points: Tensor, k: int, seed: int, rounds: int = 20) -> Tensor:
    """Centres [k, dim] of points [n, dim]; a centre that loses all its points is put on the worst served one."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:k].to(points.device)].clone()
    for _ in range(rounds):
        distance, nearest = torch.cdist(points, centres).min(1)
        counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().squeeze(1)
        centres[empty] = points[distance.topk(max(len(empty), 1)).indices[: len(empty)]]
    return centres
