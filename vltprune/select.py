"""Token selection as functions of one instance's features [n, dim]: which tokens stay, and into which the others merge.

They decide as the selectors of pruned models do, for use outside of one: between a vision tower and a language model, say.
Features may have any floating-point dtype and be on any device; everything is computed in single precision at least.
Similarities and scores that are equal within rounding tie, and ties go by position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import choosing, matching

__all__ = ["bipartite", "dpp", "max_min", "nearest"]


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
    if protected is None:
        return x[None], torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    return x[None], ~_mask(protected, x, "protected")[None]


def _mask(mask: Tensor, x: Tensor, name: str) -> Tensor:
    """A mask [n] bool on the device of x [n, dim], checked."""
    if mask.shape != x.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be [{len(x)}] bool, one a row of x, got {list(mask.shape)} {mask.dtype}")
    return mask.to(x.device)


def _column(values: Tensor, x: Tensor, name: str) -> Tensor:
    """Numbers [n] as [1, n] on the device of x [n, dim], checked."""
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
