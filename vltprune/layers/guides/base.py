"""Alignment guides: the affinity of tokens to anchors that the image and text towers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import precision, segments
from ...core.tokens import PackedTokens
from ...registry import guides
from ...utils.lazy import lazy
from ..block_spec import BlockSpec
from ..printing import PrintedPart


@dataclass(frozen=True)
class Guidance:
    """The affinity of one block's tokens to the anchors.

    Attributes:
        affinity: [total, anchors], unscaled logits, larger is closer. In single precision at least.
        tokens: the tokens, x [total, dim of the tower].
        attend: "softmax" or "sparsemax", which turns logits into weights over the tokens of an instance.
        map: maps contents [total, dim of the tower] into the anchors' space [total, anchor dim]. None for the identity.
        of_prompt: whether the anchors are words as a language model embeds them, and tokens are compared with them as it reads
            both.
    """

    affinity: Tensor
    tokens: PackedTokens
    attend: Literal["softmax", "sparsemax"] = "softmax"
    map: Callable[[Tensor], Tensor] | None = None
    of_prompt: bool = False

    def attention(self, temperature: float, among: Tensor | None = None) -> Tensor:
        """Attention weights of each anchor over tokens of each instance.

        Args:
            temperature: the divisor of the logits, above 0.
            among: [total] bool, the tokens that take part. None for the unprotected ones.

        Returns:
            The weights, [total, anchors]; zero for all other tokens.
        """
        normalize = segments.sparsemax if self.attend == "sparsemax" else segments.softmax
        return normalize(self.affinity / temperature, self.tokens.layout, self.tokens.free if among is None else among)

    @lazy
    def mapped(self) -> PackedTokens:
        """The tokens in the anchors' space, x [total, anchor dim]; computed when it is first read."""
        return self.tokens if self.map is None else self.tokens.with_x(self.map(self.tokens.x))

    @lazy
    def pooled(self) -> Tensor:
        """The unprotected tokens, pooled: [batch, anchors, anchor dim]; computed when it is first read."""
        return self.pooled_among(None)

    def pooled_among(self, among: Tensor | None) -> Tensor:
        """Pools tokens by each anchor's attention: MADTP (arXiv 2403.02991), section 3.2, at the temperature sqrt(anchor dim).

        Args:
            among: [total] bool, the tokens to pool. None for the unprotected ones.

        Returns:
            The sums, [batch, anchors, anchor dim]; zero for an instance that has none of these tokens.
        """
        x = precision.single(self.mapped.x)
        with precision.without_autocast(x.device):
            return segments.weighted_sum(self.attention(x.shape[-1] ** 0.5, among), x, self.mapped.layout)


@dataclass(frozen=True)
class TokenProjection:
    """What a dense model makes of a tower's tokens behind its last block, to compare them with those of other towers (CLIP).

    Attributes:
        norm: the final norm.
        weight: the projection behind it, [embed_dim, dim of the tower].
        bias: [embed_dim]. None without one.
    """

    norm: nn.LayerNorm
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class BoundGuide:
    """A guide for one call of one tower.

    Attributes:
        relate: computes the guidance of a block's tokens.
        query: the text that the tokens are compared with, [batch, segments, dim]. None without one.
        text: the text in the tower's space, [batch, dim of the tower], for `Stat.FROM_QUERY`. None where it does not enter it.
        project: what maps contents of tokens into the query's space, where the guide itself does not, as `Query` has it.
    """

    relate: Callable[[PackedTokens], Guidance]
    query: Tensor | None = None
    text: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None

    def __call__(self, tokens: PackedTokens) -> Guidance:
        return self.relate(tokens)


class AlignmentGuide(PrintedPart, ABC):
    """Base class of guides: they relate the tokens of all towers of a model to the same anchors.

    Implementations take `specs`, one BlockSpec per tower name, and arguments of their own.

    Attributes:
        queried: whether the anchors are the text that `vltprune.query` gives, and not weights of the guide.
    """

    queried: ClassVar[bool] = False

    @abstractmethod
    def forward(self, tokens: PackedTokens, tower: str) -> Guidance:
        """Relates the tokens of one block to the anchors.

        Args:
            tokens: the block's input, x [total, dim of the tower].
            tower: the tower's name.

        Returns:
            The affinity of each token to each anchor.
        """

    def bind(self, tower: str) -> BoundGuide:
        """`forward` for one call of a tower. What does not depend on the tokens may be computed here, once for all blocks."""
        return BoundGuide(partial(self, tower=tower))

    def fold(self) -> None:
        """Computes once what depends on weights alone, for a model whose weights no longer change; by default nothing."""

    def gives_query(self, tower: str) -> bool:
        """Whether it gives a tower a text in the tower's own space, which `Stat.FROM_QUERY` needs."""
        return False

    def start_from(self, tower: str, projection: TokenProjection) -> None:
        """Initializes the guide from what maps a tower's tokens to embeddings; by default it does nothing.

        Args:
            tower: the tower's name.
            projection: the tower's final norm and projection.
        """

    @property
    @abstractmethod
    def is_untrained(self) -> bool:
        """Whether the anchors are still their random initialization."""

    @abstractmethod
    def fit(self, mapped: Tensor, seed: int = 0) -> None:
        """Sets the anchors from calibration tokens.

        Args:
            mapped: tokens in the anchors' space, [tokens, anchor dim].
            seed: of the random initialization.
        """

    def map(self, x: Tensor, tower: str) -> Tensor:
        """Maps contents of a tower into the anchors' space; by default the identity.

        Args:
            x: the contents, [total, dim of the tower].
            tower: the tower's name.

        Returns:
            The mapped contents, [total, anchor dim].
        """
        return x


@guides.register("codebook")
class Codebook(AlignmentGuide):
    """MADTP's multi-modality alignment guidance: learnable tokens that both modalities share (arXiv 2403.02991, section 3.2).

    affinity = q T^T for tokens q and anchors T, unscaled. A linear map of each tower precedes it, as in the paper. Between
    equal widths the maps are initialized as the identity, which is the reference code for BLIP.

    A map costs little. It is folded into the anchors once a call: (q W^T + b) T^T = q (T W)^T + T b. A map that was replaced or
    wrapped (LoRA, quantization, hooks) is called instead.

    Args:
        specs: one BlockSpec per tower name.
        anchors: the number of shared tokens.
        dim: their width. None for that of the widest tower.
        project: whether each tower has a linear map. What the anchors say is learned by the maps, and hardly without them.
        attend: "softmax" (the reference code) or "sparsemax" (the paper).

    Raises:
        ValueError: for widths that differ without `project`, and for arguments outside their range.
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
        self.maps = nn.ModuleDict({tower: linear_map(w, width) for tower, w in widths.items()} if project else {})
        self.register_buffer("birth", _fingerprint(self.anchors))
        self._folded: dict[str, tuple[Tensor, Tensor | None]] = {}

    def map(self, x: Tensor, tower: str) -> Tensor:
        return self.maps[tower](x) if self.maps else x

    def forward(self, tokens: PackedTokens, tower: str) -> Guidance:
        return self.bind(tower)(tokens)

    def bind(self, tower: str) -> BoundGuide:
        layer = self.maps[tower] if self.maps else None
        if layer is not None and not _is_plain(layer):
            return BoundGuide(partial(self._guidance_of_mapped, tower=tower))
        anchors, offset = self._folded.get(tower) or self._fold(layer)
        return BoundGuide(partial(self._guidance_of_tokens, tower=tower, anchors=anchors, offset=offset))

    @torch.no_grad()
    def fold(self) -> None:
        self._folded = {tower: self._fold(layer) for tower, layer in self.maps.items() if _is_plain(layer)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        self._folded = {}
        return super()._apply(fn, recurse)

    def _fold(self, layer: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """The anchors behind a plain map, [anchors, dim of the tower], and what its bias adds, [anchors]."""
        with precision.without_autocast(self.anchors.device):
            anchors, offset = precision.single(self.anchors), None
            if isinstance(layer, nn.Linear):
                offset = None if layer.bias is None else anchors @ precision.single(layer.bias)
                anchors = anchors @ precision.single(layer.weight)
        return anchors, offset

    def _guidance_of_tokens(self, tokens: PackedTokens, tower: str, anchors: Tensor, offset: Tensor | None) -> Guidance:
        """Guidance by anchors that the tower's map is folded into: anchors [anchors, dim of the tower], offset [anchors]."""
        with precision.without_autocast(tokens.x.device):
            affinity = F.linear(precision.single(tokens.x), anchors, offset)
        return Guidance(affinity, tokens, self.attend, partial(self.map, tower=tower) if self.maps else None)

    def _guidance_of_mapped(self, tokens: PackedTokens, tower: str) -> Guidance:
        """Guidance by calling the tower's map on the tokens."""
        mapped = self.map(tokens.x, tower)
        with precision.without_autocast(tokens.x.device):
            affinity = F.linear(precision.single(mapped), precision.single(self.anchors))
        return Guidance(affinity, tokens, self.attend, lambda x: mapped)

    @property
    def is_untrained(self) -> bool:
        return self.anchors.is_meta or bool(_fingerprint(self.anchors) == self.birth)

    @torch.no_grad()
    def fit(self, mapped: Tensor, seed: int = 0) -> None:
        """Sets the anchors to k-means centers of calibration tokens, by 20 of Lloyd's iterations.

        Args:
            mapped: tokens in the anchors' space, [tokens, anchor dim].
            seed: of the random initialization.

        Raises:
            ValueError: for fewer tokens than anchors.
        """
        if len(mapped) < len(self.anchors):
            raise ValueError(f"{len(self.anchors)} anchors need at least as many calibration tokens, got {len(mapped)}")
        self._folded = {}
        self.anchors.copy_(_kmeans(mapped.float(), len(self.anchors), seed))


def linear_map(dim: int, width: int) -> nn.Module:
    """Builds a linear layer. Between equal widths it begins as the identity, and draws no random numbers.

    Args:
        dim: the width of what it takes.
        width: the width of what it returns.

    Returns:
        The layer, [dim] -> [width].
    """
    if dim != width:
        return nn.Linear(dim, width)
    layer = nn.utils.skip_init(nn.Linear, dim, width)
    assert isinstance(layer, nn.Linear)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _noise(anchors: int, width: int) -> Tensor:
    """Normal noise in steps of 1/64 up to 4, [anchors, width], which bfloat16 and wider dtypes represent exactly.

    So `is_untrained` also holds for a model that was cast.
    """
    return torch.randn(anchors, width).mul(64).round().clamp(-256, 256).div(64)


def _fingerprint(anchors: Tensor) -> Tensor:
    """A checksum of the values, int64 scalar, which is the same in every floating-point dtype."""
    return anchors.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear map without hooks or adapters, so that it can be folded into the anchors."""
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, Tensor):
        # an adapter around it, a parametrization, or a weight that is quantized or sharded
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _kmeans(points: Tensor, k: int, seed: int, rounds: int = 20) -> Tensor:
    """k-means centers [k, dim] of points [n, dim]. A center without points moves to the point farthest from its own center."""
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
