"""Presets of methods that prune visual tokens at layers of the language model of a vision-language model.

They prune the tower "language" alone, while it reads the prompt. Tokens that stay keep their original positions, text is
protected, and keepers count visual tokens. Baselines are `random` and `pooling`: `prune(model, "random", at={"language": 1})`.
"""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig
from ..stage import Stage

LANGUAGE = "language"

# SparseVLM's counts behind its three layers, of 576 visual tokens, by the budget that they are published for
_SPARSE = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
_SPARSE_AT = (1 / 16, 3 / 16, 15 / 32)


@presets.register("fastv")
def fastv() -> PruneConfig:
    """FastV (arXiv 2403.06764): half of the visual tokens leave behind the second layer, by the last token's attention in it.

    Attention is the mean over heads. Positions stay as they were, as in the reference.

    **Departs**: tokens leave between attention and MLP, so that the second layer's MLP computes less; what stays is the same.
    Ratios are rounded up, in the reference to the nearest number. Tokens generated later rank nothing again.
    """
    return PruneConfig(scorer="last_attention", keep="ratio(ratio=0.5)", reducer="drop", at={LANGUAGE: 1})


@presets.register("pyramiddrop")
def pyramiddrop() -> PruneConfig:
    """PyramidDrop (arXiv 2410.17247): before three layers half of the visual tokens leave, at each quarter of the depth.

    In LLaVA-1.5 these are layers 8, 16 and 24 of 32. The attention that the layer itself would pay from the last token of the
    instruction ranks them, mean over heads. In training with labels that token is the one before the answer, else the last.

    **Departs**: positions stay as they were; the reference numbers the tokens that are left anew, from 0. Ratios are rounded
    up, of the tokens that are left.
    """
    return PruneConfig(
        scorer="last_attention",
        keep="ratio(ratio=0.5)",
        reducer="drop",
        at={LANGUAGE: (0.25, 0.5, 0.75)},
        place="before",
    )


@presets.register("sparsevlm")
def sparsevlm(tokens: int = 192) -> PruneConfig:
    """SparseVLM (arXiv 2410.04417): the attention of text that resembles the image decides at three layers.

    Of 576 visual tokens 300, 200 and 110 stay at layers 2, 6 and 15 of 32, and of other numbers the same parts. Of those that
    go the best 30 % are recycled: they become 9, 4 and 3 means of clusters (`density_peaks`). So 309, 204 and 113 tokens go
    on: 207 on average, which the paper calls 192. A budget (`calibrate`) sets the power of all these parts.

    **Departs**: positions stay as they were, and a mean stands at the last of its cluster; the reference puts means behind the
    image, and numbers all tokens anew. Clusters have no random noise. Tokens leave before the layer's MLP, and not behind it.

    Args:
        tokens: the budget of 576 tokens whose counts were published: 192, 128, 96 or 64.

    Raises:
        ValueError: for another budget.
    """
    if tokens not in _SPARSE:
        raise ValueError(
            f"sparsevlm(tokens={tokens}): counts are published for {', '.join(map(str, _SPARSE))}. For another number write "
            f"vltprune.calibrate(model, batches, visual_tokens={tokens})"
        )
    entering, stages = 576, []
    for at, kept in zip(_SPARSE_AT, _SPARSE[tokens], strict=True):
        recycled = int(0.3 * (entering - kept)) + 1
        clusters = recycled // 10 + 1
        stages += _recycling(at, entering, kept + recycled, kept + clusters, clusters)
        entering = kept + clusters
    first, *others = stages
    return PruneConfig(**first, then=[Stage(**other) for other in others])


def _recycling(at: float, entering: int, held: int, left: int, clusters: int) -> tuple[dict, dict]:
    """Two stages at one layer: what is not recycled goes, and then the rest becomes means of clusters."""
    common = {"scorer": "text_attention(raters=True)", "at": {LANGUAGE: at}}
    merged = {"selector": f"clusters(number=0, part={clusters / left})", "reducer": "merge(weights='equal')"}
    return {**common, "keep": f"share(share={held / entering})"}, {
        **common,
        **merged,
        "keep": f"share(share={left / held})",
    }


@presets.register("vtw")
def vtw() -> PruneConfig:
    """VTW (arXiv 2405.05803): all visual tokens leave before the middle layer.

    **Departs**: the layer is the middle one; the paper searches it on a small set, and finds 16 of 32 for LLaVA-1.5.
    """
    return PruneConfig(scorer="equal", keep="count(count=0)", reducer="drop", at={LANGUAGE: 0.5}, place="before")
