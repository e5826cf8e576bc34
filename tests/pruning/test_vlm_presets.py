"""Presets for language models' visual tokens against the published methods, written out for one image at a time."""

from __future__ import annotations

from math import ceil, log, sqrt

import numpy as np
import pytest
import torch
from published import Block, check, images, vit

import vltprune as vp

everywhere = pytest.mark.parametrize("patches", [4, 5])
summarized = pytest.mark.parametrize("kind", ["class token", "registers"])
any_kind = pytest.mark.parametrize("kind", ["class token", "registers", "no class token"])
# behind the tower, as published, and inside it
places = pytest.mark.parametrize("where", [{}, {"place": "block", "at": (1, 2)}], ids=["output", "block"])


def run(preset, choose, kind, patches, where, ratio=0.4, observe=lambda block: None, **parts):
    """A preset at a ratio against `choose(block, count)`, which gives the free indices that stay, or groups."""

    def decide(block: Block):
        observe(block)
        if block.depth not in where.get("at", (3,)):
            return None
        chosen = choose(block, ceil(ratio * len(block.free) - 1e-6))
        return chosen if chosen and isinstance(chosen[0], tuple) else block.kept(chosen)

    check(preset, decide, kind, patches, where.get("place", "output"), keep=f"ratio(ratio={ratio})", **where, **parts)


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


def nearest(x, i, among):
    similarity = cosines(x)
    return max(among, key=lambda j: similarity[i, j])


def gathered(block, stay, homes, weight):
    """Groups of the tokens that stay and of those whose home each is, by weights of the group [n] -> [n]."""
    protected = [i for i, place in enumerate(block.place) if place < block.protected]
    groups = []
    for k in sorted([*protected, *stay]):
        members = [i for i, home in homes.items() if home == k]
        groups.append((k, [k, *members], weight(k, members) if members else [1.0]))
    return groups


def visionzip(block, count):
    dominant = by_attention(block, block.free, int(count * 54 / 64))
    rest = [i for i in block.free if i not in dominant]
    number = count - len(dominant)
    targets = rest[:: max(1, len(rest) // number)][:number]
    keys = block.k.mean(1)
    homes = {i: nearest(keys, i, targets) for i in rest if i not in targets}
    return gathered(block, dominant + targets, homes, lambda k, members: [1.0] + [1 / len(members)] * len(members))


@everywhere
@summarized
@places
def test_visionzip(kind, patches, where):
    run("visionzip", visionzip, kind, patches, where)


def wide_attention(block):
    return (block.q[0].flatten() @ block.k.flatten(1).T / block.q[0].numel() ** 0.5).softmax(-1)


def prumerge(number, choose=None):
    """Each patch that stays with its nearest others, which may stay too, and one token of all that go."""

    def groups(block, count):
        wide, similarity = wide_attention(block), cosines(block.k.mean(1))
        stay = sorted(block.free, key=lambda i: -float(wide[i]))[:count] if choose is None else choose(block, count)
        gone = [i for i in block.free if i not in stay]
        if not gone:
            return block.kept(stay)
        found = [(i, [i], [1.0]) for i in range(len(block.place)) if i not in block.free]
        for k in stay:
            near = sorted((i for i in block.free if i != k), key=lambda i: -similarity[k, i])[:number]
            found.append((k, [k, *near], [1.0, *(float(wide[i]) for i in near)]))
        return sorted([*found, (gone[-1], gone, [float(wide[i]) for i in gone])])

    return groups


@everywhere
@summarized
@places
@pytest.mark.parametrize("number", [32, 6])
def test_prumerge(kind, patches, where, number):
    """At a ratio; how many stay by outliers has a test of its own."""
    run("prumerge", prumerge(number), kind, patches, where, reducer=f"add_neighbors(number={number})")


def outlying(block, multiplier):
    values = wide_attention(block)[block.free].numpy()
    low, high = np.percentile(values, [25, 75])
    return max(1, int((values > high + multiplier * (high - low)).sum()))


@everywhere
@summarized
@pytest.mark.parametrize("multiplier", [1.5, 0.3])
def test_prumerge_keeps_as_many_as_have_outlying_attention(kind, patches, multiplier):
    def decide(block):
        return prumerge(32)(block, outlying(block, multiplier)) if block.depth == 3 else None

    parts = {} if multiplier == 1.5 else {"keep": f"outliers(multiplier={multiplier})"}
    check("prumerge", decide, kind, patches, "output", **parts)


@everywhere
@summarized
def test_prumerge_plus_keeps_evenly_chosen_patches_besides(kind, patches):
    """Three for each outlier, every so many-th of the others."""

    def evenly(block, count):
        best = sorted(block.free, key=lambda i: -float(wide_attention(block)[i]))[: count // 4]
        rest = [i for i in block.free if i not in best]
        return best + rest[:: max(1, len(rest) // (count - len(best)))][: count - len(best)]

    def decide(block):
        count = min(4 * outlying(block, 0.8), len(block.free))
        return prumerge(32, evenly)(block, count) if block.depth == 3 else None

    check("prumerge", decide, kind, patches, "output", keep="outliers(multiplier=0.8, samples=3.0)", selector="evenly")


@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.5])
def test_prumerge_can_be_brought_to_a_cost(reduction):
    """Inside the tower, where it saves something."""
    data = [images(5, 8)]
    model = vp.prune(vit("class token", 5), "prumerge", place="block", at=(0, 1), reduction=reduction, data=data)
    assert vp.measure(model, data).reduction == pytest.approx(reduction, abs=0.02)


def hiprune(patches):
    def choose(block, count):
        received = {i: float(block.maps[:, :, i].mean()) for i in block.free}
        middle = {i: block.memory["middle"][block.place[i]] for i in block.free}
        anchors = sorted(block.free, key=lambda i: -middle[i])[: round(count * 0.5 / 5)]
        cells = {i: divmod(block.place[i] - block.protected, patches) for i in block.free}

        def group(i):
            steps = [abs(cells[i][0] - cells[a][0]) + abs(cells[i][1] - cells[a][1]) for a in anchors]
            return 0 if i in anchors else 1 if 1 in steps else 2

        return sorted(block.free, key=lambda i: (group(i), -received[i]))[:count]

    def observe(block):
        if block.depth == 1:
            scores = block.maps.mean((0, 1))
            block.memory["middle"] = {place: float(scores[i]) for i, place in enumerate(block.place)}

    return choose, observe


@everywhere
@any_kind
@places
def test_hiprune(kind, patches, where):
    choose, observe = hiprune(patches)
    run("hiprune", choose, kind, patches, where, 0.6, observe, selector="anchors(part=0.5)")


def vscan(patches):
    def choose(block, count):
        early = {i: block.memory["early"][block.place[i]] for i in block.free}
        windows = {}
        for i in block.free:
            row, column = divmod(block.place[i] - block.protected, patches)
            windows.setdefault((row // 2, column // 2), []).append(i)
        quota, stay = count // 2 // len(windows), []
        for window in windows.values():
            stay += sorted(window, key=lambda i: -early[i])[:quota]
        stay += by_attention(block, [i for i in block.free if i not in stay], count - len(stay))
        homes = {i: nearest(block.k.mean(1), i, stay) for i in block.free if i not in stay}
        return gathered(block, stay, homes, lambda k, members: [1 / (1 + len(members))] * (1 + len(members)))

    def observe(block):
        if block.depth == 0:
            scores = block.maps[:, 0].mean(0)
            block.memory["early"] = {place: float(scores[i]) for i, place in enumerate(block.place)}

    return choose, observe


@everywhere
@summarized
@places
def test_vscan(kind, patches, where):
    choose, observe = vscan(patches)
    run("vscan", choose, kind, patches, where, 0.6, observe, selector="windows(size=2)")


def flowcut(least, seen):
    """FlowCut: the smoothed scores of every block, and at every second one as many as the entropy of attention leaves."""

    def choose(block):
        value, attention = block.v.mean(1), block.maps[:, 0].mean(0)
        likeness = torch.stack([(value[0] @ one).exp() for one in value])
        attention = attention / attention[block.free].sum()
        own = attention + likeness / likeness[block.free].sum()
        own = {block.place[i]: float(own[i] * value[i].abs().sum()) for i in block.free}
        before = block.memory.get("flowcut", own)
        block.memory["flowcut"] = scores = {place: 0.5 * before[place] + 0.5 * score for place, score in own.items()}

        n, left = len(block.free), 3 - block.depth
        if left % 2:
            return None
        entropy = -sum(p * log(p) for p in map(float, attention[block.free]))
        goes = round((n - least) / sqrt(left) * (1 - (entropy / log(n)) ** 2)) if left and n > 1 else n - least
        count = max(n - max(goes, 0), min(least, n))
        if left:
            seen.append((n, count))
        return block.kept(sorted(block.free, key=lambda i: -scores[block.place[i]])[:count])

    return choose


@everywhere
@summarized
@pytest.mark.parametrize("least", [1, 5, 30])
def test_flowcut(kind, patches, least):
    seen = []
    kept = check("flowcut", flowcut(least, seen), kind, patches, "block", keep=f"entropy(count={least})")
    assert set(kept) == {min(least, patches**2) + (1 if kind == "class token" else 3)}
    assert least == 30 or any(least < count < n for n, count in seen)


def scissor(block, count):
    if count == len(block.free):
        return block.free
    similarity, home = cosines(block.x), {i: i for i in block.free}
    for i in block.free:
        for j in block.free:
            if similarity[i, j] > 0.3 and home[i] != home[j]:
                low, high = sorted((home[i], home[j]))
                home = {k: low if one == high else one for k, one in home.items()}
    first = sorted(set(home.values()))
    stay = sorted(first, key=lambda k: -list(home.values()).count(k))[:count]
    home = {i: k if k in stay else nearest(block.x, k, stay) for i, k in home.items()}
    groups = {k: [i for i in block.free if home[i] == k] for k in stay}
    means = torch.stack([block.x[groups[k]].mean(0) for k in stay])
    similarity = cosines(torch.cat([block.x, means]))[: len(block.x), len(block.x) :]
    added = {k: [i for i in block.free if similarity[i].argmax() == n] for n, k in enumerate(stay)}
    result = block.kept([])
    for k in stay:
        parts = len(added[k]) + 1
        weights = [1 / (len(groups[k]) * parts)] * len(groups[k]) + [1 / parts] * len(added[k])
        result.append((k, groups[k] + added[k], weights))
    return sorted(result)


@everywhere
@any_kind
@places
@pytest.mark.parametrize("ratio", [0.8, 0.2])
def test_scissor(kind, patches, where, ratio):
    """With room for all components, and for the largest alone: a mean each, to which every patch is added once more."""
    run("scissor", scissor, kind, patches, where, ratio, selector="components(least_similarity=0.3)")
