"""Multi-head attention over packed tokens, and the attention statistics that scorers declare."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import precision, segments
from .tokens import Layout, PackedTokens

_ROWS = 128  # query rows whose probabilities are held at once: they stay in cache, and no [heads, n, n] is ever made
# padded, an instance of up to so many logits costs less than a call of its own (cpu: measured; cuda: to be measured)
_SMALL = {"cpu": 2**12, "cuda": 2**22}


class Stat(enum.Flag):
    """The attention statistics that a part may declare in `needs`, one entry per key token.

    They are in single precision where the model is in half.

    Attributes:
        NONE: no statistic.
        SUMMARY: [total, heads], attention that the summary token pays to each token.
        RECEIVED: [total], attention from unprotected tokens: the maximum over heads, summed over queries.
        CONTEXT: [total, heads], the norm of each head's output at the token.
        KEY: [total, head_dim], the mean of the keys over heads.
    """

    NONE = 0
    SUMMARY = enum.auto()
    RECEIVED = enum.auto()
    CONTEXT = enum.auto()
    KEY = enum.auto()


@dataclass(frozen=True)
class AttentionStats:
    """The attention statistics of one block, by `Stat`. Reading one that was not requested raises LookupError.

    Attributes:
        requested: the statistics that were computed.
        values: their tensors, with the shapes that `Stat` lists.
    """

    requested: Stat = Stat.NONE
    values: Mapping[Stat, Tensor] = field(default_factory=dict)

    def __getitem__(self, stat: Stat) -> Tensor:
        if stat not in self.values:
            raise LookupError(
                f"Stat.{stat.name} was not computed: add it to the part's `needs` (requested: {self.requested})"
            )
        return self.values[stat]


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


@dataclass(frozen=True)
class _Logits:
    """How attention weights are made from dot products: scale, causal mask, biases, dropout."""

    scale: float
    causal: bool
    key_bias: Tensor | None
    pairs: PairBias | None
    dropout: float


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
    # what pairs add is as large as the map, so that long instances, uniform or not, take turns
    if (layout.is_uniform and keys.is_uniform and pairs is None) or _is_small(q, layout, keys):
        padded_q, padded_k, padded_v = _by_head(q, layout), _by_head(k, keys), _by_head(v, keys)
        out = _sdpa(padded_q, padded_k, padded_v, scale, causal, _padded_bias(q, keys, key_bias, pairs), dropout)
        return segments.unpad(out.transpose(1, 2), layout)

    biases = (_own_bias(q, *own) for own in _each(keys, key_bias, pairs))
    parts = zip(q.split(layout.lengths), k.split(keys.lengths), v.split(keys.lengths), biases, strict=True)
    out = [
        _sdpa(_one_by_head(one_q), _one_by_head(one_k), _one_by_head(one_v), scale, causal, bias, dropout)
        for one_q, one_k, one_v, bias in parts
    ]
    return torch.cat([one.squeeze(0).transpose(0, 1) for one in out])


def attend_with_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: PackedTokens,
    scale: float,
    needs: Stat,
    *,
    causal: bool = False,
    key_bias: Tensor | None = None,
    pairs: PairBias | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, AttentionStats]:
    """Self-attention that also computes the statistics in `needs`, exactly, and no others.

    Only RECEIVED needs the whole attention map. Its probabilities are then computed once, a block of query rows at a time,
    and give the output too.

    Args:
        q: queries, [total, heads, head_dim].
        k: keys, [total, heads, head_dim].
        v: values, [total, heads, head_dim].
        tokens: the tokens, for their layout, the unprotected ones and the summary token.
        scale: the factor of the dot products.
        needs: the statistics to compute.
        causal: as in `attend`.
        key_bias: as in `attend`.
        pairs: as in `attend`.
        dropout: as in `attend`.

    Returns:
        The context of each query, [total, heads, head_dim], and the statistics.

    Raises:
        ValueError: for SUMMARY where the tokens have no summary token.
    """
    if Stat.SUMMARY in needs and tokens.summary is None:
        raise ValueError("Stat.SUMMARY needs a summary token, and these tokens have none")

    rules, values, out = _Logits(scale, causal, key_bias, pairs, dropout), {}, None
    if Stat.RECEIVED not in needs:
        out = attend(q, k, v, tokens.layout, scale, causal=causal, key_bias=key_bias, pairs=pairs, dropout=dropout)

    with torch.autocast(q.device.type, enabled=False):  # which would take the products of statistics in half again
        query, keys = precision.single(q), precision.single(k)
        if out is None:
            with_map = _attend_padded if _is_small(q, tokens.layout, tokens.layout) else _attend_by_rows
            out, values[Stat.RECEIVED] = with_map(query, keys, v, tokens, rules)
        if Stat.SUMMARY in needs:
            values[Stat.SUMMARY] = _summary_attention(query, keys, tokens, rules)
        if Stat.CONTEXT in needs:
            values[Stat.CONTEXT] = precision.single(out).norm(dim=-1)
        if Stat.KEY in needs:
            values[Stat.KEY] = keys.mean(1)
    return out, AttentionStats(needs, values)


def _by_head(t: Tensor, layout: Layout) -> Tensor:
    """[total, heads, head_dim] -> [batch, heads, longest, head_dim], zeros where there is no token."""
    return segments.pad(t, layout).transpose(1, 2)


def _one_by_head(t: Tensor) -> Tensor:
    """One instance, [n, heads, head_dim] -> [1, heads, n, head_dim]."""
    return t.transpose(0, 1).unsqueeze(0)


def _is_small(q: Tensor, layout: Layout, keys: Layout) -> bool:
    return q.shape[1] * layout.longest * keys.longest <= _SMALL.get(q.device.type, 0)


def _each(
    keys: Layout, key_bias: Tensor | None, pairs: PairBias | None
) -> Iterable[tuple[Tensor | None, PairBias | None]]:
    """What is added to the logits of one instance after the other."""
    biases = [None] * keys.batch if key_bias is None else key_bias.split(keys.lengths)
    return zip(biases, [None] * keys.batch if pairs is None else pairs.split(keys), strict=True)


def _own_bias(q: Tensor, key_bias: Tensor | None, pairs: PairBias | None, rows: slice = slice(None)) -> Tensor | None:
    """[1, heads or 1, rows or 1, n]: what is added to these rows of one instance; None if there is nothing to add."""
    bias = None if key_bias is None else key_bias.view(1, 1, 1, -1)
    if pairs is None:
        return bias
    apart = pairs.between(pairs.position[None, rows], pairs.position[None], q)
    return apart if bias is None else apart + bias


def _padded_bias(q: Tensor, keys: Layout, key_bias: Tensor | None, pairs: PairBias | None) -> Tensor | None:
    """[batch, heads or 1, longest or 1, longest]: what is added, minus infinity where there is no key; None if nothing."""
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
        bias = bias + _future(q.shape[2], 0, k.shape[2], q)
        causal = False
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=scale)


def _future(rows: int, start: int, keys: int, like: Tensor) -> Tensor:
    """[rows, keys]: minus infinity where the query, row `start` + i, must not see the key."""
    hidden = torch.full((rows, keys), float("-inf"), dtype=like.dtype, device=like.device)
    return hidden.triu(start + 1)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens, rules: _Logits) -> tuple[Tensor, Tensor]:
    """Output [total, heads, head_dim] and RECEIVED [total], all instances at once: for maps that are small anyway."""
    layout = tokens.layout
    queries, keys, values = (_by_head(t, layout) for t in (q * rules.scale, k, v))
    logits, bias = queries @ keys.transpose(2, 3), _padded_bias(q, layout, rules.key_bias, rules.pairs)
    logits = logits if bias is None else logits + bias
    weight = (logits + _future(layout.longest, 0, layout.longest, q) if rules.causal else logits).softmax(-1)

    received = (segments.pad(_asking(tokens, q), layout)[:, None] @ weight.amax(1)).squeeze(1)
    out = (F.dropout(weight, rules.dropout) if rules.dropout else weight).to(v.dtype) @ values
    return segments.unpad(out.transpose(1, 2), layout), segments.unpad(received, layout)


def _attend_by_rows(q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens, rules: _Logits) -> tuple[Tensor, Tensor]:
    """Output [total, heads, head_dim] and RECEIVED [total], instance by instance, a block of query rows at a time."""
    lengths = tokens.layout.lengths
    added = _each(tokens.layout, rules.key_bias, rules.pairs)
    parts = zip(*(t.split(lengths) for t in (q, k, v, _asking(tokens, q))), added, strict=True)
    outputs, received = [], []

    for one_q, one_k, one_v, seen, own in parts:
        keys, values = one_k.permute(1, 2, 0), one_v.transpose(0, 1)
        total = one_q.new_zeros(len(one_q))
        for start in range(0, len(one_q), _ROWS):
            rows = slice(start, start + _ROWS)
            logits, bias = torch.bmm(one_q[rows].transpose(0, 1) * rules.scale, keys), _own_bias(one_q, *own, rows=rows)
            logits = logits if bias is None else logits + bias[0]
            if rules.causal:
                logits = logits + _future(logits.shape[1], start, len(one_q), logits)
            weight = logits.softmax(-1)
            total = total + seen[rows] @ weight.amax(0)
            weight = F.dropout(weight, rules.dropout) if rules.dropout else weight
            outputs.append(torch.bmm(weight.to(v.dtype), values).transpose(0, 1))
        received.append(total)

    return torch.cat(outputs), torch.cat(received)


def _asking(tokens: PackedTokens, like: Tensor) -> Tensor:
    """[total]: how much each query counts in RECEIVED."""
    free = tokens.free.to(like.dtype)
    return free if tokens.keep_prob is None else free * tokens.keep_prob


def _summary_attention(q: Tensor, k: Tensor, tokens: PackedTokens, rules: _Logits) -> Tensor:
    """The summary token's own row of the map, [total, heads]: one query an instance."""
    layout = tokens.layout
    assert tokens.summary is not None
    query = tokens.with_x(q.flatten(1)).first_where(tokens.summary).unflatten(1, q.shape[1:])
    logits = (k * query[layout.instance]).sum(-1) * rules.scale
    if rules.key_bias is not None:
        logits = logits + rules.key_bias[:, None]
    if rules.pairs is not None:
        keys = rules.pairs.position[:, None]
        queries = tokens.with_x(keys).first_where(tokens.summary)[layout.instance]
        logits = logits + rules.pairs.between(queries, keys, logits)[..., 0, 0]

    seen = torch.ones_like(tokens.protected)
    if rules.causal:
        last = segments.pad(torch.where(tokens.summary, layout.slot, -1), layout, -1).amax(1)
        seen = layout.slot <= last[layout.instance]
    return segments.softmax(logits, layout, seen)
