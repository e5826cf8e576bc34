"""Presets that choose tokens against the published methods, written out for one image at a time."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from published import check, images, vit
from small_models import small

import vltprune as vp

everywhere = pytest.mark.parametrize("patches", [4, 5])
summarized = pytest.mark.parametrize("kind", ["class token", "registers"])


def best(scores, among, count):
    """The `count` indices of largest score."""
    return sorted(among, key=lambda i: -float(scores[i]))[:count]


def ats(ratio):
    def decide(block):
        free, count = block.free, ceil(ratio * len(block.free) - 1e-6)
        if count >= len(free):
            return None
        s = {j: float(block.maps[:, 0, j].sum() * block.v[j].norm()) for j in free}
        ascending, total = sorted(free, key=lambda j: s[j]), sum(s.values())
        cumulative = [sum(s[i] for i in ascending[: n + 1]) / total for n in range(len(free))]
        first, chosen = cumulative[0], set()
        for step in range(count):
            point = first + (1 - first) * (step / (count - 1) if count > 1 else 0.5)
            chosen.add(ascending[min(range(len(free)), key=lambda n: round(abs(cumulative[n] - point), 6))])
        return block.kept(chosen)

    return lambda block: decide(block) if block.depth else None


@everywhere
@summarized
@pytest.mark.parametrize("ratio", [1.0, 0.8, 0.3])
def test_ats(kind, patches, ratio):
    kept = check("ats", ats(ratio), kind, patches, keep=f"ratio(ratio={ratio})")
    protected = vit(kind, patches).num_prefix_tokens
    assert all(n <= protected + ceil(ratio * patches**2) for n in kept)
    assert ratio < 1 or kept == [protected + patches**2] * 3


def test_ats_keeps_fewer_of_images_with_few_tokens_of_weight():
    with torch.no_grad(), vp.collect() as traces:
        vp.prune(vit("class token", 5), "ats", keep="count(count=20)")(images(5, 8))
    counts = traces[0].lengths[-1]
    assert max(counts) < 21
    assert len(set(counts)) > 1


@pytest.mark.parametrize("preset", ["ats", "evit"])
def test_towers_without_a_class_token_are_refused(preset):
    with pytest.raises(ValueError, match="reads the attention of a summary token"):
        vp.prune(vit("no class token", 4), preset)


def powerbert(ratio, decay):
    def decide(block):
        n, free = len(block.x), block.free
        count = ceil(ratio ** (decay**block.depth) * len(free) - 1e-6)
        received = [sum(float(block.maps[:, i, j].sum()) for i in range(n) if i != j) for j in range(n)]
        return block.kept(best(received, free, count))

    return decide


@everywhere
@pytest.mark.parametrize("kind", ["class token", "registers", "no class token"])
def test_powerbert(kind, patches):
    check("powerbert", powerbert(0.7, 0.8), kind, patches)


def test_powerbert_keeps_a_ratio_of_the_words_that_a_text_has():
    model = small("text").model
    inputs = small("text").draw(5)
    with torch.no_grad(), vp.collect() as traces:
        vp.prune(model, "powerbert", keep="ratio(ratio=0.5, decay=0.5)")(*inputs)
    sizes = traces[0].input_tokens.layout.lengths
    assert len(set(sizes)) > 1
    for depth, lengths in enumerate(traces[0].lengths):
        sizes = [1 + ceil(0.5 ** (0.5**depth) * (n - 1) - 1e-6) for n in sizes]
        assert list(lengths) == sizes


def evit(ratio):
    def decide(block):
        free, attention = block.free, block.maps[:, 0].mean(0)
        count = ceil(ratio * len(free) - 1e-6)
        keep = best(attention, free, count)
        rest = [i for i in free if i not in keep]
        last = max(rest, key=lambda i: block.place[i])
        return [*block.kept(keep), (last, rest, [float(attention[i]) for i in rest])]

    return lambda block: decide(block) if block.depth else None


@everywhere
@summarized
def test_evit(kind, patches):
    check("evit", evit(0.6), kind, patches, keep="ratio(ratio=0.6)")


def zero_tprune(ratio):
    """The two stages as one decision: importance is of all tokens of the block, as the statistics of those that stay."""

    def decide(block):
        steps = torch.stack([torch.linalg.matrix_power(one, 30).mean(0) for one in block.maps])
        importance, keys = steps.square().mean(0).sqrt(), block.k.mean(1)
        ranked = best(importance, block.free, 99)
        half = (len(ranked) + 1) // 2
        important, others = ranked[:half], ranked[half:]

        def likeness(i):
            # rounded, because cosines that differ by less than rounding go by position
            return round(max(float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in important), 4)

        goes = best({i: likeness(i) for i in others}, sorted(others), len(ranked) - ceil(ratio * len(ranked) - 1e-6))
        left = [i for i in block.free if i not in goes]
        return block.kept(best(importance, left, ceil(ratio * len(left) - 1e-6)))

    return decide


@everywhere
@pytest.mark.parametrize("kind", ["class token", "registers", "no class token"])
def test_zero_tprune(kind, patches):
    check("zero_tprune", zero_tprune(0.8), kind, patches, keep="ratio(ratio=0.8)")


@pytest.mark.parametrize(
    ("patches", "ratio", "rows", "columns"), [(4, 0.25, 2, 2), (4, 0.5, 2, 4), (5, 0.25, 2, 3), (5, 0.5, 3, 4)]
)
@pytest.mark.parametrize("kind", ["class token", "registers", "no class token"])
def test_pooling(kind, patches, ratio, rows, columns):
    def decide(block):
        if block.depth:
            return None
        groups = block.kept([])
        for r in range(rows):
            for c in range(columns):
                cell = [(y, x) for y in range(patches) for x in range(patches)]
                cell = [(y, x) for y, x in cell if y * rows // patches == r and x * columns // patches == c]
                at = [block.protected + y * patches + x for y, x in cell]
                groups.append((at[0], at, [1 / len(at)] * len(at)))
        return groups

    assert set(check("pooling", decide, kind, patches, keep=f"ratio(ratio={ratio})")) == {
        vit(kind, patches).num_prefix_tokens + rows * columns
    }
