"""Presets for language models' visual tokens against the published methods, written out for one image at a time."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from published import Block, check

everywhere = pytest.mark.parametrize("patches", [4, 5])
summarized = pytest.mark.parametrize("kind", ["class token", "registers"])
any_kind = pytest.mark.parametrize("kind", ["class token", "registers", "no class token"])
# behind the tower, as published, and inside it
places = pytest.mark.parametrize("where", [{}, {"place": "block", "at": (1, 2)}], ids=["output", "block"])


def run(preset, choose, kind, patches, where, ratio=0.4):
    """A preset at a ratio against `choose(block, count)`, which gives the free indices that stay, or groups."""

    def decide(block: Block):
        if where and block.depth not in where["at"]:
            return None
        chosen = choose(block, ceil(ratio * len(block.free) - 1e-6))
        return chosen if chosen and isinstance(chosen[0], tuple) else block.kept(chosen)

    check(preset, decide, kind, patches, where.get("place", "output"), keep=f"ratio(ratio={ratio})", **where)


def cosines(x) -> np.ndarray:
    x = x.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def by_attention(block, among, count):
    attention = block.maps[:, 0].mean(0)
    return sorted(among, key=lambda i: -float(attention[i]))[:count]


@everywhere
@summarized
@places
def test_fastervlm(kind, patches, where):
    run("fastervlm", lambda block, count: by_attention(block, block.free, count), kind, patches, where)


def vispruner(block, count):
    similarity = cosines(block.x)
    important = by_attention(block, block.free, count // 2)
    rest, goal = by_attention(block, [i for i in block.free if i not in important], 99), count - count // 2
    while len(rest) > goal:
        a, b = rest[::2], rest[1::2]
        a = sorted(a, key=lambda i: -max(similarity[i, j] for j in b))
        rest = a[min(8, len(rest) - goal, len(a)) :] + b
    return important + rest


@everywhere
@summarized
@places
def test_vispruner(kind, patches, where):
    run("vispruner", vispruner, kind, patches, where)


def divprune(block, count):
    distance, left = 1 - cosines(block.x), list(block.free)
    chosen = [max(left, key=lambda i: sorted(distance[i, j] for j in left)[1])]
    while len(chosen) < count:
        left = [i for i in left if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i, j] for j in chosen)))
    return chosen


@everywhere
@any_kind
@places
def test_divprune(kind, patches, where):
    run("divprune", divprune, kind, patches, where)


def cdpruner(block, count):
    """By determinants of all kernels with one more token; rounded, so that equal ones go to the first."""
    similarity, left, chosen = cosines(block.x), list(block.free), []

    def volume(i):
        return float(f"{np.linalg.det(similarity[np.ix_([*chosen, i], [*chosen, i])]):.5g}")

    for _ in range(count):
        chosen.append(max(left, key=volume))
        left.remove(chosen[-1])
    return chosen


@everywhere
@any_kind
@places
def test_cdpruner(kind, patches, where):
    run("cdpruner", cdpruner, kind, patches, where)


def dart(block, count):
    similarity, norms = cosines(block.x), block.k.abs().sum((1, 2))
    pivots = sorted(block.free, key=lambda i: -float(norms[i]))[: min(8, count)]
    chosen, others = list(pivots), count - len(pivots)
    for n, pivot in enumerate(pivots):
        left = sorted((i for i in block.free if i not in chosen), key=lambda i: similarity[pivot, i])
        chosen += left[: others // len(pivots) + (n < others % len(pivots))]
    return chosen


@everywhere
@any_kind
@places
def test_dart(kind, patches, where):
    run("dart", dart, kind, patches, where, ratio=0.7)
