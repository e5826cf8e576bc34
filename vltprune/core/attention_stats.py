"""Self-attention that also computes attention statistics, exactly and without a whole attention map in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import precision, segments
from .attention import Pairs, attend, bias_per_instance, by_head, capped, own_bias, padded_bias
from .kernels import column_stats
from .kernels.native import attention_kernel
from .layout import Layout
from .modality import is_of, rater_marks
from .statistics import PAGERANK_STEPS, AttentionStats, Stat
from .tokens import PackedTokens

_OF_MAP = (Stat.RECEIVED, Stat.COLUMN, Stat.DIAGONAL, Stat.PAGERANK)
_BY_NATIVE = (Stat.RECEIVED, Stat.COLUMN, Stat.DIAGONAL, Stat.SUMMARY)  # in the order in which the kernel returns them
_WHOLE = 2**19  # logits computed at once with their statistics: of a padded batch, or of one instance
_ROWS = 128  # of larger maps, the query rows whose probabilities are held at once: they stay in cache


@dataclass(frozen=True)
class _Logits:
    """How attention weights are made from dot products: scale, causal mask, biases, dropout, soft cap."""

    scale: float
    causal: bool = False
    key_bias: Tensor | None = None
    pairs: Pairs | None = None
    dropout: float = 0.0
    softcap: float | None = None


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
    pairs: Pairs | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    text: Tensor | None = None,
) -> tuple[Tensor, AttentionStats]:
    """Self-attention that also computes the statistics in `needs`, exactly, and no others.

    Statistics of the whole attention map (`Stat.of_map`) share one pass: its probabilities are computed once, a block of
    query rows at a time, and give the output too. The others run beside fused attention. On CUDA so do RECEIVED and COLUMN,
    by a kernel of their own, where nothing is added to the logits and no gradient is wanted.

    Args:
        q: queries, [total, heads, head_dim].
        k: keys, [total, heads, head_dim].
        v: values, [total, heads, head_dim].
        tokens: the tokens, for their layout, the unprotected ones and the summary token.
        scale: the factor of the dot products.
        needs: the statistics to compute.
        causal, key_bias, pairs: as in `attend`.
        dropout: as in `attend`. Statistics are of the weights before dropout.
        softcap: as in `attend`.
        text: the query of each instance's text, [batch, heads, head_dim], for FROM_QUERY. None for none.

    Returns:
        The context of each query, [total, heads, head_dim], and the statistics.

    Raises:
        ValueError: for SUMMARY or SUMMARY_WIDE where the tokens have no summary token, and for FROM_QUERY without `text`.
        LookupError: for FROM_TEXT where the tokens are of one modality, and for FROM_RATERS where none are marked.
    """
    _check_needs(needs, tokens, text)
    rules, values, out = _Logits(scale, causal, key_bias, pairs, dropout, softcap), {}, None
    of_map = needs.of_map | (needs & Stat.SUMMARY if tokens.protected_lead else Stat.NONE)
    native = None if _is_beyond_native(tokens, rules, of_map) else attention_kernel(q, k, v)
    if native is not None:
        out, values = _attend_natively(native, q, k, v, tokens, rules, of_map)
    is_plain = native is None and key_bias is None and pairs is None and softcap is None
    by_kernel = is_plain and column_stats.applies(q, k, needs.of_map)
    if out is None and (by_kernel or not needs.of_map):
        how: dict[str, Any] = {"key_bias": key_bias, "pairs": pairs, "dropout": dropout, "softcap": softcap}
        out = attend(q, k, v, tokens.layout, scale, causal=causal, **how)

    with precision.without_autocast(q.device):  # which would take the products of statistics in half again
        query, keys = precision.single(q), precision.single(k)
        if out is None:
            # the first token's row of the map is there too
            with_map = _attend_padded if _is_small_map(q, tokens.layout) else _attend_by_rows
            out, values = with_map(query, keys, v, tokens, rules, of_map)
        if by_kernel:
            counts = _query_weights(tokens, query)
            values = column_stats.column_statistics(q, k, tokens.layout, scale, needs.of_map, *counts, causal=causal)
        rows = needs & ~Stat.SUMMARY if Stat.SUMMARY in values else needs
        values |= _beside_output(query, keys, v, tokens, rules, rows, text)
        if Stat.CONTEXT in needs:
            values[Stat.CONTEXT] = torch.linalg.vector_norm(precision.single(out), dim=-1)
    return out, AttentionStats(needs, values)


def attention_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: PackedTokens,
    scale: float,
    needs: Stat,
    *,
    causal: bool = False,
    key_bias: Tensor | None = None,
    pairs: Pairs | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    text: Tensor | None = None,
) -> AttentionStats:
    """The statistics of self-attention alone, for who decides before attention runs on what is left.

    Attention is computed only where a statistic comes with its output (`Stat.with_output`).

    Args:
        q, k, v, tokens, scale, needs, causal, key_bias, pairs, dropout, softcap, text: as in `attend_with_stats`.

    Returns:
        The statistics.

    Raises:
        ValueError, LookupError: as `attend_with_stats`.
    """
    rules = _Logits(scale, causal, key_bias, pairs, dropout, softcap)
    if needs.with_output:
        return attend_with_stats(q, k, v, tokens, needs=needs, text=text, **vars(rules))[1]
    _check_needs(needs, tokens, text)
    with precision.without_autocast(q.device):
        query, keys = precision.single(q), precision.single(k)
        return AttentionStats(needs, _beside_output(query, keys, v, tokens, rules, needs, text))


def _check_needs(needs: Stat, tokens: PackedTokens, text: Tensor | None) -> None:
    """ValueError for statistics of tokens that are not there."""
    if needs.of_summary and tokens.summary is None:
        raise ValueError(f"{needs.of_summary} needs a summary token, and these tokens have none")
    if Stat.FROM_QUERY in needs and text is None:
        raise ValueError(f"{Stat.FROM_QUERY} is the attention of a text, and there is none: give its queries as text=")


def _beside_output(
    q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens, rules: _Logits, needs: Stat, text: Tensor | None
) -> dict[Stat, Tensor]:
    """The statistics in `needs` that are computed beside attention, of q and k in single precision at least."""
    values = _rows_of_the_map(q, k, tokens, rules, needs)
    if Stat.FROM_TEXT in needs:
        values[Stat.FROM_TEXT] = _from_queries(q, k, tokens, is_of(tokens, "text"), rules)
    if Stat.FROM_RATERS in needs:
        values[Stat.FROM_RATERS] = _from_queries(q, k, tokens, rater_marks(tokens), rules)
    if Stat.FROM_QUERY in needs and text is not None:
        values[Stat.FROM_QUERY] = _text_row(precision.single(text), k, tokens, rules)
    return values | _per_token(k, precision.single(v), needs)


def _from_queries(q: Tensor, k: Tensor, tokens: PackedTokens, queries: Tensor, rules: _Logits) -> Tensor:
    """[total]: attention that each token receives from chosen queries [total] bool of its instance, mean over heads and these.

    It sums to one in each instance with a chosen query, and is zero in the others. In soft training a query counts as much as
    its `keep_prob`. Rows are computed in blocks, for the chosen queries alone; q and k are in single precision at least.
    """
    layout, received = tokens.layout, []
    index, counts = queries.nonzero().squeeze(1), segments.count(queries, layout).tolist()
    _, present = _query_weights(tokens, q)
    chosen = (t[index].split(counts) for t in (q, layout.slot, present))
    biases = bias_per_instance(layout, rules.key_bias, rules.pairs)
    for one_q, slot, weight, one_k, bias in zip(*chosen, k.split(layout.lengths), biases, strict=True):
        total = one_k.new_zeros(1, one_k.shape[0])
        for rows, row_attention in _blocks(one_q, one_k, slot, bias, rules):
            total = total + _over_queries(row_attention.mean(1), weight[None, rows])
        received.append(total[0] / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny))
    return torch.cat(received)


def _per_token(k: Tensor, v: Tensor, needs: Stat) -> dict[Stat, Tensor]:
    """The statistics in `needs` of each token's own key and value."""
    values = {}
    if Stat.KEY in needs:
        values[Stat.KEY] = k.mean(1)
    if Stat.KEY_NORM in needs:
        values[Stat.KEY_NORM] = k.abs().sum((1, 2))
    if Stat.VALUE in needs:
        values[Stat.VALUE] = torch.linalg.vector_norm(v, dim=-1)
    if Stat.VALUE_MEAN in needs:
        values[Stat.VALUE_MEAN] = v.mean(1)
    return values


def _rows_of_the_map(q: Tensor, k: Tensor, tokens: PackedTokens, rules: _Logits, needs: Stat) -> dict[Stat, Tensor]:
    """The statistics in `needs` of one query an instance."""
    values, layout = {}, tokens.layout
    if Stat.SUMMARY in needs:
        values[Stat.SUMMARY] = _row(q, k, tokens.summary_row, layout, rules)
    if Stat.SUMMARY_WIDE in needs:
        wide_q, wide_k = q.flatten(1)[:, None], k.flatten(1)[:, None]
        row = _row(wide_q, wide_k, tokens.summary_row, layout, _as_one_head(rules, wide_q))
        values[Stat.SUMMARY_WIDE] = row.squeeze(1)
    if Stat.LAST in needs:
        values[Stat.LAST] = _row(q, k, tokens.last_row, layout, rules)
    return values


def _row(q: Tensor, k: Tensor, index: Tensor, layout: Layout, rules: _Logits) -> Tensor:
    """[total, heads]: the row of the map of one query an instance, the packed token at index [batch]."""
    logits = _dot_products(q.index_select(0, index), k, layout, rules)
    if rules.pairs is not None:
        keys = rules.pairs.position[:, None]
        logits = logits + rules.pairs.between(layout.spread(keys[index]), keys, logits)[..., 0, 0]
    if rules.causal:
        return segments.softmax(logits, layout, layout.slot <= layout.spread(layout.slot[index]))
    return segments.unpad(segments.pad(logits, layout, float("-inf")).softmax(1), layout)


def _dot_products(q: Tensor, k: Tensor, layout: Layout, rules: _Logits) -> Tensor:
    """Logits [total, heads] of a query q [batch, heads, head_dim] of each instance for its keys k [total, heads, head_dim]."""
    q = q * rules.scale
    if layout.is_uniform:
        keys = segments.pad(k, layout).transpose(1, 2)
        logits = segments.unpad((keys @ q[..., None]).squeeze(-1).transpose(1, 2), layout)
    else:
        logits = (k * layout.spread(q)).sum(-1)
    logits = capped(logits, rules.softcap)
    return logits if rules.key_bias is None else logits + rules.key_bias[:, None]


def _text_row(text: Tensor, k: Tensor, tokens: PackedTokens, rules: _Logits) -> Tensor:
    """[total, heads]: attention of each instance's text [batch, heads, head_dim] to its unprotected tokens."""
    logits = _dot_products(text, k, tokens.layout, rules)
    return segments.softmax(logits, tokens.layout, tokens.free)


def _as_one_head(rules: _Logits, wide: Tensor) -> _Logits:
    """The rules of a single head as wide as all: the bias of a pair is the mean over heads."""
    pairs = None if rules.pairs is None else rules.pairs.over_heads()
    return replace(rules, scale=wide.shape[-1] ** -0.5, pairs=pairs)


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens, rules: _Logits, needs: Stat
) -> tuple[Tensor, dict[Stat, Tensor]]:
    """Output [total, heads, head_dim] and map statistics, all instances at once: for maps that are small anyway."""
    layout = tokens.layout
    queries, keys, values = (by_head(t, layout) for t in (q * rules.scale, k, v))
    logits = capped(queries @ keys.transpose(2, 3), rules.softcap)
    bias = padded_bias(q, layout, rules.key_bias, rules.pairs)
    logits = logits if bias is None else logits + bias
    logits = _causal(logits, torch.arange(layout.longest, device=q.device)) if rules.causal else logits

    free, present = (segments.pad(t, layout) for t in _query_weights(tokens, q))
    blocks = [(slice(0, layout.longest), logits.softmax(-1))]
    out, found = _sum_blocks(blocks, values, free, present, rules.dropout, needs)
    return segments.unpad(out.transpose(1, 2), layout), {stat: segments.unpad(t, layout) for stat, t in found.items()}


def _is_beyond_native(tokens: PackedTokens, rules: _Logits, of_map: Stat) -> bool:
    """Whether the compiled kernel lacks something: biases of pairs, caps, dropout, soft tokens, PAGERANK."""
    if rules.pairs is not None or rules.softcap is not None:
        return True
    return rules.dropout > 0 or tokens.keep_prob is not None or Stat.PAGERANK in of_map


def _attend_natively(
    native: Callable[..., tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: PackedTokens,
    rules: _Logits,
    needs: Stat,
) -> tuple[Tensor, dict[Stat, Tensor]]:
    """Output [total, heads, head_dim] and map statistics by the compiled kernel, instance by instance in tiles of rows."""
    named = {str(stat.name).lower(): stat in needs for stat in _BY_NATIVE}
    bias, lengths = rules.key_bias, tokens.layout.lengths
    out, *found = native(
        q, k, v, lengths, rules.scale, apart=tokens.protected, key_bias=bias, causal=rules.causal, **named
    )
    return out, {stat: values for stat, values in zip(_BY_NATIVE, found, strict=True) if stat in needs}


def _is_small_map(q: Tensor, layout: Layout) -> bool:
    """Whether the maps of a batch stay in cache whole, where one pass over them costs less than blocks of rows."""
    if torch.compiler.is_exporting():
        return True  # the number of blocks would be this example's
    return layout.batch * q.shape[1] * layout.longest**2 <= _WHOLE


def _attend_by_rows(
    q: Tensor, k: Tensor, v: Tensor, tokens: PackedTokens, rules: _Logits, needs: Stat
) -> tuple[Tensor, dict[Stat, Tensor]]:
    """Output [total, heads, head_dim] and map statistics, instance by instance, a block of query rows at a time."""
    lengths = tokens.layout.lengths
    biases = bias_per_instance(tokens.layout, rules.key_bias, rules.pairs)
    parts = zip(*(t.split(lengths) for t in (q, k, v, *_query_weights(tokens, q))), biases, strict=True)
    outputs, found = [], []

    for one_q, one_k, one_v, free, present, bias in parts:
        index = torch.arange(one_k.shape[0], device=q.device)
        blocks = _blocks(one_q, one_k, index, bias, rules)
        values = one_v.transpose(0, 1)[None]
        out, sums = _sum_blocks(blocks, values, free[None], present[None], rules.dropout, needs)
        outputs.append(out[0].transpose(0, 1))
        found.append(sums)
    return torch.cat(outputs), {stat: torch.cat([sums[stat][0] for sums in found]) for stat in found[0]}


def _blocks(
    q: Tensor, k: Tensor, index: Tensor, bias: tuple[Tensor | None, Pairs | None], rules: _Logits
) -> Iterator[tuple[slice, Tensor]]:
    """Attention weights of one instance, [1, heads, rows, n], and which of the queries these rows are.

    Queries q [m, heads, head_dim] are of the tokens at index [m] of the instance, keys k [n, heads, head_dim] of all.
    """
    keys = k.permute(1, 2, 0)
    step = _ROWS if q.shape[0] * k.shape[0] * k.shape[1] > _WHOLE else max(q.shape[0], 1)
    for start in range(0, q.shape[0], step):
        rows = slice(start, start + step)
        logits = capped(torch.bmm(q[rows].transpose(0, 1) * rules.scale, keys)[None], rules.softcap)
        added = own_bias(q, *bias, rows=index[rows])
        logits = logits if added is None else logits + added
        logits = _causal(logits, index[rows]) if rules.causal else logits
        yield rows, logits.softmax(-1)


def _sum_blocks(
    blocks: Iterable[tuple[slice, Tensor]], v: Tensor, free: Tensor, present: Tensor, dropout: float, needs: Stat
) -> tuple[Tensor, dict[Stat, Tensor]]:
    """Output [batch, heads, n, head_dim] and map statistics [batch, n] from blocks of rows, [batch, heads, rows, n].

    SUMMARY, [batch, n, heads], is the row of the first token.

    Values are v [batch, heads, n, head_dim]; free and present [batch, n] weigh queries, as `_query_weights` says.
    """
    parts: dict[Stat, list[Tensor]] = {stat: [] for stat in (*_OF_MAP, Stat.SUMMARY) if stat in needs}
    outputs, kept = [], []
    for rows, weight in blocks:
        if Stat.RECEIVED in needs:
            parts[Stat.RECEIVED].append(_over_queries(weight.amax(1), free[:, rows]))
        if Stat.COLUMN in needs:
            parts[Stat.COLUMN].append(_over_queries(weight.mean(1), present[:, rows]))
        if Stat.DIAGONAL in needs:
            own = weight.diagonal(rows.start, 2, 3).mean(1)
            around = (rows.start, weight.shape[3] - rows.start - own.shape[1])
            parts[Stat.DIAGONAL].append(F.pad(own, around))
        if Stat.SUMMARY in needs and rows.start == 0:
            parts[Stat.SUMMARY].append(weight[:, :, 0].transpose(1, 2))
        if Stat.PAGERANK in needs:
            kept.append((rows, weight))
        weight = F.dropout(weight, dropout) if dropout else weight
        outputs.append(weight.to(v.dtype) @ v)
    if Stat.PAGERANK in needs:
        parts[Stat.PAGERANK] = [_pagerank(kept, present)]
    if not outputs:  # an instance without tokens
        shape = (v.shape[0], 0)
        return v, {stat: free.new_zeros(*shape, v.shape[1]) if stat is Stat.SUMMARY else free for stat in parts}
    found = {stat: functools.reduce(torch.add, part) for stat, part in parts.items()}
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], found


def _over_queries(weight: Tensor, counts: Tensor) -> Tensor:
    """[batch, n]: the sum of rows [batch, rows, n], each of which counts [batch, rows]."""
    return (counts[:, None] @ weight).squeeze(1)


def _pagerank(blocks: list[tuple[slice, Tensor]], present: Tensor) -> Tensor:
    """PAGERANK [batch, n] from all rows of the maps; queries count present [batch, n] in the beginning."""
    start = present / present.sum(1, keepdim=True).clamp(min=torch.finfo(present.dtype).tiny)
    heads = blocks[0][1].shape[1] if blocks else 1
    score = start[:, None, None].expand(-1, heads, -1, -1)
    for _ in range(PAGERANK_STEPS):
        score = torch.stack([score[..., rows] @ weight for rows, weight in blocks]).sum(0) if blocks else score
    return score.squeeze(2).norm(dim=1) / sqrt(heads)


def _causal(logits: Tensor, index: Tensor) -> Tensor:
    """Logits [..., rows, n], minus infinity where the query, the token at index [rows], must not see the key."""
    later = torch.arange(logits.shape[-1], device=logits.device) > index[:, None]
    return logits.masked_fill(later, float("-inf"))


def _query_weights(tokens: PackedTokens, like: Tensor) -> tuple[Tensor, Tensor]:
    """[total] each: how much each query counts among the unprotected ones, and among all."""
    free = tokens.free.to(like.dtype)
    if tokens.keep_prob is None:
        return free, torch.ones_like(free)
    return free * tokens.keep_prob, tokens.keep_prob.to(like.dtype)
