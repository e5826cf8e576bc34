"""Presets of methods that prune visual tokens at layers of the language model of a vision-language model.

They prune the tower "language" alone, while it reads the prompt. Tokens that stay keep their original positions, text is
protected, and keepers count visual tokens. Baselines are `random` and `pooling`: `prune(model, "random", at={"language": 1})`.
"""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig
from ..stage import Stage

LANGUAGE = "language"


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
    """PyramidDrop (arXiv 2410.17247): at a quarter, half and three quarters of the layers half of the visual tokens leave.

    The attention of the prompt's last token ranks them, mean over heads: in LLaVA-1.5 at layers 8, 16 and 24 of 32.

    **Departs**: positions stay as they were; the reference numbers the tokens that are left anew, from 0. Tokens leave behind
    the attention of the layer that ranks them, which the reference computes for the ranking alone and then again without them.
    Ratios are rounded up, of the tokens that are left. In training the last token is that of the answer, in the reference of
    the instruction.
    """
    return PruneConfig(
        scorer="last_attention", keep="ratio(ratio=0.5)", reducer="drop", at={LANGUAGE: (0.25, 0.5, 0.75)}
    )


@presets.register("sparsevlm")
def sparsevlm() -> PruneConfig:
    """SparseVLM (arXiv 2410.04417), its budget of 192 for 576 visual tokens: the text's attention decides at three layers.

    At layers 2, 6 and 15 of 32 stay 300, 200 and 110. Of those that go the best 30 % are recycled: they become 9, 4 and 3
    means of clusters (`density_peaks`), so that 309, 204 and 113 tokens go on. Where there are fewer, all stay.

    **Departs**: all text tokens rate; the reference takes those that resemble the image more than the average. Positions stay
    as they were, and a mean stands at the last of its cluster; the reference puts means behind the image, and numbers all
    tokens anew. Clusters have no random noise. Tokens of the second and third stage are ranked among the means too, as there.
    """
    stages = ((1 / 16, 382, 309, 9), (3 / 16, 232, 204, 4), (15 / 32, 138, 113, 3))
    first, *others = [stage for at, *numbers in stages for stage in _recycling(at, *numbers)]
    return PruneConfig(**first, then=[Stage(**other) for other in others])


def _recycling(at: float, kept: int, left: int, clusters: int) -> tuple[dict, dict]:
    """Two stages at one layer: what is not recycled goes, and then the rest becomes means of clusters."""
    common = {"scorer": "text_attention", "at": {LANGUAGE: at}}
    merged = {"selector": f"clusters(number={clusters})", "reducer": "merge(weights='equal')"}
    return {**common, "keep": f"count(count={kept})"}, {**common, **merged, "keep": f"count(count={left})"}


@presets.register("vtw")
def vtw() -> PruneConfig:
    """VTW (arXiv 2405.05803): all visual tokens leave before the middle layer.

    **Departs**: the layer is the middle one; the paper searches it on a small set, and finds 16 of 32 for LLaVA-1.5.
    """
    # the MLP of the layer before computes on the text alone
    return PruneConfig(scorer="equal", keep="count(count=0)", reducer="drop", at={LANGUAGE: 0.49})
