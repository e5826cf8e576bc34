"""What both towers agree on: an AlignmentGuide says how close a token is to anchors that image and text share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import precision, segments
from ..core.tokens import PackedTokens
from ..registry import guides
from .block_spec import BlockSpec
from .printing import PrintedPart


@dataclass(frozen=True)
class Guidance:
    """How the tokens of one block relate to the anchors.

    affinity  [total, anchors]: raw logits, larger is closer; never in half precision
    tokens    that they are of, x [total, dim of the tower]
    attend    "softmax" or "sparsemax": how logits become weights over the tokens of an instance
    map       their way into the anchors' space, [total, dim] -> [total, anchor dim]; None where they are in it
    """

    affinity: Tensor
    tokens: PackedTokens
    attend: Literal["softmax", "sparsemax"] = "softmax"
    map: Callable[[Tensor], Tensor] | None = None

    def attention(self, temperature: float) -> Tensor:
        """Weights over the unprotected tokens of each instance, one distribution per anchor: [total, anchors]."""
        normalize = segments.sparsemax if self.attend == "sparsemax" else segments.softmax
        return normalize(self.affinity / temperature, self.tokens.layout, self.tokens.free)

    @cached_property
    def mapped(self) -> PackedTokens:
        """The tokens in the anchors' space, x [total, anchor dim]; computed when first asked for."""
        return self.tokens if self.map is None else self.tokens.with_x(self.map(self.tokens.x))

    @cached_property
    def pooled(self) -> Tensor:
        """What each anchor gathered, [batch, anchors, anchor dim]; computed when first asked for.

        MADTP (arXiv 2403.02991), section 3.2: attention of the anchors over the tokens, scaled by sqrt(anchor dim).
        """
        x = precision.single(self.mapped.x)
        with torch.autocast(x.device.type, enabled=False):
            return segments.weighted_sum(self.attention(x.shape[-1] ** 0.5), x, self.mapped.layout)


class AlignmentGuide(PrintedPart, ABC):
    """Relates the tokens of every tower to the same anchors. One instance serves all towers of a model.

    Implementations take `specs`, one BlockSpec per tower name, and their own arguments.
    """

    @abstractmethod
    def forward(self, tokens: PackedTokens, tower: str) -> Guidance:
        """tokens: a block's input, x [total, dim of the tower] -> Guidance."""

    def bind(self, tower: str) -> Callable[[PackedTokens], Guidance]:
        """`forward` for one tower and one call of it: what does not depend on the tokens may be computed here, once."""
        return partial(self, tower=tower)

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
    what shared anchors say of a token is learned by the maps, and hardly without them (docs/ablations.md). Between equal widths
    they begin as the identity, which is the reference, for BLIP; `project=False` leaves them out. A map costs little, for it
    is put into the anchors, once a call: (q W^T + b) T^T = q (T W)^T + T b. A map that somebody exchanged or wrapped (LoRA,
    quantization, hooks) is called instead. `attend` is "softmax" (the reference) or "sparsemax" (the paper).

    Arguments: anchors, how many shared tokens; dim, their width (None: the widest tower's); project; attend.
    Raises ValueError for widths that differ without `project` and for arguments outside their range.
    """

    def __init__(
        self,
        specs: Mapping[str, BlockSpec],
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
        widths = {tower: spec.dim for tower, spec in specs.items()}
        width = dim or max(widths.values())
        if not project and any(w != width for w in widths.values()):
            raise ValueError(
                f"codebook(project=False) cannot serve towers of width {widths} with dim {width}: use project=True"
            )

        self.attend: Literal["softmax", "sparsemax"] = attend
        self.anchors = nn.Parameter(_noise(anchors, width))
        self.maps = nn.ModuleDict({tower: _map(w, width) for tower, w in widths.items()} if project else {})
        self.register_buffer("birth", _fingerprint(self.anchors))

    def map(self, x: Tensor, tower: str) -> Tensor:
        return self.maps[tower](x) if self.maps else x

    def forward(self, tokens: PackedTokens, tower: str) -> Guidance:
        return self.bind(tower)(tokens)

    def bind(self, tower: str) -> Callable[[PackedTokens], Guidance]:
        layer = self.maps[tower] if self.maps else None
        if layer is not None and not _is_plain(layer):
            return partial(self._of_mapped, tower=tower)
        with torch.autocast(self.anchors.device.type, enabled=False):
            anchors, offset = precision.single(self.anchors), None
            if isinstance(layer, nn.Linear):
                offset = None if layer.bias is None else anchors @ precision.single(layer.bias)
                anchors = anchors @ precision.single(layer.weight)
        return partial(self._of_tokens, tower=tower, anchors=anchors, offset=offset)

    def _of_tokens(self, tokens: PackedTokens, tower: str, anchors: Tensor, offset: Tensor | None) -> Guidance:
        """Guidance by anchors that have the tower's map in them: anchors [anchors, dim of the tower], offset [anchors]."""
        with torch.autocast(tokens.x.device.type, enabled=False):
            affinity = F.linear(precision.single(tokens.x), anchors, offset)
        return Guidance(affinity, tokens, self.attend, partial(self.map, tower=tower) if self.maps else None)

    def _of_mapped(self, tokens: PackedTokens, tower: str) -> Guidance:
        """Guidance by tokens that went through the tower's map as it stands."""
        mapped = self.map(tokens.x, tower)
        with torch.autocast(tokens.x.device.type, enabled=False):
            affinity = F.linear(precision.single(mapped), precision.single(self.anchors))
        return Guidance(affinity, tokens, self.attend, lambda x: mapped)

    @property
    def is_untrained(self) -> bool:
        return self.anchors.is_meta or bool(_fingerprint(self.anchors) == self.birth)

    @torch.no_grad()
    def fit(self, mapped: Tensor, seed: int = 0) -> None:
        """Anchors at the k-means centers of calibration tokens, mapped [tokens, anchor dim] (Lloyd, seeded, 20 rounds)."""
        if len(mapped) < len(self.anchors):
            raise ValueError(f"{len(self.anchors)} anchors need at least as many calibration tokens, got {len(mapped)}")
        self.anchors.copy_(_kmeans(mapped.float(), len(self.anchors), seed))


def _map(dim: int, width: int) -> nn.Module:
    """A tower's way to the anchors; where nothing need change, it begins with changing nothing, and draws no numbers."""
    if dim != width:
        return nn.Linear(dim, width)
    layer = nn.utils.skip_init(nn.Linear, dim, width)
    assert isinstance(layer, nn.Linear)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _noise(anchors: int, width: int) -> Tensor:
    """[anchors, width]: normal noise in steps of 1/64 up to 4, which every floating-point type from bfloat16 on holds exactly.

    A model that is cast then has the anchors it was born with, and knows it.
    """
    return torch.randn(anchors, width).mul(64).round().clamp(-256, 256).div(64)


def _fingerprint(anchors: Tensor) -> Tensor:
    """int64 scalar: of the values, in whatever floating-point type; it stays as it is when a model is cast."""
    return anchors.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a linear map is its weight and bias, and nothing else: then it may be put into the anchors."""
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, Tensor):
        return False  # an adapter around it, a parametrization, or a weight that is quantized or sharded
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _kmeans(points: Tensor, k: int, seed: int, rounds: int = 20) -> Tensor:
    """Centres [k, dim] of points [n, dim]; a center that loses all its points is put on the worst served one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    centers = points[torch.randperm(len(points), generator=generator, device="cpu")[:k].to(points.device)].clone()
    for _ in range(rounds):
        distance, nearest = torch.cdist(points, centers).min(1)
        counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        centers = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().squeeze(1)
        centers[empty] = points[distance.topk(max(len(empty), 1)).indices[: len(empty)]]
    return centers
