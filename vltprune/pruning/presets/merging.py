"""Presets of methods that merge similar tokens."""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig
from ..stage import Stage


@presets.register("tome")
def tome() -> PruneConfig:
    """ToMe (arXiv 2210.09461): at every block the 8 most similar pairs merge, and attention is in proportion to size.

    The results are those of the published algorithm with `keep="remove(r=8)"`, for any r.

    **Departs**: tokens stay in the order of the sequence. Averages over the tokens of a tower weigh them by size.
    """
    return PruneConfig(
        scorer="equal", keep="remove(r=8)", selector="bipartite", reducer="merge(weights='size', proportional=True)"
    )


@presets.register("tofu")
def tofu() -> PruneConfig:
    """ToFu (arXiv 2312.01026): ToMe's matching; pairs are pruned in the first half of the blocks and merged by MLERP later.

    **Departs**: the paper chooses the depth from which it merges by a test of linearity; here it is half. A mean of several
    tokens weighs them alike, and has the largest of their norms. (A re-implementation scales by the largest norm over that
    of one token instead, so that norms are not preserved.) There is no official code.
    """
    return PruneConfig(scorer="equal", keep="remove(r=8)", selector="bipartite", reducer="tofu(merge_from=0.5)")


@presets.register("pitome")
def pitome() -> PruneConfig:
    """PiToMe (arXiv 2405.16148): at every block 85 % of the tokens stay; those in large groups of similar ones merge.

    **Departs**: counts are of the unprotected tokens, ceil(ratio * n). Sizes weigh tokens in means and in attention, as in the
    paper; the reference's code for timm passes none to attention, and has a margin of .5 in every block.
    """
    return PruneConfig(
        scorer="equal",
        keep="ratio(ratio=0.85)",
        selector="energy(margin=0.9)",
        reducer="merge(weights='size', proportional=True)",
    )


@presets.register("dymu")
def dymu() -> PruneConfig:
    """DyMU's token merging (arXiv 2504.17040): at every block, each image merges its pairs nearer than the block's threshold.

    Calibration fits the thresholds to images, so that a ratio of all their tokens stays at each block: .1 until then. So
    every image has its own count, and simple ones are cheaper.

    **Departs**: the ratio is that of the tokens that enter a block, where the paper removes as many at each on average. Virtual
    unmerging for language models is not done.
    """
    return PruneConfig(
        scorer="pair_distance",
        keep="fitted_threshold(threshold=0.1)",
        selector="bipartite",
        reducer="merge(weights='size', proportional=True)",
    )


@presets.register("mctf")
def mctf() -> PruneConfig:
    """MCTF (arXiv 2403.10030): behind every block, the 16 pairs that are similar, little attended to and small merge.

    **Departs**: attention is that of the block itself; the paper computes that of the next block in advance. The last block is
    pruned too, where only averages over tokens are cheaper for it.
    """
    return PruneConfig(
        scorer="equal",
        keep="remove(r=16)",
        selector="mctf",
        reducer="merge(weights='attention', proportional=True)",
        place="block",
    )


@presets.register("crossget")
def crossget() -> PruneConfig:
    """CrossGET (arXiv 2305.17455): complete-graph matching at every block, with importance from the guide.

    **Departs**: the paper trains a cross token for each tower, whose cosine to a token is its importance. Here the affinity to
    the anchors that the towers share stands for it, scaled to 0 .. 1.
    """
    return PruneConfig(
        scorer="alignment",
        keep="ratio(ratio=0.85)",
        selector="graph",
        reducer="merge(weights='score', proportional=True)",
        guide="codebook(anchors=100)",
    )


@presets.register("algm")
def algm() -> PruneConfig:
    """ALGM (arXiv 2406.09936): windows of similar patches merge in the first block, similar pairs in the fifth of twelve.

    A window of 2 x 2 patches merges where its mean cosine is .88 at least. Later, pairs merge whose cosine is above the mean by
    a fifth of a standard deviation. Calibration fits both thresholds to images, so that the same ratio of tokens stays at each.

    **Departs**: thresholds and counts are those of each image; the reference takes the mean threshold of the batch, and merges
    as many pairs as the image with the fewest. Contents are those that enter a block. Tokens are not copied back to patches.
    """
    return PruneConfig(
        scorer="window_distance(size=2)",
        keep="fitted_threshold(threshold=0.12)",
        selector="window(size=2)",
        reducer="merge(weights='size')",
        at=0,
        then=(
            Stage(
                scorer="pair_distance(by='content', standardize=True)",
                keep="fitted_threshold(threshold=-0.2)",
                selector="bipartite(by='content')",
                reducer="merge(weights='size')",
                at=(1 / 3,),
            ),
        ),
    )


@presets.register("diffrate")
def diffrate() -> PruneConfig:
    """DiffRate (arXiv 2305.17997): at every block, tokens of little class attention are dropped, and further ones merged.

    `diffrate_counts` has the published numbers of tokens for DeiT. This preset keeps the same ratios in every block.

    **Departs**: sizes are exact; the reference multiplies those of merged tokens by their similarity. Contents are compared as
    they enter a block. Ratios are learned in the paper.
    """
    return _drop_then_merge("ratio(ratio=0.85)", "ratio(ratio=0.925)")


def diffrate_counts(model: str, gflops: float) -> PruneConfig:
    """DiffRate with the published numbers of tokens, for DeiT at 224 px: vp.prune(vit, diffrate_counts("deit_small", 2.9)).

    Args:
        model: "deit_tiny", "deit_small" or "deit_base".
        gflops: the published cost, in billions of multiply-accumulates.

    Returns:
        The config, for towers of twelve blocks and 197 tokens.

    Raises:
        LookupError: for another model or cost.
    """
    if (model, gflops) not in _DIFFRATE:
        known = ", ".join(f"diffrate_counts{key}" for key in _DIFFRATE)
        raise LookupError(
            f"there are no published counts for diffrate_counts({model!r}, {gflops}): write one of {known}"
        )
    # without the class token
    dropped, merged = (tuple(count - 1 for count in counts) for counts in _DIFFRATE[model, gflops])
    return _drop_then_merge(f"counts({dropped})", f"counts({merged})")


def _drop_then_merge(drop: str, merge: str) -> PruneConfig:
    """DiffRate with a keeper for each of its two steps."""
    reducer = "merge(weights='equal', proportional=True, by='content')"
    then = Stage(scorer="mean_cls_attention", keep=merge, reducer=reducer)
    return PruneConfig(scorer="mean_cls_attention", keep=drop, reducer="drop", then=(then,))


# tokens behind dropping and behind merging, the class token included: OpenGVLab/DiffRate, compression_rate.json
_DIFFRATE: dict[tuple[str, float], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("deit_tiny", 0.6): (
        (197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3),
        (197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3),
    ),
    ("deit_tiny", 0.7): (
        (197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3),
        (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3),
    ),
    ("deit_tiny", 0.8): (
        (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
        (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
    ),
    ("deit_tiny", 0.9): (
        (197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3),
        (197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3),
    ),
    ("deit_tiny", 1.0): (
        (197, 197, 196, 194, 188, 184, 178, 164, 156, 137, 129, 21),
        (197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21),
    ),
    ("deit_small", 2.3): (
        (197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
        (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
    ),
    ("deit_small", 2.5): (
        (197, 192, 174, 156, 131, 115, 111, 99, 76, 50, 39, 3),
        (197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3),
    ),
    ("deit_small", 2.7): (
        (197, 196, 182, 160, 141, 127, 115, 105, 88, 66, 49, 3),
        (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3),
    ),
    ("deit_small", 2.9): (
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
    ("deit_small", 3.1): (
        (197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3),
        (197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3),
    ),
    ("deit_base", 8.7): (
        (197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3),
        (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3),
    ),
    ("deit_base", 10.0): (
        (197, 194, 182, 168, 148, 129, 113, 101, 82, 49, 25, 3),
        (197, 186, 174, 156, 137, 117, 105, 90, 66, 31, 19, 3),
    ),
    ("deit_base", 10.4): (
        (197, 196, 188, 174, 156, 141, 121, 103, 90, 58, 25, 3),
        (197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3),
    ),
    ("deit_base", 11.5): (
        (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
        (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
    ),
    ("deit_base", 12.5): (
        (197, 197, 196, 192, 184, 170, 154, 139, 129, 94, 58, 3),
        (197, 196, 194, 190, 176, 160, 145, 131, 115, 68, 47, 3),
    ),
}
