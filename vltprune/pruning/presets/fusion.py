"""Presets for single-stream transformers such as ViLT, where the tokens of a text and of an image are one sequence."""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig
from ..stage import Stage


@presets.register("pumer")
def pumer() -> PruneConfig:
    """PuMer (arXiv 2305.17530): the text's attention prunes patches; then similar tokens of each modality merge.

    At the 3rd, 6th and 9th of twelve blocks 90 % of the patches stay, those that the text attends to most. Of these, a third
    merge into similar ones, and of the text a fifth. Tokens that become one are averaged, and later attention ignores sizes.
    Ratios and blocks are those of the authors' ViLT for VQA and NLVR2. A budget sets the same ratio for all three stages.

    **Departs**: ratios are of the tokens of an instance without class tokens. The reference takes them of padded lengths, and
    the patches to merge of the number before pruning. Both class tokens stay; in the reference the image's may be pruned.
    Attention that padding pays does not count. Patches are in the order of the image when pairs are matched, and not in that of
    their scores. The paper fine-tunes with distillation; here a model is pruned as it is.
    """
    at = (1 / 6, 5 / 12, 2 / 3)
    merging = {"selector": "bipartite", "reducer": "merge(weights='equal')", "at": at}
    return PruneConfig(
        scorer="text_attention",
        keep="ratio(ratio=0.9)",
        reducer="drop",
        at=at,
        modality="image",
        then=(
            Stage("equal", "ratio(ratio=0.667)", modality="image", **merging),
            Stage("equal", "ratio(ratio=0.8)", modality="text", **merging),
        ),
    )
