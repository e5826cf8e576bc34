"""Presets of methods that shorten what a vision tower gives to a language model: by default behind the last block.

Each also works inside a tower, `prune(model, "divprune", place="block", at=(3, 6))`, where later blocks then cost less.
"""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig


@presets.register("fastervlm")
def fastervlm() -> PruneConfig:
    """FasterVLM (arXiv 2412.01818, version 1): the patches that the class token attends to most, mean over heads.

    **Departs**: attention is that of the last block that the tower runs. The reference takes tokens and attention of CLIP's
    last block but one: give it a tower without its last block. Class token and registers stay; the reference drops them.
    """
    return PruneConfig(scorer="mean_cls_attention", keep="ratio(ratio=0.25)", reducer="drop", place="output")


@presets.register("vispruner")
def vispruner() -> PruneConfig:
    """VisPruner (arXiv 2412.01818, version 2): half by the class token's attention, half by de-duplication of the others.

    **Departs**: as `fastervlm` does. Similarity is of the tokens behind the last block, as in the reference, but an odd
    number of others is divided with one more in the first half, where the reference cannot run.
    """
    return PruneConfig(
        scorer="mean_cls_attention",
        keep="ratio(ratio=0.25)",
        reducer="drop",
        selector="deduplicate(important=0.5)",
        place="output",
    )


@presets.register("divprune")
def divprune() -> PruneConfig:
    """DivPrune (arXiv 2503.02175): the patches that lie farthest apart by cosine, by greedy max-min choice. No score is read.

    **Departs**: distances are of the tokens behind the last block; the paper has what the projector makes of them. A keeper
    rounds ratios up, the reference to the nearest number. Equal distances go to the first token.
    """
    return PruneConfig(scorer="equal", keep="ratio(ratio=0.25)", reducer="drop", selector="max_min", place="output")


@presets.register("cdpruner")
def cdpruner() -> PruneConfig:
    """CDPruner (arXiv 2506.10967) without its text: diverse patches by greedy MAP of a determinantal point process.

    The kernel is the cosine of tokens times the relevance of both, which is equal here. For relevance choose a scorer:
    `scorer="alignment"` with a guide, or `scorer="mean_cls_attention"`.

    **Departs**: relevance in the paper is minus the mean cosine of CLIP's patch embedding and its embeddings of the question,
    which a tower does not know. Scores are scaled within an image, not over the batch. Cosines are of the tokens behind the
    last block, the paper's are of projected ones. Where the chosen patches span all others, the rest is chosen by score and
    not by rounding.
    """
    return PruneConfig(scorer="equal", keep="ratio(ratio=0.25)", reducer="drop", selector="dpp", place="output")


@presets.register("dart")
def dart() -> PruneConfig:
    """DART (arXiv 2502.11494): 8 pivots of largest keys, and for each in turn the tokens that resemble it least.

    **Departs**: it prunes behind a vision tower, by the keys of its last block and without pivots among the words; the paper
    prunes in the second layer of the language model. Exactly as many stay as the keeper says, pivots included. Pivots come in
    order of their keys' L1 norm; the reference takes them in the order of a set. Features are not normalized by a final norm
    first.
    """
    return PruneConfig(
        scorer="key_norm", keep="ratio(ratio=0.25)", reducer="drop", selector="pivots(number=8)", place="output"
    )
