"""Token matching: which tokens of an instance merge, and into which of those that stay.

All functions take padded batches, padding behind the tokens. They return `keep` [batch, n] bool, true for candidates alone,
and `match` [batch, n] int64: for a candidate that goes, the slot of the kept one that it merges into; else the own slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import precision
from .similarity import (
    NEAR,
    ROUNDING,
    cosine,
    decides,
    first_best,
    order_by_similarity,
    positions,
    ranks,
    unit,
)

_INFINITY = float("inf")


@decides
def bipartite(
    features: Tensor,
    candidates: Tensor,
    r: Tensor | None = None,
    least_similarity: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching of ToMe (arXiv 2210.09461, section 3), or above a threshold, as in DyMU (arXiv 2504.17040).

    Candidates are in turn in A and in B. Each token of A has an edge to its most similar token of B; the `r` most similar
    edges merge. As in ToMe, a token behind one protected token (a class token) is in B, and behind two in A.

    DyMU's thresholds are of one instance each: an instance merges all its edges of `least_similarity` at least.

    Args:
        features: [batch, n, dim]; ToMe has the mean of the keys over heads.
        candidates: [batch, n] bool, false for padding and for protected tokens, which are neither sources nor destinations.
        r: [batch] int64, how many tokens go; half of the candidates at most. None for all above the threshold.
        least_similarity: the cosine of an edge that merges, a number or [batch]. None for any.

    Returns:
        `keep` [batch, n] bool and `match` [batch, n] int64.

    Raises:
        ValueError: without `r` and without `least_similarity`.
    """
    if r is None and least_similarity is None:
        raise ValueError(
            "bipartite needs r, how many tokens merge, or least_similarity, the cosine from which they merge"
        )
    if not candidates.shape[1]:
        return candidates.clone(), own_slots(candidates)
    before, place = candidates.int().argmax(1), candidates.cumsum(1) - 1
    return bipartite_in_order(features, candidates, before, place, r, least_similarity, ROUNDING)[:2]


@decides
def bipartite_in_order(
    features: Tensor,
    candidates: Tensor,
    before: Tensor,
    place: Tensor,
    r: Tensor | None,
    least_similarity: Tensor | float | None = None,
    within: float = NEAR,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bipartite` of candidates that stand in another order than their slots, as in ToMe's blocks behind the first.

    ToMe's output is in the order [unmerged A, B]. A keeps its order behind a protected token, and otherwise is in descending
    order of similarity.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool.
        before: [batch] int64, the number of protected tokens before the first candidate.
        place: [batch, n] int64, the place of each candidate among those of its instance, from 0 on.
        r, least_similarity: as in `bipartite`.
        within: the absolute tolerance within which similarities tie.

    Returns:
        `keep` [batch, n] bool; `match` [batch, n] int64; and numbers [batch, n] int64 that ascend in the order of ToMe's
        output. A token that goes has that of its match.
    """
    if not candidates.shape[1]:
        return candidates.clone(), own_slots(candidates), own_slots(candidates)
    parity = place + before[:, None] % 2
    a, b = halves(parity, candidates)
    similarity, partner = _edges(unit(features, candidates), a, b, within)

    merges = similarity > -_INFINITY
    rank = ranks(order_by_similarity(similarity, merges, within))
    if least_similarity is not None:
        merges = merges & (similarity >= _of_each(least_similarity, 2) - within)
    if r is not None:
        merges = merges & (rank < torch.minimum(r, candidates.sum(1) // 2)[:, None])
    keep, match = _merged(candidates, a, partner, merges)

    # one more column, for the empty places of A
    rank_of_slot = torch.zeros_like(F.pad(place, (0, 1))).scatter(1, a, rank)[:, :-1]
    in_a = torch.where(before[:, None] > 0, place, rank_of_slot)
    in_b = candidates.sum(1, keepdim=True) + place
    return keep, match, torch.where(parity % 2 == 0, in_a, in_b).gather(1, match)


@decides
def best_edges(features: Tensor, candidates: Tensor, before: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The best edge of each token of A, which `bipartite_in_order` merges by.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool.
        before: [batch] int64, the number of protected tokens before the first candidate.
        place: [batch, n] int64, the place of each candidate among those of its instance, from 0 on.

    Returns:
        Its cosine [batch, n], and where there is one, [batch, n] bool.
    """
    if not candidates.shape[1]:
        return features.sum(2), candidates
    a, b = halves(place + before[:, None] % 2, candidates)
    similarity, _ = _edges(unit(features, candidates), a, b, NEAR)
    of_slot = F.pad(torch.zeros_like(candidates, dtype=similarity.dtype), (0, 1), value=-_INFINITY)
    of_slot = torch.full_like(of_slot, -_INFINITY).scatter(1, a, similarity)[:, :-1]
    return of_slot, of_slot > -_INFINITY


@decides
def nearest(features: Tensor, candidates: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Matches each removed candidate to its most similar kept candidate, by cosine.

    This is how VisionZip (arXiv 2412.04467), VScan (arXiv 2505.22654) and DiffRate (arXiv 2305.17997) merge.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool. Kept tokens that are no candidates get none.
        keep: [batch, n] bool, the tokens that stay.

    Returns:
        `keep` among the candidates, and `match` [batch, n] int64; the own slot where an instance keeps no candidate.
    """
    keep = keep & candidates
    if not candidates.shape[1]:
        return keep, own_slots(candidates)
    similarity = cosine(features, candidates).masked_fill(~keep[:, None, :], -_INFINITY)
    largest, best = first_best(similarity)
    return keep, torch.where(candidates & ~keep & (largest > -_INFINITY), best, own_slots(candidates))


@decides
def most_similar(features: Tensor, candidates: Tensor, others: Tensor, among: Tensor) -> Tensor:
    """The most similar of other vectors to each candidate, by cosine, such as the means of clusters.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool.
        others: [batch, m, dim].
        among: [batch, m] bool, which of them there are; at least one where there are candidates.

    Returns:
        Its index, [batch, n] int64; of several that are equal within rounding, the first.
    """
    if not features.shape[1]:
        return torch.zeros_like(candidates, dtype=torch.int64)
    similarity = unit(features, candidates) @ unit(others, among).mT
    return first_best(similarity.masked_fill(~among[:, None, :], -_INFINITY))[1]


@decides
def neighbors(features: Tensor, candidates: Tensor, number: int, earlier: bool = False) -> tuple[Tensor, Tensor]:
    """The candidates that are most similar to each token, by cosine, as LLaVA-PruMerge (arXiv 2403.15388) adds them.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool. Others are nobody's neighbors and have none.
        number: how many, at least 1.
        earlier: whether neighbors are among the tokens before each one alone.

    Returns:
        The slots [batch, n, k] int64, the most similar first, with k the smaller of `number` and n, and which of them are
        neighbors [batch, n, k] bool: where there are fewer than k, the others are the own slot.
    """
    batch, n = candidates.shape
    if not n:
        return torch.zeros(batch, 0, 0, dtype=torch.int64, device=candidates.device), candidates[:, :, None]
    among = candidates[:, None, :] & candidates[:, :, None]
    slot = torch.arange(n, device=candidates.device)
    among = among & ((slot < slot[:, None]) if earlier else (slot != slot[:, None]))
    order = order_by_similarity(cosine(features, candidates).flatten(0, 1), among.flatten(0, 1)).view(batch, n, n)
    order = order[:, :, :number]
    found = among.gather(2, order)
    return torch.where(found, order, slot[:, None]), found


@decides
def energy(
    features: Tensor,
    candidates: Tensor,
    r: Tensor,
    margin: Tensor | float,
    alpha: float = 1.0,
    within: float = ROUNDING,
) -> tuple[Tensor, Tensor]:
    """Matching of the tokens of highest energy, as in PiToMe (arXiv 2405.16148).

    The energy of a token is the mean of ELU(cos - margin) over the instance's other candidates: high in a large cluster. The
    2 r tokens of highest energy may merge. By rank they are in turn in A and in B; each of A merges into its most similar of B.

    Args:
        features: [batch, n, dim]; PiToMe has the mean of the keys over heads.
        candidates: [batch, n] bool, false for padding and for protected tokens.
        r: [batch] int64, how many tokens go; half of the candidates at most.
        margin: the cosine from which tokens count as a cluster, a number or [batch]; PiToMe has .9 - .9 depth / depths.
        alpha: the scale of ELU below the margin.
        within: the absolute tolerance within which energies and similarities tie.

    Returns:
        `keep` [batch, n] bool and `match` [batch, n] int64.
    """
    if not candidates.shape[1]:
        return candidates.clone(), own_slots(candidates)
    total = candidates.sum(1, keepdim=True)
    r = torch.minimum(r[:, None], total // 2)
    similarity = cosine(features, candidates)
    gathered = F.elu(similarity - _of_each(margin, 3), alpha).masked_fill(~_pairs(candidates), 0.0)
    place = ranks(order_by_similarity(gathered.sum(2) / (total - 1).clamp(min=1), candidates, within))
    a, b = halves(place, candidates & (place < 2 * r))
    best, partner = _edges(unit(features, candidates), a, b, within)
    return _merged(candidates, a, partner, best > -_INFINITY)


@decides
def graph(features: Tensor, candidates: Tensor, r: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Complete-graph soft matching of CrossGET (arXiv 2305.17455).

    Tokens are ranked by their highest cosine to another one. The `r` sources are those for which importance - (the highest
    cosine to a token ranked later) is smallest. Each merges into the most similar of those that are no sources.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool, false for padding and for protected tokens.
        r: [batch] int64, how many tokens go. CrossGET removes half of them at most.
        importance: [batch, n], on the scale of cosines; CrossGET has the cosine to a learned cross token. None for none.

    Returns:
        `keep` [batch, n] bool and `match` [batch, n] int64.
    """
    if not candidates.shape[1]:
        return candidates.clone(), own_slots(candidates)
    similarity = cosine(features, candidates).masked_fill(~_pairs(candidates), -_INFINITY)
    rank = ranks(order_by_similarity(similarity.amax(2), candidates))
    is_later = rank[:, None, :] > rank[:, :, None]
    redundancy = similarity.masked_fill(~is_later, -_INFINITY).amax(2)
    if importance is not None:
        redundancy = redundancy - precision.single(importance).masked_fill(~candidates, 0.0)

    # the token ranked last has none later: it is at the end of the candidates
    redundancy = torch.where(candidates, redundancy.clamp(min=torch.finfo(redundancy.dtype).min), -_INFINITY)
    goes = candidates & (ranks(order_by_similarity(redundancy, candidates)) < r[:, None])
    keep = candidates & ~goes
    largest, best = first_best(similarity.masked_fill(~keep[:, None], -_INFINITY))
    return keep, torch.where(goes & (largest > -_INFINITY), best, own_slots(candidates))


@decides
def local_pairs(
    features: Tensor, candidates: Tensor, windows: Tensor, least_similarity: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Merges each window of similar tokens into one, as the local pooling of ALGM (arXiv 2406.09936).

    A window merges if it has two candidates at least, and the mean cosine of their pairs is `least_similarity` at least.
    Its tokens merge into its first one.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool, false for padding and for protected tokens.
        windows: [batch, n] int64, the window of each token, such as `sampling.grid_windows` of size 2. Negative for none.
        least_similarity: the mean cosine from which a window merges, a number or [batch]; ALGM has .88.

    Returns:
        `keep` [batch, n] bool and `match` [batch, n] int64.
    """
    own = own_slots(candidates)
    if not candidates.shape[1]:
        return candidates.clone(), own
    among = candidates & (windows >= 0)
    together = (windows[:, :, None] == windows[:, None, :]) & among[:, :, None] & among[:, None, :]
    first = torch.where(among, together.int().argmax(2), own)
    merges = (together.sum(2) > 1) & (
        window_cosine(features, candidates, first) >= _of_each(least_similarity, 2) - ROUNDING
    )
    match = torch.where(merges, first, own)
    return candidates & (match == own), match


def window_cosine(features: Tensor, candidates: Tensor, first: Tensor) -> Tensor:
    """The mean cosine of the pairs of each token's window: ALGM (arXiv 2406.09936), section 3.2.

    Of unit vectors it is (||sum_i x_i||^2 - sum_i ||x_i||^2) / (m (m - 1)) over the m tokens i of a window, which compares no
    pair.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool, false for padding and for protected tokens.
        first: [batch, n] int64, the slot of the first token of each one's window; the own slot for a token in none.

    Returns:
        The mean, [batch, n]; 0 for a token alone.
    """
    x = unit(features, candidates)
    total = torch.zeros_like(x).scatter_add(1, first[..., None].expand_as(x), x)
    lengths = x.square().sum(2)
    members, lengths = (torch.zeros_like(lengths).scatter_add(1, first, one) for one in (candidates.to(x), lengths))
    mean = (total.square().sum(2) - lengths) / (members * (members - 1)).clamp(min=1)
    return mean.masked_fill(members < 2, 0.0).gather(1, first)


@decides
def components(features: Tensor, candidates: Tensor, least_similarity: Tensor | float) -> tuple[Tensor, Tensor]:
    """Merges each connected component of the graph of similar tokens into one, as in LLaVA-Scissor (arXiv 2506.21862).

    Two tokens are connected where their cosine is above `least_similarity`. A component merges into its first token. The
    reference samples some nodes at random; here the components are exact.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool, false for padding and for protected tokens.
        least_similarity: the cosine above which tokens are connected, a number or [batch].

    Returns:
        `keep` [batch, n] bool and `match` [batch, n] int64.
    """
    label = own_slots(candidates)
    n = candidates.shape[1]
    if not n:
        return candidates.clone(), label
    similarity = cosine(features, candidates)
    connected = (similarity - _of_each(least_similarity, 3) > ROUNDING) & _pairs(candidates)
    # minimum labels with shortcuts: the square of the logarithm many rounds (Liu and Tarjan, arXiv 1812.06177)
    for _ in range(2 * n.bit_length() ** 2):
        lowest = torch.where(connected, label[:, None], n).amin(2).minimum(label)
        hooked = label.scatter_reduce(1, label, lowest, "amin").minimum(lowest)
        previous, label = label, hooked.gather(1, hooked)
        if precision.surely_none(label != previous):
            break
    return candidates & (label == own_slots(candidates)), label


def _of_each(value: Tensor | float, dims: int) -> Tensor | float:
    """A number, or one of each instance [batch] made broadcastable to [batch, ...] of this many dimensions."""
    return value.reshape(-1, *[1] * (dims - 1)) if isinstance(value, Tensor) else value


def _pairs(candidates: Tensor) -> Tensor:
    """The pairs of different candidates, [batch, n, n] bool."""
    itself = torch.eye(candidates.shape[1], dtype=torch.bool, device=candidates.device)
    return candidates[:, :, None] & candidates[:, None, :] & ~itself


def own_slots(candidates: Tensor) -> Tensor:
    """Each token matched to itself: [batch, n] int64."""
    return positions(candidates).expand_as(candidates).clone()


def halves(order: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """The slots at even and at odd places of a sequence.

    Args:
        order: [batch, n] int64, the place of each token, in 0 .. n.
        taken: [batch, n] bool, the tokens that have a place.

    Returns:
        The slots, [batch, n // 2 + 1] int64 each; n where a place is empty.
    """
    batch, n = order.shape
    m = n // 2 + 1
    # the last place is for tokens that are not taken
    place = torch.where(taken, order, 2 * m)
    sequence = order.new_full((batch, 2 * m + 1), n).scatter_(1, place, positions(order).expand_as(order))
    sequence[:, -1] = n
    return sequence[:, 0 : 2 * m : 2], sequence[:, 1 : 2 * m : 2]


def _edges(x: Tensor, a: Tensor, b: Tensor, within: float = ROUNDING) -> tuple[Tensor, Tensor]:
    """The best edge of each token of A: its cosine [batch, m], minus infinity where none is, and the slot of its partner."""
    n = x.shape[1]
    rows = [x.gather(1, slots.clamp(max=n - 1)[..., None].expand(-1, -1, x.shape[2])) for slots in (a, b)]
    similarity = (rows[0] @ rows[1].mT).masked_fill(((a == n)[:, :, None]) | (b == n)[:, None, :], -_INFINITY)
    largest, best = first_best(similarity, within)
    return largest, b.gather(1, best)


def _merged(candidates: Tensor, a: Tensor, partner: Tensor, merges: Tensor) -> tuple[Tensor, Tensor]:
    """`keep` and `match` when the tokens of slots `a` where `merges` merge into their partners."""
    n = candidates.shape[1]
    slot = torch.where(merges, a, n)
    # one more column, for the places that do not merge
    goes = torch.zeros_like(candidates[:, :1]).expand(-1, n + 1).scatter(1, slot, merges)[:, :n]
    own = positions(candidates.new_empty(candidates.shape[0], n + 1)).expand(candidates.shape[0], -1)
    match = own.scatter(1, slot, torch.where(merges, partner, n))[:, :n]
    return candidates & ~goes, match
