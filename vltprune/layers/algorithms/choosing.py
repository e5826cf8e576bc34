"""Token choice: which tokens of an instance stay, by how they differ.

All functions take padded batches, padding behind the tokens. They return `keep` [batch, n] bool, which is true for at most
`counts` of an instance's candidates, and for no other token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import precision
from ...core.checks import bound, is_recorded
from .similarity import cosine, decides, first_best, order_by_score, order_by_similarity, positions, ranks, scaled, unit

_INFINITY = float("inf")


@decides
def max_min(features: Tensor, candidates: Tensor, counts: Tensor, most: int | None = None) -> Tensor:
    """Max-min diversity by greedy choice, as in DivPrune (arXiv 2503.02175).

    The distance of two tokens is 1 - cosine. The first choice is the token whose nearest other one is farthest; each further
    one is the token whose nearest chosen one is farthest. It costs n^2 * dim MACs for n tokens.

    Args:
        features: [batch, n, dim]; DivPrune has the projected image tokens.
        candidates: [batch, n] bool.
        counts: [batch] int64, how many stay. Larger numbers than there are candidates mean all.
        most: the largest of `counts`, where the caller knows it; without it an accelerator tries n choices.

    Returns:
        `keep`, [batch, n] bool.
    """
    keep = torch.zeros_like(candidates)
    distance = 1 - cosine(features, candidates)
    itself = torch.eye(candidates.shape[1], dtype=torch.bool, device=candidates.device)
    margin = distance.masked_fill(itself | ~candidates[:, None, :], _INFINITY)
    margin = margin.amin(2) if candidates.shape[1] else margin.sum(2)
    choices, counts, others = bound(most_of(candidates, counts, most)), _found(candidates, counts), ~candidates
    for step in range(choices):
        chosen = _choose(margin, others | keep)
        keep = _add(keep, chosen, counts, step)
        reached = distance.gather(1, chosen[..., None].expand(-1, -1, distance.shape[2])).squeeze(1)
        margin = reached if step == 0 else torch.minimum(margin, reached)
    return keep


@decides
def dpp(features: Tensor, candidates: Tensor, counts: Tensor, scores: Tensor, most: int | None = None) -> Tensor:
    """Greedy MAP of a determinantal point process, as in CDPruner (arXiv 2506.10967).

    The kernel is L_ij = r_i r_j cos_ij, where r are the scores of the instance's candidates scaled to 0 .. 1, plus 1e-6.
    Each choice is the token that makes the determinant of the chosen ones' kernel largest, by its Cholesky factor (Chen et
    al., arXiv 1709.05135, algorithm 1). It computes in the widest float of the device, and costs counts * n * (dim + counts)
    MACs.

    A token in the span of the chosen ones adds nothing to the determinant but rounding. When all others are, as in an image of
    few different patches, the rest of `counts` are the tokens of largest score, ties by position. The reference scales scores
    over the whole batch and chooses by rounding there.

    Args:
        features: [batch, n, dim]; CDPruner has the projected image tokens.
        candidates: [batch, n] bool.
        counts: [batch] int64, how many stay. Larger numbers than there are candidates mean all.
        scores: [batch, n], larger is more relevant.
        most: the largest of `counts`, where the caller knows it; without it an accelerator tries n choices.

    Returns:
        `keep`, [batch, n] bool.
    """
    keep = torch.zeros_like(candidates)
    choices = bound(most_of(candidates, counts, most))
    if not choices:
        return keep
    dtype = precision.widest_float(candidates.device)
    relevance = (scaled(scores, candidates) + 1e-6).to(dtype)
    x = unit(features, candidates, dtype) * relevance[..., None]
    # by what part of its own kernel entry a token may stand out and still count as spanned
    spanned_below = (1e-8 if dtype == torch.float64 else 1e-4) * x.square().sum(2)

    # below any gain, and in the order of their scores
    filled = -1.0 - ranks(order_by_score(scores, candidates)).to(dtype)
    gain = x.square().sum(2)
    factor = x.new_zeros(x.shape[0], choices, x.shape[1])
    counts, others = _found(candidates, counts), ~candidates
    for step in range(choices):
        spanned = gain <= spanned_below
        chosen = _choose(torch.where(spanned, filled, gain), others | keep, relative=True)
        keep = _add(keep, chosen, counts, step)
        row = (x @ x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2])).mT).squeeze(2)
        # later rows are zero: exporters mistake slices that are empty or grow
        previous = factor if torch.compiler.is_exporting() else factor[:, :step]
        at = previous.gather(2, chosen[:, None].expand(-1, previous.shape[1], -1))
        row = row - (at * previous).sum(1)
        # a spanned token changes nothing
        pivot = gain.masked_fill(spanned, _INFINITY).gather(1, chosen).sqrt()
        factor[:, step] = row / pivot
        gain = gain - factor[:, step].square()
    return keep


@decides
def deduplicate(
    features: Tensor,
    candidates: Tensor,
    counts: Tensor,
    scores: Tensor,
    important: float = 0.5,
    most: int | None = None,
) -> Tensor:
    """Keeps the tokens of largest score and, of the others, those that resemble each other least, as in VisPruner.

    The part `important` of `counts` is by score (arXiv 2412.01818, version 2). The others are in a sequence, at first by
    score. In turn they are in A and in B, and up to 8 of A that are most similar to a token of B go; the sequence is then
    what is left of A, most similar first, and B. This repeats until `counts` are left. The reference needs an even sequence;
    here A of an odd one has one token more.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool.
        counts: [batch] int64, how many stay. Larger numbers than there are candidates mean all.
        scores: [batch, n], larger is more important; VisPruner has the class token's attention.
        important: the part that is chosen by score, in 0 .. 1, rounded down.
        most: the largest of `counts`, where the caller knows it; without it an accelerator compares longer sequences.

    Returns:
        `keep`, [batch, n] bool.
    """
    n = candidates.shape[1]
    if not n:
        return candidates.clone()
    total = candidates.sum(1)
    counts = torch.minimum(counts, total)
    by_score = part_of(counts, important)
    order = order_by_score(scores, candidates)
    rank = ranks(order)
    goal, length = (counts - by_score)[:, None], (total - by_score)[:, None]

    similarity = cosine(features, candidates)
    longest, most = bound(n), bound(most_of(candidates, counts, most))
    # the sequence begins behind those that stay by score; behind its length it repeats the last one
    place = torch.arange(longest, device=order.device) + by_score[:, None]
    sequence = order.gather(1, place.clamp(max=n - 1))
    while longest > 0 and not precision.surely_none(length > goal):
        sequence, length = _thin(similarity, sequence[:, : max(longest, most)], length, goal)
        # of those that are not yet as short as they should be
        longest -= min(8, -(-longest // 2))
    stays = torch.zeros_like(rank).scatter_add(1, sequence, (positions(sequence) < length).long()) > 0
    return candidates & (stays | (rank < by_score[:, None]))


@decides
def pivots(features: Tensor, candidates: Tensor, counts: Tensor, scores: Tensor, number: int = 10) -> Tensor:
    """Keeps pivots and the tokens that resemble them least, as in DART (arXiv 2502.11494).

    The pivots are the `number` tokens of largest score. For each in turn, its least similar tokens of those not yet taken
    stay. The tokens beside pivots are divided equally among the pivots, and what cannot be divided goes to the first ones, so
    that exactly `counts` stay; the reference loses it, and takes pivots in the order of a set.

    Args:
        features: [batch, n, dim]; DART has the hidden states of an early layer.
        candidates: [batch, n] bool.
        counts: [batch] int64, how many stay, pivots included. Larger numbers than there are candidates mean all.
        scores: [batch, n], by which pivots are chosen; DART has the L1 norm of the keys.
        number: how many pivots; `counts` at most.

    Returns:
        `keep`, [batch, n] bool.
    """
    counts = torch.minimum(counts, candidates.sum(1))[:, None]
    last = candidates.shape[1] - 1
    if isinstance(last, int):
        number = min(number, last + 1)
    of_each = counts.clamp(max=number)
    order = order_by_score(scores, candidates)
    keep = candidates & (ranks(order) < of_each)
    x = unit(features, candidates)
    others = counts - of_each
    for n in range(number):
        # a recorded graph has all rounds, and instances may have fewer tokens
        at = order.gather(1, torch.full_like(counts, n).clamp(max=last))
        pivot = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
        left = candidates & ~keep
        rank = ranks(order_by_similarity(-(x @ pivot.mT).squeeze(2), left))
        wanted = others // of_each.clamp(min=1) + (n < others % of_each.clamp(min=1))
        keep = keep | (left & (rank < wanted) & (n < of_each))
    return keep


def part_of(counts: Tensor, part: float) -> Tensor:
    """counts * part, rounded down: [batch] int64. A product that is whole but for rounding counts as whole.

    Args:
        counts: [batch] int64.
        part: in 0 .. 1.
    """
    return (counts * part + 1e-4).floor().long()


def _thin(similarity: Tensor, sequence: Tensor, length: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """One round of `deduplicate`: the sequence [batch, m] without up to 8 tokens, and its length [batch, 1]."""
    batch, n = sequence.shape[0], similarity.shape[1]
    a, b = sequence[:, ::2], sequence[:, 1::2]
    place = positions(sequence).expand(batch, -1)
    in_a, in_b = place[:, ::2] < length, place[:, 1::2] < length
    edges = similarity.gather(1, a[..., None].expand(-1, -1, n)).gather(2, b[:, None].expand(-1, a.shape[1], -1))
    # -2 is below any cosine, for a token that is alone
    best = edges.masked_fill(~in_b[:, None], -2.0).amax(2) if b.shape[1] else edges.new_full(a.shape, -2.0)
    a = a.gather(1, order_by_similarity(best, in_a))

    removed = torch.minimum((length - goal).clamp(0, 8), in_a.sum(1, keepdim=True))
    rank = positions(a).expand(batch, -1)
    # what is left of A, then B, then the others
    key = torch.cat([torch.where((rank >= removed) & in_a, 0, 2), torch.where(in_b, 1, 2)], 1)
    return torch.cat([a, b], 1).gather(1, key.argsort(dim=1, stable=True)), length - removed


def most_of(candidates: Tensor, counts: Tensor, most: int | None) -> int:
    """The largest count where it is known without a host synchronization, else all.

    Args:
        candidates: [batch, n].
        counts: [batch] int64.
        most: the largest of `counts`. None where the caller does not know it.

    Returns:
        It, n at most.
    """
    n = candidates.shape[1]
    if most is None and counts.device.type == "cpu" and not is_recorded() and counts.numel():
        most = int(counts.max())
    return n if most is None else min(max(most, 0), n)


def _choose(values: Tensor, taken: Tensor, relative: bool = False) -> Tensor:
    """The slot of the largest value, [batch, 1] int64, but for those taken; `relative` tolerances are for any scale."""
    values = values.masked_fill(taken, -_INFINITY)
    if not relative:
        return first_best(values)[1].unsqueeze(1)
    within = precision.ROUNDING * values.amax(1, keepdim=True).abs()
    # infinity where none is left
    return first_best(values, within.nan_to_num(posinf=0.0))[1].unsqueeze(1)


def _found(candidates: Tensor, counts: Tensor) -> Tensor:
    """[batch, 1] int64: how many are chosen, where there are as many candidates."""
    # once: in a graph that is recorded each choice is written out
    return torch.minimum(counts, candidates.sum(1)).unsqueeze(1)


def _add(keep: Tensor, chosen: Tensor, counts: Tensor, step: int) -> Tensor:
    """`keep` with the chosen slots [batch, 1], in instances that want another, of [batch, 1] counts."""
    return keep.scatter(1, chosen, keep.gather(1, chosen) | (step < counts))
