"""Presets that read a text against the published methods, written out for one image at a time."""

from __future__ import annotations

from math import ceil, exp, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from published import KINDS, check, vit
from torch import nn

import vltprune as vp

everywhere = pytest.mark.parametrize("patches", [4, 5])
any_kind = pytest.mark.parametrize("kind", KINDS)
widths = pytest.mark.parametrize(("dim", "segments"), [(32, 1), (12, 3)])


def scrambled_guide(held: dict[str, Any]):
    """A function that draws the weights of a model's guide anew, as if they were trained, and leaves the guide in `held`."""

    def prepare(model: Any) -> None:
        for one in model.pruning.guide.parameters():
            nn.init.normal_(one, std=0.5)
        held["guide"] = model.pruning.guide

    return prepare


@everywhere
@any_kind
@widths
def test_trips(kind, patches, dim, segments):
    """The projected text is a token whose query attends to the patches, at two of four blocks."""
    dense, held = vit(kind, patches), {}

    def decide(block):
        if block.depth not in (1, 3):
            return None
        layer, host, free = held["guide"].maps["image"], dense.blocks[block.depth], block.free
        token = sum(layer.weight @ segment + layer.bias for segment in block.text) / len(block.text)
        query = host.attn.qkv(host.norm1(token[None]))[0, :32].view(2, 16)
        score = dict.fromkeys(free, 0.0)
        for h in range(2):
            weight = {j: exp(float(query[h] @ block.k[j, h]) / sqrt(16)) for j in free}
            score = {j: score[j] + weight[j] / sum(weight.values()) / 2 for j in free}
        kept = sorted(free, key=lambda j: -score[j])[: ceil(0.7 * len(free) - 1e-6)]
        rest = [j for j in free if j not in kept]
        total = sum(score[j] for j in rest)
        return sorted([*block.kept(kept), (rest[-1], rest, [score[j] / total for j in rest])])

    torch.manual_seed(0)
    text = torch.randn(3, segments, dim)
    kept = check(
        "trips", decide, kind, patches, text=text, prepare=scrambled_guide(held), guide=f"text_query(dim={dim})"
    )
    assert len(set(kept)) == 1 and kept[0] < KINDS[kind] + patches**2


def determinants(similarity: np.ndarray, relevance: dict[int, float], count: int) -> list[int]:
    """The tokens that make the determinant of the chosen ones' kernel largest, one after the other."""
    chosen: list[int] = []

    def volume(i):
        rows = [*chosen, i]
        kernel = [[relevance[a] * similarity[a, b] * relevance[b] for b in rows] for a in rows]
        return np.linalg.slogdet(np.array(kernel))[1]

    while len(chosen) < count:
        chosen.append(max((i for i in relevance if i not in chosen), key=volume))
    return chosen


@everywhere
@any_kind
@widths
@pytest.mark.parametrize("where", [{}, {"place": "block", "at": (1, 2)}], ids=["output", "block"])
def test_cdpruner_with_a_text(kind, patches, dim, segments, where):
    held = {}

    def decide(block):
        if block.depth not in where.get("at", (3,)):
            return None
        norm, layer = held["guide"].norms["image"], held["guide"].maps["image"]
        x, free = block.x.double().numpy(), block.free
        relevance = {}
        for j in free:
            centered = block.x[j] - block.x[j].mean()
            normed = centered / sqrt(float(centered.square().mean()) + norm.eps) * norm.weight + norm.bias
            patch = layer.weight @ normed + layer.bias
            cosines = [float(patch @ one / (patch.norm() * one.norm())) for one in block.text]
            relevance[j] = -sum(cosines) / len(cosines)
        low, high = min(relevance.values()), max(relevance.values())
        relevance = {j: (one - low) / (high - low) + 1e-6 for j, one in relevance.items()}
        lengths = np.linalg.norm(x, axis=1)
        similarity = x @ x.T / np.outer(lengths, lengths)
        return block.kept(determinants(similarity, relevance, ceil(0.4 * len(free) - 1e-6)))

    torch.manual_seed(0)
    text = torch.randn(3, segments, dim)
    guide = f"text_embedding(dim={dim}, required=False)"
    place, parts = where.get("place", "output"), {"keep": "ratio(ratio=0.4)", "guide": guide, **where}
    check("cdpruner", decide, kind, patches, place, text=text, prepare=scrambled_guide(held), **parts)


def test_trips_prunes_the_published_blocks_of_the_image_tower_alone():
    config = vp.preset("trips")
    assert config.depths("image", 12) == (4, 9)
    assert config.depths("text", 12) == ()
