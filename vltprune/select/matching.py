"""Token matching for one instance: which tokens stay, and into which of them the others merge."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.algorithms import matching
from .instance import column, count_of, indices, instance, mask_of, window_ids


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
    features, candidates = instance(x, protected)
    removed = None if r is None else count_of(x, r, "r")[0]
    keep, match = matching.bipartite(features, candidates, removed, least_similarity)
    return indices(keep, candidates), match[0]


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
    features, candidates = instance(x, protected)
    keep, match = matching.energy(features, candidates, count_of(x, r, "r")[0], margin, alpha)
    return indices(keep, candidates), match[0]


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
    features, candidates = instance(x, protected)
    weights = None if importance is None else column(importance, x, "importance")
    removed = torch.minimum(count_of(x, r, "r")[0], candidates.sum(1) // 2)
    keep, match = matching.graph(features, candidates, removed, weights)
    return indices(keep, candidates), match[0]


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
    features, candidates = instance(x, protected)
    keep, match = matching.local_pairs(features, candidates, window_ids(ids, x), least_similarity)
    return indices(keep, candidates), match[0]


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
    features, candidates = instance(x, protected)
    keep, match = matching.components(features, candidates, least_similarity)
    return indices(keep, candidates), match[0]


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
    features, candidates = instance(x, protected)
    kept, match = matching.nearest(features, candidates, mask_of(keep, x, "keep")[None])
    return indices(kept, candidates), match[0]
