"""Guides by a text: the affinity of an image's tokens to the text that `vltprune.query` gives, or to their prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import precision, segments
from ...core.checks import is_traced
from ...core.tokens import PackedTokens
from ...registry import guides
from ..block_spec import BlockSpec
from .base import AlignmentGuide, BoundGuide, Guidance, TokenProjection, linear_map
from .query import Query, current_query

_EPS = 1e-6


class TextGuide(AlignmentGuide):
    """Base class of guides whose anchors are the text of each instance: the segments of `vltprune.query`.

    Towers of texts are compared with nothing: their affinities are zero.

    Args:
        specs: one BlockSpec per tower name.
        dim: the width of a query. None for that of the embeddings that the towers share (CLIP), else of the text tower, else of
            the tower itself.
        required: whether a tower is refused to run without a query. Otherwise all tokens are alike then.

    Attributes:
        query_dim: the width of a query.
        required: whether a query is.
        towers: the names of the towers whose tokens are compared with the query.

    Raises:
        ValueError: for a width below 1, and where a query is required and all towers are of texts.
    """

    queried: ClassVar[bool] = True

    def __init__(self, specs: Mapping[str, BlockSpec], dim: int | None, required: bool):
        super().__init__()
        if dim is not None and dim < 1:
            raise ValueError(f"{self._name}(dim={dim}) must be 1 or more: the width of the texts' embeddings")
        self.towers = tuple(tower for tower in specs if tower != "text")
        if required and not self.towers:
            raise ValueError(
                f"guide={self._name!r} compares images with a text, and this model has only a text tower: prune a model with "
                "an image tower, or choose another guide"
            )
        shared = [spec.embed_dim for spec in specs.values() if spec.embed_dim is not None]
        widths = [*shared, *(spec.dim for tower, spec in specs.items() if tower == "text")]
        self.query_dim = dim or (widths[0] if widths else next(iter(specs.values())).dim)
        self.required = required

    @property
    def _name(self) -> str:
        return guides.name_of(type(self)) or type(self).__name__

    @property
    def is_untrained(self) -> bool:
        """Always False: its anchors are the text."""
        return False

    def fit(self, mapped: Tensor, seed: int = 0) -> None:
        """Refuses, because its anchors are the text and cannot be set.

        Args:
            mapped: not read.
            seed: not read.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"guide={self._name!r} has no anchors to fit: they are the text that vltprune.query gives")

    def forward(self, tokens: PackedTokens, tower: str) -> Guidance:
        bound = self.bind(tower)
        check_batch(bound, tokens, tower)
        return bound(tokens)

    def read_query(self, tower: str) -> Query | None:
        """The query for one call of a tower.

        Args:
            tower: the tower's name.

        Returns:
            The query. None for a tower that is not compared with it, and where there is none and none is required.

        Raises:
            ValueError: for a query that is missing, and under torch.jit.trace and torch.export, which would keep this example's
                query for every other call.
        """
        query = current_query()
        if tower not in self.towers or (query is None and not self.required):
            return None
        if query is None:
            raise ValueError(
                f"the {tower} tower is pruned by guide={self._name!r}, which compares its tokens with a text, and no text is "
                "given: run it inside `with vltprune.query(embedding):`, where embedding [batch, dim] holds the text of each "
                f"image, such as model.encode_text(texts); dim is {self.query_dim}"
            )
        if query.project is None and (is_traced() or torch.compiler.is_exporting()):
            raise ValueError(
                f"guide={self._name!r}: a trace would keep this example's query for every other call; run the model without "
                "tracing or exporting it"
            )
        return query

    def of_own_width(self, query: Tensor) -> Tensor:
        """A query [batch, segments, dim] that the guide's own maps take. ValueError for another width."""
        if query.shape[-1] != self.query_dim:
            raise ValueError(
                f"the query is {query.shape[-1]} wide, and guide={self._name!r} of this model takes {self.query_dim}: prune it "
                f"with guide='{self._name}(dim={query.shape[-1]})'"
            )
        return query


def check_batch(guide: BoundGuide, tokens: PackedTokens, tower: str) -> None:
    """Checks that a guide has one text for each instance, where it has any.

    Args:
        guide: the guide, bound to a call of the tower.
        tokens: the tower's tokens.
        tower: the tower's name, for the error.

    Raises:
        ValueError: for another number of texts.
    """
    batch = tokens.layout.batch
    if guide.query is None or len(guide.query) == batch:
        return
    each, rest = divmod(batch, len(guide.query))
    hint = "" if rest or not each else f", such as embedding.repeat_interleave({each}, 0)"
    raise ValueError(
        f"the {tower} tower runs {batch} instances, and vltprune.query has texts for {len(guide.query)}: give one text to each "
        f"instance{hint}"
    )


@guides.register("text_query")
class TextQuery(TextGuide):
    """Projects a text into the image tower, where `Stat.FROM_QUERY` is its attention: TRIPS (arXiv 2403.07883).

    The affinity is the cosine of a token and each projected segment. `Stat.FROM_QUERY` is of the segments' mean. The
    projection, a linear layer for each tower, begins as the transpose of the tower's own projection to the texts' space,
    where the host knows it (CLIP). Elsewhere it begins as the identity between equal widths, else random.

    Args:
        specs: one BlockSpec per tower name.
        dim: the width of a query. None for that of the embeddings that the towers share (CLIP), else of the text tower, else of
            the tower itself.

    Raises:
        ValueError: for a width below 1, and for a model of texts alone.
    """

    def __init__(self, specs: Mapping[str, BlockSpec], dim: int | None = None):
        super().__init__(specs, dim, required=True)
        self.maps = nn.ModuleDict({tower: linear_map(self.query_dim, specs[tower].dim) for tower in self.towers})

    def gives_query(self, tower: str) -> bool:
        return tower in self.towers

    @torch.no_grad()
    def start_from(self, tower: str, projection: TokenProjection) -> None:
        if tower in self.towers and len(projection.weight) == self.query_dim:
            layer = self.maps[tower]
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(projection.weight.mT)
            layer.bias.zero_()

    def bind(self, tower: str) -> BoundGuide:
        query = self.read_query(tower)
        if query is None:
            return BoundGuide(_all_alike)
        text = self.of_own_width(query.embedding)
        projected = self.maps[tower](_like(text, self.maps[tower]))
        return BoundGuide(partial(_guidance, projected), text, projected.mean(1))


@guides.register("text_embedding")
class TextEmbedding(TextGuide):
    """Compares tokens with a text in the space of the text's embedding, by cosine: CDPruner (arXiv 2506.10967).

    A norm and a linear layer map tokens into that space. They begin as copies of the tower's own final norm and projection,
    where the host knows them (CLIP). Elsewhere the layer begins as the identity between equal widths, else random. The text of
    a prompt is compared with tokens as the language model reads both, behind its projector, and not by these layers.

    Args:
        specs: one BlockSpec per tower name.
        dim: the width of a query. None for that of the embeddings that the towers share (CLIP), else of the text tower, else of
            the tower itself.
        required: whether a tower is refused to run without a query. Otherwise all tokens are alike then.

    Raises:
        ValueError: for a width below 1, and, where a query is required, for a model of texts alone.
    """

    def __init__(self, specs: Mapping[str, BlockSpec], dim: int | None = None, required: bool = True):
        super().__init__(specs, dim, required)
        self.norms = nn.ModuleDict({tower: nn.LayerNorm(specs[tower].dim) for tower in self.towers})
        self.maps = nn.ModuleDict({tower: linear_map(specs[tower].dim, self.query_dim) for tower in self.towers})

    @torch.no_grad()
    def start_from(self, tower: str, projection: TokenProjection) -> None:
        if tower not in self.towers or len(projection.weight) != self.query_dim:
            return
        norm, layer = self.norms[tower], self.maps[tower]
        assert isinstance(norm, nn.LayerNorm) and isinstance(layer, nn.Linear)
        norm.eps = projection.norm.eps
        layer.bias.zero_()
        pairs = [(norm.weight, projection.norm.weight), (norm.bias, projection.norm.bias)]
        for own, given in [*pairs, (layer.weight, projection.weight), (layer.bias, projection.bias)]:
            if given is not None:
                own.copy_(given)

    def map(self, x: Tensor, tower: str) -> Tensor:
        return self.maps[tower](self.norms[tower](_like(x, self.maps[tower]))) if tower in self.towers else x

    def bind(self, tower: str) -> BoundGuide:
        query = self.read_query(tower)
        if query is None:
            return BoundGuide(_all_alike)
        project, text = query.project, query.embedding
        if project is None:
            text = self.of_own_width(text)
        relate = partial(self._guidance, text, project or partial(self.map, tower=tower), project is not None)
        return BoundGuide(relate, text, project=project)

    def _guidance(
        self, text: Tensor, project: Callable[[Tensor], Tensor], of_prompt: bool, tokens: PackedTokens
    ) -> Guidance:
        mapped = project(tokens.x)
        affinity = _cosines(mapped, text, tokens)
        return Guidance(affinity, tokens, map=lambda x: mapped, of_prompt=of_prompt)


def _guidance(query: Tensor, tokens: PackedTokens) -> Guidance:
    """Guidance by a query in the tower's own space, [batch, segments, dim of the tower]."""
    return Guidance(_cosines(tokens.x, query, tokens), tokens)


def _all_alike(tokens: PackedTokens) -> Guidance:
    """Guidance without a query: one anchor, to which no token is nearer than another."""
    return Guidance(precision.single(tokens.x.new_zeros(tokens.layout.total, 1)), tokens)


def _cosines(x: Tensor, query: Tensor, tokens: PackedTokens) -> Tensor:
    """[total, segments]: cosine of contents x [total, width] and each segment of their instance, [batch, segments, width]."""
    with precision.without_autocast(x.device):
        x = precision.single(x)
        x, query = (F.normalize(one, dim=-1, eps=_EPS) for one in (x, query.to(x.device, x.dtype)))
        # padded: a product for each instance would cost more than the padding
        return segments.unpad(segments.pad(x, tokens.layout) @ query.mT, tokens.layout)


def _like(x: Tensor, layer: nn.Module) -> Tensor:
    """x in the dtype and on the device of a layer's weights."""
    weight = next(layer.parameters())
    return x.to(weight.device, weight.dtype)
