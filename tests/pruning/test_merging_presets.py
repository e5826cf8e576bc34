"""Presets that merge, against the formulas of their papers: image by image, in plain loops, over all layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from test_tome import vit
from torch import Tensor
from torch.testing import assert_close

import vltprune as vp
from vltprune.pruning.presets.merging import diffrate_counts

PATCHES = 5  # 25 tokens, an odd number


@dataclass
class Block:
    """One block of one image: contents x as they merge and `entered`, as they entered; the class token is the first row."""

    x: Tensor
    entered: Tensor
    size: Tensor
    key: Tensor
    attention: Tensor
    depth: int

    @property
    def free(self) -> list[int]:
        return list(range(1, len(self.x)))

    @property
    def by_class(self) -> Tensor:
        return self.attention[:, 0].mean(0)

    def merge(self, groups: list[list[int]], weights: Tensor) -> None:
        """Replaces the rows by the weighted mean of each group, the class token first."""
        groups = [[0], *groups]
        self.x = torch.stack([(self.x[g] * weights[g, None]).sum(0) / weights[g].sum() for g in groups])
        self.size = torch.stack([self.size[g].sum() for g in groups])


def run(model, image: Tensor, step: Callable[[Block], None], behind=False, proportional=True) -> Tensor:
    """The logits of one image [1, 3, height, width], with a step after the attention of each block, or behind each block."""
    x, depth = model.norm_pre(model._pos_embed(model.patch_embed(image)))[0], 0
    size = torch.ones(len(x))
    for depth, block in enumerate(model.blocks):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        weight = (q @ k.transpose(1, 2) * attn.scale + size.log() * proportional).softmax(-1)
        out = x + attn.proj((weight @ v).transpose(0, 1).reshape(len(x), -1))
        if behind:
            out = out + block.mlp(block.norm2(out))
        now = Block(out, out if behind else x, size, k.mean(0), weight, depth)
        step(now)
        x, size = now.x, now.size
        x = x if behind else x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x[None]))


def cosines(features: Tensor) -> Tensor:
    features = features / features.norm(dim=1, keepdim=True)
    return features @ features.T


def halves(n: int) -> tuple[list[int], list[int]]:
    """The even and the odd rows, without the class token."""
    return list(range(2, n, 2)), list(range(1, n, 2))


def grouped(stay: list[int], into: dict[int, int]) -> list[list[int]]:
    """The rows that stay, each with those that go into it."""
    return [[i, *(j for j, target in into.items() if target == i)] for i in stay]


def bipartite(similarity: Tensor, chosen: Callable[[list[int], dict[int, float]], list[int]]) -> list[list[int]]:
    """ToMe's groups in its order, unmerged A and then B, for the rows of A that `chosen` picks."""
    a, b = halves(len(similarity))
    if not b or not a:
        return [[i] for i in (*a, *b)]
    best = {i: max(b, key=lambda j: float(similarity[i, j])) for i in a}
    goes = chosen(a, {i: float(similarity[i, best[i]]) for i in a})
    return grouped([i for i in a if i not in goes] + b, {i: best[i] for i in goes})


def most_similar(r: int):
    def chosen(a, similarity):
        free = sum(1 for _ in a)
        return sorted(a, key=lambda i: -similarity[i])[: min(r, free)]

    return chosen


def tofu(r: int):
    def step(block: Block) -> None:
        removed = min(r, len(block.free) // 2)
        groups = bipartite(cosines(block.key), most_similar(removed))
        if block.depth < 3:
            block.merge([g[:1] for g in groups], torch.ones(len(block.x)))
            return
        norms = [block.x[g].norm(dim=1).max() for g in groups]
        block.merge(groups, torch.ones(len(block.x)))
        for row, (group, norm) in enumerate(zip(groups, norms, strict=True), 1):
            if len(group) > 1:
                block.x[row] *= norm / block.x[row].norm()

    return step


def pitome(ratio: float):
    def step(block: Block) -> None:
        similarity, free = cosines(block.key), block.free
        r, margin = len(free) - math.ceil(ratio * len(free) - 1e-9), 0.9 - 0.9 * block.depth / 6
        energy = {i: torch.nn.functional.elu(similarity[i, free] - margin).mean() for i in free}
        ranked = sorted(free, key=lambda i: -float(energy[i]))
        a, b = ranked[: 2 * r : 2], ranked[1 : 2 * r : 2]
        into = {i: max(b, key=lambda j: float(similarity[i, j])) for i in a}
        block.merge(grouped([i for i in free if i not in a], into), block.size)

    return step


def dymu(level: float):
    def step(block: Block) -> None:
        near = bipartite(cosines(block.key), lambda a, similarity: [i for i in a if 1 - similarity[i] <= level])
        block.merge(near, block.size)

    return step


def mctf(r: int):
    def step(block: Block) -> None:
        n, free = len(block.x), block.free
        removed, (a, b) = min(r, len(free) // 2), halves(n)
        received = block.attention.mean((0, 1))
        u = 1 / received
        weight = ((cosines(block.x) + 1) / 2) * torch.outer(u, u) ** (1 / 20)
        weight *= torch.outer(1 / block.size, 1 / block.size) ** (1 / 40)
        best = {i: max(b, key=lambda j: float(weight[i, j])) for i in a} if b else {}
        first = sorted(best, key=lambda i: -float(weight[i, best[i]]))[: removed // 2]
        left = [i for i in a if i not in first]
        best_b = {j: max(left, key=lambda i: float(weight[i, j])) for j in b} if left else {}
        ranked = sorted(best_b, key=lambda j: -float(weight[best_b[j], j]))
        second = ranked[: removed - removed // 2]
        into = {j: best_b[j] for j in second}
        into |= {i: into.get(best[i], best[i]) for i in first}
        stay = left + (ranked[len(second) :] if left else b)
        block.merge(grouped(stay, into), received * block.size)

    return step


def crossget(ratio: float):
    def step(block: Block) -> None:
        similarity, free, score = cosines(block.key), block.free, block.by_class
        r = len(free) - math.ceil(ratio * len(free) - 1e-9)
        low, high = score[free].min(), score[free].max()
        importance = (score - low) / (high - low).clamp(min=1e-30)
        highest = {i: max(float(similarity[i, j]) for j in free if j != i) for i in free} if len(free) > 1 else {}
        ranked = sorted(highest, key=lambda i: -highest[i])
        cost = {
            i: float(importance[i]) - max((float(similarity[i, j]) for j in ranked[n + 1 :]), default=-9.0)
            for n, i in enumerate(ranked)
        }
        sources = sorted(ranked, key=lambda i: cost[i])[:r]
        stay = [i for i in free if i not in sources]
        into = {i: max(stay, key=lambda j: float(similarity[i, j])) for i in sources}
        # of a pair, the softmax of both scores, times sizes
        block.merge(grouped(stay, into), block.size * score.exp())

    return step


def algm(level: float):
    def step(block: Block) -> None:
        if block.depth == 0:
            similarity, groups = cosines(block.entered), []
            for row in range(0, PATCHES, 2):
                for column in range(0, PATCHES, 2):
                    square = [(row + i, column + j) for i in (0, 1) for j in (0, 1)]
                    window = [1 + y * PATCHES + x for y, x in square if max(y, x) < PATCHES]
                    pairs = [float(similarity[i, j]) for i in window for j in window if i != j]
                    merges = pairs and 1 - sum(pairs) / len(pairs) <= level
                    groups += [window] if merges else [[i] for i in window]
            block.merge(sorted(groups), block.size)
        elif block.depth == 2:

            def far_above(a, similarity):
                values = torch.tensor([similarity[i] for i in a])
                threshold = values.mean() + 0.2 * values.std(unbiased=False)
                return [i for i in a if similarity[i] >= threshold]

            block.merge(bipartite(cosines(block.entered), far_above), block.size)

    return step


def diffrate(kept: Callable[[int, int], tuple[int, int]]):
    def step(block: Block) -> None:
        drop, merge = kept(block.depth, len(block.free))
        ranked = sorted(block.free, key=lambda i: -float(block.by_class[i]))
        ranked, similarity = ranked[:drop], cosines(block.entered)
        stay = ranked[:merge]
        into = {i: max(stay, key=lambda j: float(similarity[i, j])) for i in ranked[merge:]} if stay else {}
        # sizes of what was dropped are lost
        block.merge(grouped(stay, into), torch.ones(len(block.x)))

    return step


def ratios(depth: int, n: int) -> tuple[int, int]:
    drop = math.ceil(0.85 * n - 1e-9)
    return drop, math.ceil(0.925 * drop - 1e-9)


@pytest.mark.parametrize(
    ("preset", "parts", "step"),
    [
        ("tofu", {"keep": "remove(r=3)"}, tofu(3)),
        ("pitome", {}, pitome(0.85)),
        ("pitome", {"keep": "ratio(ratio=0.6)"}, pitome(0.6)),
        ("dymu", {"keep": "fitted_threshold(threshold=0.4)"}, dymu(0.4)),
        ("mctf", {"keep": "remove(r=4)"}, mctf(4)),
        ("mctf", {"keep": "remove(r=3)"}, mctf(3)),
        ("crossget", {"scorer": "mean_cls_attention", "guide": None}, crossget(0.85)),
        ("diffrate", {}, diffrate(ratios)),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, dict)) else "",
)
@torch.no_grad()
def test_presets_are_their_formulas(preset, parts, step):
    dense = vit("class token", PATCHES)
    images = torch.randn(4, 3, 8 * PATCHES, 8 * PATCHES)
    model = vp.prune(dense, preset, **parts)
    expected = torch.cat([run(dense, image[None], step, behind=preset == "mctf") for image in images])
    assert_close(model(images), expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_algm_is_its_formula():
    """Blocks of equal patches merge in the first block, and a count of pairs of each image's own later."""
    dense = vit("class token", PATCHES)
    images = torch.randn(4, 3, PATCHES, PATCHES).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images[:, :, :16, :32] = images[:, :, :1, :1]
    config = vp.preset("algm")
    stages = [vp.Stage(**{**stage.to_dict(), "keep": keep}) for stage, keep in zip(config.stages, KEEP, strict=True)]
    model = vp.prune(dense, config.with_stages(stages))
    with vp.collect() as traces:
        out = model(images)
    expected = torch.cat([run(dense, image[None], algm(0.3), proportional=False) for image in images])
    assert_close(out, expected, rtol=1e-4, atol=2e-5)
    assert len(set(traces[0].lengths[0])) > 1 or len(set(traces[0].lengths[-1])) > 1


KEEP = ("fitted_threshold(threshold=0.3)", "fitted_threshold(threshold=-0.2)")


def test_published_counts_of_diffrate():
    """Twelve counts of each step, as published for 197 tokens; the last but few keep two patches."""
    config = diffrate_counts("deit_small", 2.9)
    dropped, merged = (stage.part("keep").args["counts"] for stage in config.stages)
    assert dropped == (196, 195, 189, 167, 149, 138, 128, 116, 98, 77, 57, 2)
    assert len(merged) == 12 and merged[1] == 193
    with pytest.raises(LookupError, match=r"write one of diffrate_counts\('deit_tiny', 0.6\)"):
        diffrate_counts("deit_small", 3.0)
