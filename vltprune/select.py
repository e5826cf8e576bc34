"""Token selection as functions of one instance's features [n, dim]: which tokens stay, and into which the others merge.

They decide as the selectors of pruned models do, for use outside of one: between a vision tower and a language model, say.
Features may have any floating-point dtype and be on any device; everything is computed in single precision at least.
Similarities and scores that are equal within rounding tie, and ties go by position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import choosing, matching, sampling
from .layers.sampling import grid_windows

__all__ = [
    "bipartite",
    "components",
    "deduplicate",
    "dpp",
    "energy",
    "graph",
    "grid_windows",
    "local_pairs",
    "max_min",
    "nearest",
    "outliers",
    "pivots",
    "sample_cdf",
    "spread_uniform",
    "windows",
]


def max_min(x: Tensor, count: int, protected: Tensor | None = None) -> Tensor:
    """Chooses diverse tokens: each is the one farthest from those chosen before it (DivPrune, arXiv 2503.02175).

    The distance is 1 - cosine. The first choice is the token whose nearest other one is farthest.

    Args:
        x: [n, dim], features; DivPrune has the image tokens as they enter the language model.
        count: how many unprotected tokens stay. Larger numbers than there are mean all.
        protected: [n] bool, tokens that stay and take no part. None for none.

    Returns:
        The indices of the tokens that stay, protected ones included, ascending, int64.

    Raises:
        ValueError: for another shape, a negative count, and features that are NaN or infinite.
    """
    features, candidates = _instance(x, protected)
    return _indices(choosing.max_min(features, candidates, *_counts(x, count)), candidates)


def dpp(x: Tensor, scores: Tensor, count: int, protected: Tensor | None = None) -> Tensor:
    """Chooses relevant and diverse tokens by greedy MAP of a DPP (CDPruner, arXiv 2506.10967).

    The kernel of the determinantal point process is L_ij = r_i r_j cos_ij, where r are the scores scaled to 0 .. 1, plus 1e-6.
    Where the chosen tokens span all
    others, the rest are those of largest score, ties by position; the reference chooses by rounding there.

    Args:
        x: [n, dim], features; CDPruner has the image tokens as they enter the language model.
        scores: [n], larger is more relevant, of any scale; CDPruner has minus the mean cosine to the text's embeddings.
        count: how many unprotected tokens stay. Larger numbers than there are mean all.
        protected: [n] bool, tokens that stay and take no part. None for none.

    Returns:
        The indices of the tokens that stay, protected ones included, ascending, int64.

    Raises:
        ValueError: for another shape, a negative count, and features or scores that are NaN or infinite.
    """
    features, candidates = _instance(x, protected)
    counts, most = _counts(x, count)
    return _indices(choosing.dpp(features, candidates, counts, _column(scores, x, "scores"), most), candidates)


def deduplicate(
    x: Tensor, scores: Tensor, count: int, important: float = 0.5, protected: Tensor | None = None
) -> Tensor:
    """Chooses tokens of large score, and of the others those that resemble each other least (VisPruner, arXiv 2412.01818).

    The others are in turn in A and in B, by score at first; up to 8 of A that are most similar to a token of B go, until
    enough have gone. The reference needs an even number of others; here it may be odd.

    Args:
        x: [n, dim], features.
        scores: [n], larger is more important; VisPruner has the class token's attention.
        count: how many unprotected tokens stay. Larger numbers than there are mean all.
        important: the part of `count` that is chosen by score, in 0 .. 1, rounded down.
        protected: [n] bool, tokens that stay and take no part. None for none.

    Returns:
        The indices of the tokens that stay, protected ones included, ascending, int64.

    Raises:
        ValueError: for another shape, a negative count, a part outside 0 .. 1, and features or scores that are NaN or infinite.
    """
    _part(important, "important")
    features, candidates = _instance(x, protected)
    counts, most = _counts(x, count)
    keep = choosing.deduplicate(features, candidates, counts, _column(scores, x, "scores"), important, most)
    return _indices(keep, candidates)


def pivots(x: Tensor, scores: Tensor, count: int, number: int = 10, protected: Tensor | None = None) -> Tensor:
    """Chooses pivots by score, and for each the tokens that resemble it least (DART, arXiv 2502.11494).

    Exactly `count` stay: what cannot be divided among the pivots goes to the first ones. The reference loses it.

    Args:
        x: [n, dim], features; DART has hidden states of an early layer of the language model.
        scores: [n], by which pivots are chosen; DART has the L1 norm of the keys.
        count: how many unprotected tokens stay, pivots included. Larger numbers than there are mean all.
        number: how many pivots; `count` at most.
        protected: [n] bool, tokens that stay and take no part. None for none.

    Returns:
        The indices of the tokens that stay, protected ones included, ascending, int64.

    Raises:
        ValueError: for another shape, a negative count, `number` below 1, and features or scores that are NaN or infinite.
    """
    features, candidates = _instance(x, protected)
    counts, _ = _counts(x, count)
    if _counts(x, number, "number")[1] < 1:
        raise ValueError("number=0 must be 1 or more: tokens are chosen by how little they resemble a pivot")
    return _indices(choosing.pivots(features, candidates, counts, _column(scores, x, "scores"), number), candidates)


def sample_cdf(scores: Tensor, count: int, protected: Tensor | None = None) -> Tensor:
    """Samples tokens by inverse transform of their scores (ATS, arXiv 2111.15667).

    `count` points in equal steps on the cumulative distribution of ascending scores each choose the nearest token. Several may
    choose one, so that fewer stay. Where `count` is no less than the tokens, all stay.

    Args:
        scores: [n], 0 or more; ATS has attention of the class token times the length of the value.
        count: how many points.
        protected: [n] bool, tokens that stay and take no part. None for none.

    Returns:
        The indices of the tokens that stay, protected ones included, ascending, int64.

    Raises:
        ValueError: for another shape, a negative count, and scores that are negative, NaN or infinite.
    """
    rows, candidates = _scored(scores, protected)
    if bool((scores < 0).any()):
        raise ValueError("scores must be 0 or more, since their sums are a distribution: subtract the smallest one")
    return _indices(sampling.sample_cdf(rows, candidates, *_counts(scores, count)), candidates)


def windows(
    scores: Tensor,
    ids: Tensor,
    count: int,
    local_scores: Tensor | None = None,
    local: float = 0.5,
    protected: Tensor | None = None,
) -> Tensor:
    """Chooses a part of the tokens by a quota for each window of a grid, and the others by score (VScan, arXiv 2505.22654).

    Exactly `count` stay: what cannot be divided among the windows is chosen by score anywhere. The reference loses it.

    Args:
        scores: [n], larger is kept longer; VScan has the class token's attention in the last layer but one.
        ids: [n] int64, the window of each token, such as `grid_windows(24, 24, 6)`.
        count: how many unprotected tokens stay. Larger numbers than there are mean all.
        local_scores: [n], the scores inside a window; VScan has those of an early layer. None for `scores`.
        local: the part of `count` that is chosen by window, in 0 .. 1.
        protected: [n] bool, tokens that stay and take no part. None for none.

    Returns:
        The indices of the tokens that stay, protected ones included, ascending, int64.

    Raises:
        ValueError: for another shape, a negative count, a part outside 0 .. 1, and scores that are NaN or infinite.
    """
    _part(local, "local")
    rows, candidates = _scored(scores, protected)
    inside = None if local_scores is None else _column(local_scores, scores, "local_scores")
    counts, _ = _counts(scores, count)
    return _indices(sampling.windows(rows, candidates, counts, _ids(ids, scores, "ids"), inside, local), candidates)


def spread_uniform(x: Tensor, count: int, protected: Tensor | None = None) -> Tensor:
    """Chooses every so many-th token, as the contextual targets of VisionZip (arXiv 2412.04467).

    Args:
        x: [n, dim], features, of which only the number is read.
        count: how many unprotected tokens stay. Larger numbers than there are mean all.
        protected: [n] bool, tokens that stay and take no part. None for none.

    Returns:
        The indices of the tokens that stay, protected ones included, ascending, int64.

    Raises:
        ValueError: for another shape, and a negative count.
    """
    _, candidates = _instance(x, protected)
    return _indices(sampling.spread_uniform(candidates, _counts(x, count)[0]), candidates)


def outliers(scores: Tensor, protected: Tensor | None = None) -> int:
    """Counts tokens of outlying score: above Q3 + 1.5 (Q3 - Q1), as LLaVA-PruMerge does (arXiv 2403.15388).

    Args:
        scores: [n]; PruMerge has the class token's attention.
        protected: [n] bool, tokens that do not count. None for none.

    Returns:
        The number, 0 or more: how many tokens to keep.

    Raises:
        ValueError: for another shape, and scores that are NaN or infinite.
    """
    return int(sampling.outliers(*_scored(scores, protected)))


def bipartite(
    x: Tensor, r: int | None = None, protected: Tensor | None = None, least_similarity: float | None = None
) -> tuple[Tensor, Tensor]:
    """Matches the most similar pairs (ToMe, arXiv 2210.09461) or those above a threshold (DyMU, arXiv 2504.17040).

    Unprotected tokens are in turn in A and in B. Each token of A has an edge to its most similar token of B; the `r` most
    similar edges merge. As in ToMe, a token behind one protected token (a class token) is in B, and behind two in A.
    ToMe's output order is A before B; these indices are in the order of the sequence.

    Args:
        x: [n, dim], features; ToMe has the mean of the keys over heads.
        r: how many tokens go; at most half of the unprotected ones do. None for all above the threshold.
        protected: [n] bool, tokens that neither merge nor are merged into. None for none.
        least_similarity: the cosine from which an edge merges. None for any.

    Returns:
        The indices of the tokens that stay, ascending, int64; and `match` [n] int64, the index of the token that each merges
        into, its own where it stays.

    Raises:
        ValueError: for another shape, a negative `r`, features that are NaN or infinite, and neither `r` nor a threshold.
    """
    features, candidates = _instance(x, protected)
    removed = None if r is None else _counts(x, r, "r")[0]
    keep, match = matching.bipartite(features, candidates, removed, least_similarity)
    return _indices(keep, candidates), match[0]


def energy(
    x: Tensor, r: int, margin: float = 0.5, alpha: float = 1.0, protected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Matches tokens of large clusters, those of the highest energy (PiToMe, arXiv 2405.16148).

    The energy of a token is the mean of ELU(cos - margin) over the others. The 2 r tokens of highest energy are, by rank, in
    turn in A and in B; each of A merges into its most similar of B.

    Args:
        x: [n, dim], features; PiToMe has the mean of the keys over heads.
        r: how many tokens go; at most half of the unprotected ones do.
        margin: the cosine from which tokens count as a cluster; PiToMe has .9 - .9 depth / depths.
        alpha: the scale of ELU below the margin.
        protected: [n] bool, tokens that neither merge nor are merged into. None for none.

    Returns:
        The indices of the tokens that stay, ascending, int64; and `match` [n] int64, the index of the token that each merges
        into, its own where it stays.

    Raises:
        ValueError: for another shape, a negative `r`, and features that are NaN or infinite.
    """
    features, candidates = _instance(x, protected)
    keep, match = matching.energy(features, candidates, _counts(x, r, "r")[0], margin, alpha)
    return _indices(keep, candidates), match[0]


def graph(
    x: Tensor, r: int, importance: Tensor | None = None, protected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Matches tokens by complete-graph soft matching (CrossGET, arXiv 2305.17455).

    Tokens are ranked by their highest cosine to another one. The `r` tokens go for which importance - (the highest cosine to a
    token ranked later) is smallest, each into the most similar of those that stay.

    Args:
        x: [n, dim], features.
        r: how many tokens go; at most half of the unprotected ones do.
        importance: [n], on the scale of cosines; CrossGET has the cosine to a learned cross token. None for none.
        protected: [n] bool, tokens that neither merge nor are merged into. None for none.

    Returns:
        The indices of the tokens that stay, ascending, int64; and `match` [n] int64, the index of the token that each merges
        into, its own where it stays.

    Raises:
        ValueError: for another shape, a negative `r`, and features or importance that are NaN or infinite.
    """
    features, candidates = _instance(x, protected)
    weights = None if importance is None else _column(importance, x, "importance")
    removed = torch.minimum(_counts(x, r, "r")[0], candidates.sum(1) // 2)
    keep, match = matching.graph(features, candidates, removed, weights)
    return _indices(keep, candidates), match[0]


def local_pairs(
    x: Tensor, ids: Tensor, least_similarity: float, protected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merges windows of a grid whose tokens are similar, as the local pooling of ALGM (arXiv 2406.09936).

    Args:
        x: [n, dim], features.
        ids: [n] int64, the window of each token, such as `grid_windows(14, 14, 2)`. Negative for none.
        least_similarity: the mean cosine of a window's pairs from which it becomes one token, its first; ALGM has .88.
        protected: [n] bool, tokens that neither merge nor are merged into. None for none.

    Returns:
        The indices of the tokens that stay, ascending, int64; and `match` [n] int64, the index of the token that each merges
        into, its own where it stays.

    Raises:
        ValueError: for another shape, and features that are NaN or infinite.
    """
    features, candidates = _instance(x, protected)
    keep, match = matching.local_pairs(features, candidates, _ids(ids, x, "ids"), least_similarity)
    return _indices(keep, candidates), match[0]


def components(x: Tensor, least_similarity: float, protected: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merges connected components of similar tokens, each into its first token (LLaVA-Scissor, arXiv 2506.21862).

    Args:
        x: [n, dim], features.
        least_similarity: the cosine above which two tokens are connected.
        protected: [n] bool, tokens that neither merge nor are merged into. None for none.

    Returns:
        The indices of the tokens that stay, ascending, int64; and `match` [n] int64, the index of the token that each merges
        into, its own where it stays.

    Raises:
        ValueError: for another shape, and features that are NaN or infinite.
    """
    features, candidates = _instance(x, protected)
    keep, match = matching.components(features, candidates, least_similarity)
    return _indices(keep, candidates), match[0]


def nearest(x: Tensor, keep: Tensor, protected: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Matches each removed token to its most similar kept one, by cosine.

    This is how VisionZip (arXiv 2412.04467), VScan (arXiv 2505.22654) and DiffRate (arXiv 2305.17997) merge.

    Args:
        x: [n, dim], features.
        keep: [n] bool, the tokens that stay.
        protected: [n] bool, tokens that stay and into which none merges. None for none.

    Returns:
        The indices of the tokens that stay, ascending, int64; and `match` [n] int64, the index of the token that each merges
        into, its own where it stays and where no unprotected token does.

    Raises:
        ValueError: for another shape, and features that are NaN or infinite.
    """
    features, candidates = _instance(x, protected)
    kept, match = matching.nearest(features, candidates, _mask(keep, x, "keep")[None])
    return _indices(kept, candidates), match[0]


def _instance(x: Tensor, protected: Tensor | None) -> tuple[Tensor, Tensor]:
    """The features [1, n, dim] and the unprotected tokens [1, n] bool, checked."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be the features of one instance, [n, dim] of a floating-point dtype, got {list(x.shape)} {x.dtype}:"
            " call it for each instance of a batch"
        )
    _finite(x, "x")
    return x[None], _free(protected, x)


def _scored(scores: Tensor, protected: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scores [1, n] and the unprotected tokens [1, n] bool of a choice without features, checked."""
    if scores.dim() != 1:
        raise ValueError(f"scores must be those of one instance, [n], got {list(scores.shape)}")
    return _column(scores, scores, "scores"), _free(protected, scores)


def _free(protected: Tensor | None, x: Tensor) -> Tensor:
    """The unprotected tokens of x [n, ...], [1, n] bool."""
    if protected is None:
        return torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    return ~_mask(protected, x, "protected")[None]


def _ids(ids: Tensor, x: Tensor, name: str) -> Tensor:
    """Window ids [n] as [1, n] on the device of x [n, ...], checked."""
    if ids.shape != x.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(
            f"{name} must be [{len(x)}] int64, the window of each token, got {list(ids.shape)} {ids.dtype}"
        )
    return ids.to(x.device)[None]


def _part(part: float, name: str) -> None:
    """Refuses what is no part of a count."""
    if not 0 <= part <= 1:
        raise ValueError(f"{name}={part!r} must be in 0 .. 1: the part of count that is chosen so")


def _mask(mask: Tensor, x: Tensor, name: str) -> Tensor:
    """A mask [n] bool on the device of x [n, ...], checked."""
    if mask.shape != x.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be [{len(x)}] bool, one a row of x, got {list(mask.shape)} {mask.dtype}")
    return mask.to(x.device)


def _column(values: Tensor, x: Tensor, name: str) -> Tensor:
    """Numbers [n] as [1, n] on the device of x [n, ...], checked."""
    if values.shape != x.shape[:1] or not values.is_floating_point():
        raise ValueError(
            f"{name} must be [{len(x)}] of a floating-point dtype, one a row of x, got {list(values.shape)} {values.dtype}"
        )
    _finite(values, name)
    return values.to(x.device)[None]


def _finite(values: Tensor, name: str) -> None:
    """Refuses NaN and infinity."""
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity: check what computed it; half precision overflows at 65,504")


def _counts(x: Tensor, count: int, name: str = "count") -> tuple[Tensor, int]:
    """A count as [1] int64 on the device of x, and as the integer that it is, checked."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{name}={count!r} must be a whole number of tokens, 0 or more")
    return torch.tensor([count], device=x.device), count


def _indices(keep: Tensor, candidates: Tensor) -> Tensor:
    """The indices of what stays: kept candidates and all protected tokens."""
    return (keep | ~candidates)[0].nonzero().squeeze(1)
