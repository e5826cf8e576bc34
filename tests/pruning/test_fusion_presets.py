"""Presets of single-stream transformers against their formulas, on one pair of a text and an image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import NAMES, pairs, small, vilt
from torch import Tensor
from torch.testing import assert_close

import vltprune as vp

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# of the presets: blocks of six, and what stays of patches, then of those that are left, then of words
DEPTHS, KEPT, UNMERGED_PATCHES, UNMERGED_WORDS = (1, 2, 4), 0.9, 0.667, 0.8


def stays(n: int, ratio: float) -> int:
    return math.ceil(n * ratio - 1e-9)


def text_attention(attention: Tensor, words: list[int]) -> list[float]:
    """PuMer's scores: the mean over heads and over the words that pay, attention [heads, n, n]."""
    heads, n, _ = attention.shape
    return [
        sum(float(attention[h, i, j]) for h in range(heads) for i in words) / (heads * len(words)) for j in range(n)
    ]


def merged(order: list[int], ratio: float, key: Tensor, x: Tensor) -> tuple[list[int], Tensor]:
    """ToMe's matching of one modality, whose class token comes first in `order`: the order that is left, and the contents.

    Tokens at odd places are B. Each one at an even place, but the class token, may go into the most similar one of B.
    """
    number = len(order) - 1
    removed = min(number - stays(number, ratio), number // 2)
    a, b = order[2::2], order[1::2]
    edges = []
    for i in a:
        similarity = {j: float(torch.cosine_similarity(key[i], key[j], dim=0)) for j in b}
        best = max(similarity, key=lambda j: similarity[j])
        edges.append((similarity[best], i, best))
    goes = {i: best for _, i, best in sorted(edges, reverse=True)[:removed]}
    x = x.clone()
    for j in b:
        group = [j, *(i for i, best in goes.items() if best == j)]
        x[j] = sum(x[i] for i in group) / len(group)
    return [order[0], *(i for i in a if i not in goes), *b], x


@torch.no_grad()
def by_hand(model, tokens, words: int) -> tuple[Tensor, list[list[int]]]:
    """The last states of one instance, and the rows that each block leaves, by PuMer as it is written.

    tokens: the embedded sequence [n, dim], of which the first `words` are the text.
    """
    tower, x = model.vilt, tokens
    text, image, left = list(range(words)), list(range(words, len(x))), []
    for depth, block in enumerate(tower.encoder.layer):
        rows = sorted(text + image)
        heads = block.attention.attention
        normed = block.layernorm_before(x)
        q, k, v = ((one(normed)).unflatten(-1, (2, -1)) for one in (heads.query, heads.key, heads.value))
        logits = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) / heads.attention_head_size**0.5
        attention = logits.softmax(-1)
        context = torch.einsum("hij,jhd->ihd", attention, v[rows]).flatten(1)
        x = x.clone()
        x[rows] = x[rows] + block.attention.output.dense(context)
        if depth in DEPTHS:
            scores = dict(zip(rows, text_attention(attention, [rows.index(i) for i in text]), strict=True))
            patches = sorted(image[1:], key=lambda j: -scores[j])
            kept = set(patches[: stays(len(patches), KEPT)])
            image = [image[0], *(j for j in image[1:] if j in kept)]
            key = k.mean(1)
            image, x = merged(image, UNMERGED_PATCHES, key, x)
            text, x = merged(text, UNMERGED_WORDS, key, x)
        x = block.output(block.intermediate(block.layernorm_after(x)), x)
        left.append(sorted(text + image))
    return tower.layernorm(x[left[-1]]), left


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return vilt(depth=6)


@torch.no_grad()
def test_pumer_is_its_formula(model):
    """Of texts of one word to twelve, and images of one patch to twenty; in a batch and alone."""
    torch.manual_seed(5)
    inputs = pairs(8)
    lengths = inputs[1].sum(1).tolist()
    assert {n % 2 for n in lengths} == {0, 1}
    pruned = vp.prune(model, "pumer")
    with vp.collect() as traces:
        logits = pruned(*inputs).logits
    trace = traces[0]
    x = trace.input_tokens.x.split(trace.input_tokens.layout.lengths)
    positions = trace.input_tokens.position.split(trace.input_tokens.layout.lengths)
    for i in range(8):
        states, left = by_hand(model, x[i], lengths[i])
        assert_close(logits[i], model.rank_output(model.vilt.pooler(states[None]))[0], **CLOSE)
        for layer, rows in zip(trace.layers, left, strict=True):
            assert torch.equal(layer.position.split(layer.lengths)[i], positions[i][rows])
        with vp.collect() as alone:
            one = pruned(*(column[i : i + 1] for column in inputs)).logits
        assert_close(one[0], logits[i], **CLOSE)
        assert alone[0].lengths == tuple((lengths[i],) for lengths in trace.lengths)
    assert sum(trace.lengths[-1]) < 0.7 * trace.input_tokens.layout.total


@torch.no_grad()
@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_stage_prunes_the_tokens_of_its_modality_alone(model, modality):
    """Whatever decides: a part that knows of no modality counts and reduces the tokens of one."""
    inputs = pairs(6)
    for parts in ({}, {"selector": "bipartite", "reducer": "merge"}, {"scorer": "self_attention", "reducer": "fuse"}):
        pruned = vp.prune(model, "random", keep="ratio(0.5)", at=(1, 3), modality=modality, **parts)
        with vp.collect(tokens=True) as traces:
            pruned(*inputs)
        before, after = traces[0].input_tokens, traces[0].layers[-1].tokens
        for i in range(6):
            counts = []
            for tokens in (before, after):
                kinds = tokens.columns["modality"].split(tokens.layout.lengths)[i]
                counts.append({"text": int((kinds == 0).sum()), "image": int((kinds == 1).sum())})
            other = "image" if modality == "text" else "text"
            assert counts[0][other] == counts[1][other]
            free = counts[0][modality] - 1
            fused = "fuse" in parts.values()
            assert counts[1][modality] <= max(1 + free, 1) and (free < 3 or fused or counts[1][modality] < 1 + free)


@pytest.mark.parametrize("name", NAMES)
def test_presets_of_two_modalities_are_refused_on_towers_of_one(name):
    dense = small(name).model
    with pytest.raises(ValueError, match=r"scorer='text_attention' .* tower has tokens of one modality: write scorer="):
        vp.prune(dense, "pumer")
    with pytest.raises(ValueError, match=r"modality='image' .* the (image|text) tower .*: write modality=None"):
        vp.prune(dense, "pumer", scorer="self_attention")
    pruned = vp.prune(dense, "pumer", scorer="self_attention", modality=None)
    pruned(*small(name).draw(2))


def test_what_is_no_modality_is_refused():
    with pytest.raises(ValueError, match=r"modality='images' is no modality.*image"):
        vp.PruneConfig("random", "ratio(0.5)", modality="images")


@torch.no_grad()
def test_a_remembered_score_is_of_the_stage_that_prunes_the_token(model):
    """Two stages of a block leave their scores in one column: tokens of each modality have those of their own stage."""
    stages = [
        vp.Stage(f"remember(scorer={scorer!r}, column='seen')", "all", at=1, modality=modality)
        for scorer, modality in (("equal", "image"), ("random", "text"))
    ]
    pruned = vp.prune(model, vp.preset("pumer").with_stages(stages))
    with vp.collect(tokens=True) as traces:
        pruned(*pairs(3))
    tokens = traces[0].layers[1].tokens
    seen, is_image = tokens.columns["seen"], tokens.columns["modality"] == 1
    assert seen[is_image].eq(1).all()
    assert not seen[~is_image].eq(1).any()
