"""Presets of methods that shorten what a vision tower gives to a language model: by default behind the last block.

Each also works inside a tower, `prune(model, "divprune", place="block", at=(3, 6))`, where later blocks then cost less.
"""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig
from ..stage import Stage


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
    """CDPruner (arXiv 2506.10967): diverse patches that are relevant to a text, by greedy MAP of a determinantal point process.

    The kernel is the cosine of patches times the relevance of both. In CLIP that is minus the mean cosine of a patch's
    embedding to those of the text that `vltprune.query` gives. In a vision-language model with a language model it is the mean
    cosine of a token behind the projector to the embeddings of its prompt's words, with no change of sign, which the authors
    saw in CLIP alone; `vltprune.query` takes the prompt's place. Without a text all patches are equally relevant.

    **Departs**: in LLaVA the paper reads CLIP's text encoder, which the model does not hold; this reads the prompt. All of a
    prompt's words count, those of a chat template too. Relevance is scaled within an image, not over the batch. Similarity of
    patches is of the tokens behind the last block, the paper's is of projected ones. Where the chosen patches span all others,
    the rest is chosen by score and not by rounding. Other towers whose host knows no projection to the text's space
    (`text_embedding`) have to learn one.
    """
    return PruneConfig(
        scorer="query_relevance(negate=True)",
        keep="ratio(ratio=0.25)",
        reducer="drop",
        guide="text_embedding(required=False)",
        selector="dpp",
        place="output",
    )


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


@presets.register("visionzip")
def visionzip() -> PruneConfig:
    """VisionZip (arXiv 2412.04467): dominant patches by class attention, and the rest added to evenly chosen others.

    Of 64 patches 54 are dominant, of other counts the same part. Each other one goes to the most similar of the evenly chosen
    ones by its keys: x_target + mean of what it gathers, a sum of both.

    **Departs**: as `fastervlm` does. Keys are means over heads, as in the original; LightCompress has them whole. Tokens stay
    in spatial order, where the reference puts the evenly chosen ones last.
    """
    return PruneConfig(
        scorer="mean_cls_attention",
        keep="ratio(ratio=0.25)",
        reducer="add",
        selector="dominant(part=0.84375)",
        place="output",
    )


@presets.register("prumerge")
def prumerge() -> PruneConfig:
    """LLaVA-PruMerge (arXiv 2403.15388): as many patches as have outlying class attention, to which similar ones are added.

    Attention is that of all heads as one. A patch that stays gains sum_j a_j x_j over the 32 patches of most similar keys, and
    all patches that go become one more token. PruMerge+ keeps evenly chosen patches besides: write
    keep="outliers(samples=3.0)", selector="evenly". A budget sets how outlying attention must be, from one patch to all.

    **Departs**: keys are means over heads. Quartiles are of an image, where the reference has those of the batch. Tokens stay
    in spatial order, and the one more stands at the last patch that goes. Features and attention are those of the same last
    block. An image that keeps all its patches is left as it is.
    """
    return PruneConfig(scorer="wide_cls_attention", keep="outliers", reducer="add_neighbors", place="output")


@presets.register("hiprune")
def hiprune() -> PruneConfig:
    """HiPrune (arXiv 2508.00553): anchors by attention received in a middle block with their neighbors, then by the last block.

    Attention received is the mean over heads and queries. The middle block is at three eighths of the depth, CLIP's 10th of
    24.

    **Departs**: the last block's attention is that of the tower's last block; the reference has the last but one. Neighbors
    are in the grid; the reference does not look where a row ends. Class token and registers are protected.
    """
    return PruneConfig(
        scorer="column_attention",
        keep="ratio(ratio=0.25)",
        reducer="drop",
        selector="anchors(part=0.1)",
        place="output",
        then=(Stage("remember(scorer='column_attention')", "all", at=0.375),),
    )


@presets.register("vscan")
def vscan() -> PruneConfig:
    """VScan (arXiv 2505.22654), the stage in the vision tower: half by class attention, half by window, the rest merged.

    Windows of 6 x 6 patches have equal quotas, by the class attention of an early block, CLIP's 6th of 24. Each patch that
    goes becomes part of the most similar one that stays, by a mean.

    **Departs**: as `fastervlm` does. Similarity is of keys; the reference has projected tokens. What cannot be divided among
    windows is chosen by score, where the reference loses it. Its second stage, in the language model, is left out.
    """
    return PruneConfig(
        scorer="mean_cls_attention",
        keep="ratio(ratio=0.25)",
        reducer="merge(weights='equal')",
        selector="windows(size=6, local=0.5)",
        place="output",
        then=(Stage("remember(scorer='mean_cls_attention')", "all", at=0.21),),
    )


@presets.register("flowcut")
def flowcut() -> PruneConfig:
    """FlowCut (arXiv 2505.19536): class attention and likeness to the class token's value, smoothed over all blocks.

    It prunes inside the tower, behind every second block, so that later blocks cost less: more where class attention is less
    even, and to 64 patches behind the last block.

    **Departs**: the reference's last block is the tower's last but one: give it a tower without its last block. Every image has
    its own counts, where the reference removes as many of each image of a batch as of the one that loses most.
    """
    return PruneConfig(scorer="flowcut", keep="entropy(count=64.0)", reducer="drop", place="block")


@presets.register("scissor")
def scissor() -> PruneConfig:
    """LLaVA-Scissor (arXiv 2506.21862) for one image: the mean of each connected component of similar patches.

    Components are of patches whose cosine is above 0.9. At most half of the patches stay: the largest components, with which
    others are merged.

    All patches are then added to the most similar of these means, as there.

    **Departs**: components are exact, where the reference samples nodes. Frames are separate images, so that nothing is merged
    over time. The keeper limits the number.
    """
    return PruneConfig(
        scorer="equal",
        keep="ratio(ratio=0.5)",
        reducer="reassign",
        selector="components(least_similarity=0.9)",
        place="output",
    )
