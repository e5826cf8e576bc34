"""Multi-head attention over packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import segments
from .kernels import varlen
from .layout import Layout

# padded, an instance of up to so many logits costs less than a call of its own (cpu: measured; cuda: to be measured)
_SMALL = {"cpu": 2**12, "cuda": 2**22}


@dataclass(frozen=True)
class PairBias:
    """A relative position bias: added to the attention logits by the distance of original positions.

    Attributes:
        position: [total] int64, the original positions, never negative.
        distance_bias: maps distances [..., n, m] int64, the key's position minus the query's, to biases
            [..., heads or 1, n, m]. Minus infinity hides a key; at distance 0 the bias must be finite.
    """

    position: Tensor
    distance_bias: Callable[[Tensor], Tensor]

    def split(self, layout: Layout) -> list[PairBias]:
        """The bias of each instance alone."""
        return [replace(self, position=position) for position in self.position.split(layout.lengths)]

    def between(self, queries: Tensor, keys: Tensor, like: Tensor) -> Tensor:
        """The bias between each pair of a query and a key.

        Args:
            queries: [..., n] int64, the positions of the queries.
            keys: [..., m] int64, the positions of the keys.
            like: the tensor whose dtype the bias gets.

        Returns:
            The bias, [..., heads or 1, n, m].
        """
        return self.distance_bias(keys[..., None, :] - queries[..., None]).to(like.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    *,
    key_layout: Layout | None = None,
    causal: bool = False,
    key_bias: Tensor | None = None,
    pairs: PairBias | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head attention within each instance, without padding and without statistics.

    Args:
        q: queries, [total, heads, head_dim].
        k: keys, [key total, heads, head_dim].
        v: values, [key total, heads, head_dim].
        layout: the instances of the queries.
        scale: the factor of the dot products.
        key_layout: the same instances with their keys, for cross-attention. None for self-attention.
        causal: whether a token attends to itself and earlier tokens only.
        key_bias: [key total], added to all logits of each key, for soft masks and proportional attention.
        pairs: the relative position bias, in self-attention only.
        dropout: the dropout probability of the attention weights.

    Returns:
        The context of each query, [total, heads, head_dim].

    Raises:
        ValueError: for `pairs` with a `key_layout`.
    """
    if pairs is not None and key_layout is not None:
        raise ValueError("pairs are of one sequence and key_layout makes two: leave either of them out")
    keys = key_layout or layout
    is_plain = key_bias is None and pairs is None and not dropout
    if is_plain and varlen.applies(q, k, v, layout, keys, causal):
        return varlen.attend(q, k, v, layout, keys, scale, causal)

    # what pairs add is as large as the map, so that long instances, uniform or not, take turns
    if (layout.is_uniform and keys.is_uniform and pairs is None) or is_small(q, layout, keys):
        padded_q, padded_k, padded_v = by_head(q, layout), by_head(k, keys), by_head(v, keys)
        out = _sdpa(padded_q, padded_k, padded_v, scale, causal, padded_bias(q, keys, key_bias, pairs), dropout)
        return segments.unpad(out.transpose(1, 2), layout)

    biases = (own_bias(q, *own) for own in bias_per_instance(keys, key_bias, pairs))
    parts = zip(q.split(layout.lengths), k.split(keys.lengths), v.split(keys.lengths), biases, strict=True)
    out = [
        _sdpa(_one_by_head(one_q), _one_by_head(one_k), _one_by_head(one_v), scale, causal, bias, dropout)
        for one_q, one_k, one_v, bias in parts
    ]
    return torch.cat([one.squeeze(0).transpose(0, 1) for one in out])


def by_head(t: Tensor, layout: Layout) -> Tensor:
    """Pads and moves heads before tokens.

    Args:
        t: [total, heads, head_dim].
        layout: its instances.

    Returns:
        [batch, heads, longest, head_dim], zeros where there is no token.
    """
    return segments.pad(t, layout).transpose(1, 2)


def _one_by_head(t: Tensor) -> Tensor:
    """One instance, [n, heads, head_dim] -> [1, heads, n, head_dim]."""
    return t.transpose(0, 1).unsqueeze(0)


def is_small(q: Tensor, layout: Layout, keys: Layout) -> bool:
    return q.shape[1] * layout.longest * keys.longest <= _SMALL.get(q.device.type, 0)


def bias_per_instance(
    keys: Layout, key_bias: Tensor | None, pairs: PairBias | None
) -> Iterable[tuple[Tensor | None, PairBias | None]]:
    """What is added to the logits of one instance after the other.

    Args:
        keys: the instances of the keys.
        key_bias: [key total], as in `attend`.
        pairs: as in `attend`.

    Returns:
        The two biases of each instance.
    """
    biases = [None] * keys.batch if key_bias is None else key_bias.split(keys.lengths)
    return zip(biases, [None] * keys.batch if pairs is None else pairs.split(keys), strict=True)


def own_bias(
    q: Tensor, key_bias: Tensor | None, pairs: PairBias | None, rows: slice | Tensor = slice(None)
) -> Tensor | None:
    """What is added to some rows of the logits of one instance.

    Args:
        q: for its dtype.
        key_bias: [n] of the instance.
        pairs: of the instance.
        rows: the query rows.

    Returns:
        [1, heads or 1, rows or 1, n]; None if there is nothing to add.
    """
    bias = None if key_bias is None else key_bias.view(1, 1, 1, -1)
    if pairs is None:
        return bias
    apart = pairs.between(pairs.position[None, rows], pairs.position[None], q)
    return apart if bias is None else apart + bias


def padded_bias(q: Tensor, keys: Layout, key_bias: Tensor | None, pairs: PairBias | None) -> Tensor | None:
    """What is added to the logits of a padded batch.

    Args:
        q: for its dtype and device.
        keys: the instances of the keys.
        key_bias: [key total], as in `attend`.
        pairs: as in `attend`.

    Returns:
        [batch, heads or 1, longest or 1, longest], minus infinity where there is no key; None if there is nothing to add.
    """
    bias = None
    if not keys.is_uniform or key_bias is not None:
        bias = q.new_zeros(keys.total) if key_bias is None else key_bias
        bias = segments.pad(bias, keys, float("-inf"))[:, None, None]
    if pairs is None:
        return bias

    position = segments.pad(pairs.position, keys)
    if not keys.is_uniform:  # padding gets the position of the last token: a query without any key would give NaN
        position = torch.where(keys.valid, position, position.amax(1, keepdim=True))
    apart = pairs.between(position, position, q)
    return apart if bias is None else apart + bias


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None, dropout: float) -> Tensor:
    """[batch, heads, n, head_dim] each; SDPA takes a mask or `is_causal`, not both, so a bias absorbs the triangle."""
    if bias is not None and causal:
        bias = bias + _future(q.shape[2], k.shape[2], q)
        causal = False
    if bias is not None:
        bias = bias.to(q.dtype)
        if torch.compiler.is_exporting():  # which would ask whether a number of tokens that it does not know is 1
            bias = bias.expand(-1, -1, q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=scale)


def _future(rows: int, keys: int, like: Tensor) -> Tensor:
    """[rows, keys]: minus infinity where the query must not see the key."""
    return torch.full((rows, keys), float("-inf"), dtype=like.dtype, device=like.device).triu(1)
