"""Token choice for one instance: which tokens stay, as indices."""

from __future__ import annotations

from torch import Tensor

from ..layers.algorithms import choosing, sampling
from .instance import check_part_of_count, column, count_of, indices, instance, scored, window_ids


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
    features, candidates = instance(x, protected)
    return indices(choosing.max_min(features, candidates, *count_of(x, count)), candidates)


def dpp(x: Tensor, scores: Tensor, count: int, protected: Tensor | None = None) -> Tensor:
    """Chooses relevant and diverse tokens by greedy MAP of a DPP (CDPruner, arXiv 2506.10967).

    The kernel of the determinantal point process is L_ij = r_i r_j cos_ij, where r are the scores scaled to 0 .. 1, plus 1e-6.
    Where the chosen tokens span all others, the rest are those of largest score, ties by position; the reference chooses by
    rounding there.

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
    features, candidates = instance(x, protected)
    counts, most = count_of(x, count)
    return indices(choosing.dpp(features, candidates, counts, column(scores, x, "scores"), most), candidates)


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
    check_part_of_count(important, "important")
    features, candidates = instance(x, protected)
    counts, most = count_of(x, count)
    keep = choosing.deduplicate(features, candidates, counts, column(scores, x, "scores"), important, most)
    return indices(keep, candidates)


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
    features, candidates = instance(x, protected)
    counts, _ = count_of(x, count)
    if count_of(x, number, "number")[1] < 1:
        raise ValueError("number=0 must be 1 or more: tokens are chosen by how little they resemble a pivot")
    return indices(choosing.pivots(features, candidates, counts, column(scores, x, "scores"), number), candidates)


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
    rows, candidates = scored(scores, protected)
    if bool((scores < 0).any()):
        raise ValueError("scores must be 0 or more, since their sums are a distribution: subtract the smallest one")
    return indices(sampling.sample_cdf(rows, candidates, *count_of(scores, count)), candidates)


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
    check_part_of_count(local, "local")
    rows, candidates = scored(scores, protected)
    inside = None if local_scores is None else column(local_scores, scores, "local_scores")
    counts, _ = count_of(scores, count)
    return indices(sampling.windows(rows, candidates, counts, window_ids(ids, scores), inside, local), candidates)


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
    _, candidates = instance(x, protected)
    return indices(sampling.spread_uniform(candidates, count_of(x, count)[0]), candidates)


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
    return int(sampling.outliers(*scored(scores, protected)))
