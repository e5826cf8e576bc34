"""Multi-head attention over packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import segments
from .checks import is_traced
from .kernels import varlen
from .kernels.native import attention_kernel
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

    def over_heads(self) -> PairBias:
        """The mean over heads, for a single head as wide as all."""
        per_head = self.distance_bias
        return replace(self, distance_bias=lambda distance: per_head(distance).mean(-3, keepdim=True))

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


@dataclass(frozen=True)
class PairMask:
    """Which keys each query sees, by a table over the unpruned batch: for language models that look both ways in an image.

    It says all: attention with it is not `causal` besides.

    Attributes:
        position: [total] int64, instance * L + the original position, the row of each token in the unpruned batch.
        visible: [batch, L, L] bool, true where a query (row) sees a key (column).
    """

    position: Tensor
    visible: Tensor

    def split(self, layout: Layout) -> list[PairMask]:
        """The mask of each instance alone."""
        return [replace(self, position=position) for position in self.position.split(layout.lengths)]

    def over_heads(self) -> PairMask:
        """The mask of a single head as wide as all: the same."""
        return self

    def between(self, queries: Tensor, keys: Tensor, like: Tensor) -> Tensor:
        """What is added to the logits of each pair of a query and a key of one instance: 0, or minus infinity.

        Args:
            queries: [..., n] int64, the positions of the queries.
            keys: [..., m] int64, the positions of the keys.
            like: the tensor whose dtype the result gets.

        Returns:
            [..., 1, n, m].
        """
        length = self.visible.shape[-1]
        row, column = queries[..., None], keys[..., None, :] % length
        hidden = ~self.visible[row // length, row % length, column]
        return like.new_zeros(hidden.shape).masked_fill(hidden, float("-inf")).unsqueeze(-3)


Pairs = PairBias | PairMask


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
    pairs: Pairs | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
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
        pairs: the relative position bias or the mask of pairs, in self-attention only.
        dropout: the dropout probability of the attention weights.
        softcap: dot products x become softcap * tanh(x / softcap), before anything is added. None for x itself.

    Returns:
        The context of each query, [total, heads, head_dim].

    Raises:
        ValueError: for `pairs` with a `key_layout`.
    """
    if pairs is not None and key_layout is not None:
        raise ValueError("pairs are of one sequence and key_layout makes two: leave either of them out")
    keys = key_layout or layout
    is_plain = key_bias is None and pairs is None and not dropout and softcap is None
    if is_plain and varlen.applies(q, k, v, layout, keys, causal):
        return varlen.attend(q, k, v, layout, keys, scale, causal)
    is_own = pairs is None and not dropout and softcap is None and key_layout is None
    if is_own and (native := attention_kernel(q, k, v)) is not None:
        return native(q, k, v, layout.lengths, scale, key_bias=key_bias, causal=causal)[0]

    # what pairs add is as large as the map, so that long instances, uniform or not, take turns
    if (layout.is_uniform and keys.is_uniform and pairs is None) or is_small(q, layout, keys):
        padded_q, padded_k, padded_v = by_head(q, layout), by_head(k, keys), by_head(v, keys)
        bias = padded_bias(q, keys, key_bias, pairs)
        out = attend_by_head(padded_q, padded_k, padded_v, scale, causal, bias, dropout, softcap)
        return segments.unpad(out.transpose(1, 2), layout)

    biases = (own_bias(q, *own) for own in bias_per_instance(keys, key_bias, pairs))
    parts = zip(q.split(layout.lengths), k.split(keys.lengths), v.split(keys.lengths), biases, strict=True)
    out = [
        attend_by_head(
            _one_by_head(one_q), _one_by_head(one_k), _one_by_head(one_v), scale, causal, bias, dropout, softcap
        )
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
    keys: Layout, key_bias: Tensor | None, pairs: Pairs | None
) -> Iterable[tuple[Tensor | None, Pairs | None]]:
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
    q: Tensor, key_bias: Tensor | None, pairs: Pairs | None, rows: slice | Tensor = slice(None)
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


def padded_bias(q: Tensor, keys: Layout, key_bias: Tensor | None, pairs: Pairs | None) -> Tensor | None:
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


def attend_by_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Attention of padded instances, heads before tokens.

    Args:
        q: [batch, heads, n, head_dim].
        k: [batch, key heads, m, head_dim]. Each of these heads is of as many consecutive heads of q.
        v: As k.
        scale: the factor of the dot products.
        causal: whether query i sees the keys up to i only.
        bias: what is added to the logits, broadcastable to [batch, heads, n, m]. None for nothing.
        dropout, softcap: as in `attend`.

    Returns:
        The context of each query, [batch, heads, n, head_dim].
    """
    # SDPA takes a mask or `is_causal`, not both, so a bias absorbs the triangle
    if causal and (bias is not None or softcap is not None):
        future = _future(q.shape[2], k.shape[2], q)
        bias, causal = future if bias is None else bias + future, False
    is_grouped = not is_traced() and q.shape[1] != k.shape[1]  # torch.jit.trace makes tensors of sizes
    if softcap is not None:
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) if is_grouped else t for t in (k, v))
        logits = capped((q * scale) @ k.mT, softcap)
        weight = (logits if bias is None else logits + bias).softmax(-1, dtype=torch.float32).to(v.dtype)
        return F.dropout(weight, dropout) @ v
    if bias is not None:
        bias = bias.to(q.dtype)
        if torch.compiler.is_exporting():  # which would ask whether a number of tokens that it does not know is 1
            bias = bias.expand(-1, -1, q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=is_grouped
    )


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Bounds dot products x: softcap * tanh(x / softcap), as Gemma 2 does (arXiv 2408.00118, section 2).

    Args:
        logits: the dot products, scaled, of any shape.
        softcap: the bound. None for none.

    Returns:
        The bounded logits.
    """
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _future(rows: int, keys: int, like: Tensor) -> Tensor:
    """[rows, keys]: minus infinity where the query must not see the key."""
    return torch.full((rows, keys), float("-inf"), dtype=like.dtype, device=like.device).triu(1)
