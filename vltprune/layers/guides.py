"""What both towers agree on: an AlignmentGuide says how close a token is to anchors that image and text share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

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
    tokens    that they are of, x [total, dim of the tower]
    attend    "softmax" or "sparsemax": how logits become weights over the tokens of an instance
    map       their way into the anchors' space, [total, dim] -> [total, anchor dim]; None where they are in it
    """

    affinity: Tensor
    tokens: PackedTokens
    attend: Literal["softmax", "sparsemax"] = "softmax"
    map: Callable[[Tensor], Tensor] | None = None

    def attention(self, temperature: float, dtype: torch.dtype | None = None) -> Tensor:
        """Weights over the unprotected tokens of each instance, one distribution per anchor: [total, anchors]."""
        normalise = segments.sparsemax if self.attend == "sparsemax" else segments.softmax
        return normalise(
            self.affinity.to(dtype or self.affinity.dtype) / temperature, self.tokens.layout, self.tokens.free
        )

    @cached_property
    def mapped(self) -> PackedTokens:
        """The tokens in the anchors' space, x [total, anchor dim]; computed when first asked for."""
        return self.tokens if self.map is None else self.tokens.with_x(self.map(self.tokens.x))

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

    affinity = q T^T for tokens q and anchors T, unscaled. In front stands a linear map of each tower, as the paper draws it:
    what shared anchors say of a token is learnt by the maps, and hardly without them (docs/ablations.md). Between equal widths
    they begin as the identity, which is the reference, for BLIP; `project=False` leaves them out. In evaluation a map costs
    nothing, for it is put into the anchors. `attend` is "softmax" (the reference) or "sparsemax" (the paper).

    Arguments: anchors, how many shared tokens; dim, their width (None: the widest tower's); project; attend.
    Raises ValueError for widths that differ without `project` and for arguments outside their range.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        anchors: int = 100,
        dim: int | None = None,
        project: bool = True,
        attend: Literal["softmax", "sparsemax"] = "softmax",
    ):
        super().__init__()
        if anchors < 1:
            raise ValueError(f"codebook needs anchors >= 1, got {anchors}")
        if attend not in ("softmax", "sparsemax"):
            raise ValueError(f"codebook(attend={attend!r}): write attend='softmax' or attend='sparsemax'")
        widths = {tower: site.dim for tower, site in sites.items()}
        width = dim or max(widths.values())
        if not project and any(w != width for w in widths.values()):
            raise ValueError(
                f"codebook(project=False) cannot serve towers of width {widths} with dim {width}: use project=True"
            )

        self.attend: Literal["softmax", "sparsemax"] = attend
        self.anchors = nn.Parameter(torch.randn(anchors, width))
        self.maps = nn.ModuleDict({tower: _map(w, width) for tower, w in widths.items()} if project else {})
        self.register_buffer("birth", self.anchors.detach().double().sum())
        self._met: dict[str, tuple[Any, tuple[Tensor, Tensor]]] = {}

    def map(self, x: Tensor, tower: str) -> Tensor:
        return self.maps[tower](x) if self.maps else x

    def forward(self, tokens: PackedTokens, tower: str) -> Guidance:
        if not self.maps:
            return Guidance(tokens.x @ self.anchors.t(), tokens, self.attend)
        anchors, offset = self._as_met_by(tower)
        affinity = torch.addmm(offset, tokens.x, anchors.t())
        return Guidance(affinity, tokens, self.attend, partial(self.map, tower=tower))

    def train(self, mode: bool = True) -> Codebook:
        if mode:
            self._met.clear()
        return super().train(mode)

    def _as_met_by(self, tower: str) -> tuple[Tensor, Tensor]:
        """The anchors T behind a tower's map, [anchors, dim of the tower], and what is added to the affinity, [anchors]:
        (q W^T + b) T^T = q (T W)^T + T b. In evaluation they are computed anew only when the weights are others."""
        layer: Any = self.maps[tower]
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.anchors.is_inference():
            return self.anchors @ layer.weight, self.anchors @ layer.bias
        state = [(w.data_ptr(), w._version, w.dtype) for w in (self.anchors, layer.weight, layer.bias)]
        kept = self._met.get(tower)
        if kept is None or kept[0] != state:
            with torch.autocast(self.anchors.device.type, enabled=False):  # whoever comes next may not be under it
                kept = self._met[tower] = state, (self.anchors @ layer.weight, self.anchors @ layer.bias)
        return kept[1]

    @property
    def is_untrained(self) -> bool:
        return bool(self.anchors.detach().double().sum() == self.birth)

    @torch.no_grad()
    def fit(self, mapped: Tensor, seed: int = 0) -> None:
        """Anchors at the k-means centres of calibration tokens, mapped [tokens, anchor dim] (Lloyd, seeded, 20 rounds)."""
        if len(mapped) < len(self.anchors):
            raise ValueError(f"{len(self.anchors)} anchors need at least as many calibration tokens, got {len(mapped)}")
        self.anchors.copy_(_kmeans(mapped.float(), len(self.anchors), seed))


def _map(dim: int, width: int) -> nn.Module:
    """A tower's way to the anchors; where nothing need change, it begins with changing nothing, and draws no numbers."""
    if dim != width:
        return nn.Linear(dim, width)
    layer: Any = nn.utils.skip_init(nn.Linear, dim, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


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
