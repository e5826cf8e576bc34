"""MAG for captions: the anchors listen to the decoder in training, and to nobody else."""

from __future__ import annotations

import pytest
import small
import torch
from torch.testing import assert_close

import vltprune as vp
from vltprune.models.decoder import _causal_mask, _decode_layer
from vltprune.models.generation import GreedySearch


@pytest.fixture(params=[48, 32], ids=["one width", "two widths"])
def pruned(request):
    model = small.build("caption", text_width=request.param)
    return vp.prune(model, "madtp", guide="codebook(anchors=6)")


def by_hand(pruned, pixels, ids, mask):
    """[captions, anchors, dim]: of each caption alone, without padding and its first token, summed over blocks."""
    decoder, guide = pruned.decoder, pruned.pruning.guide
    cache = decoder.start(pruned.visual(pixels))
    x, seen = decoder.body.embed(ids), None
    gathered = torch.zeros(len(ids), 6, guide.anchors.shape[1])
    seen = _causal_mask(x, 0, mask)
    for depth, layer in enumerate(decoder.body.layers):
        for row, (states, real) in enumerate(zip(x, mask.bool(), strict=True)):
            states = guide.map(states[real][1:], "text")
            weight = (guide.anchors @ states.T / guide.anchors.shape[1] ** 0.5).softmax(-1)
            gathered[row] += weight @ states
        x, _ = _decode_layer(layer, x, None, seen, cache.memory[depth], cache.memory_mask)
    return gathered


def test_what_is_heard(pruned):
    pixels, (ids, mask) = small.images(3), small.words(3)
    ids[:, 0] = small.BOS
    with vp.collect() as traces:
        pruned.loss(pixels, ids, mask)
    (trace,) = traces
    assert trace.tower == "image"
    assert_close(trace.caption_aligned, by_hand(pruned, pixels, ids, mask), rtol=1e-4, atol=1e-4)
    assert trace.caption_aligned.shape == trace.aligned.shape


def test_alignment_trains_the_guide_and_both_sides(pruned):
    pixels, (ids, mask) = small.images(2), small.words(6)
    pruned.train()
    with vp.collect() as traces:
        pruned.loss(pixels, ids, mask)
    vp.losses.alignment(traces[0].aligned, traces[0].caption_aligned).backward()
    assert all(parameter.grad.any() for parameter in pruned.pruning.guide.parameters())
    assert pruned.visual.host.patch_embed.proj.weight.grad.any()
    assert pruned.decoder.body.word.weight.grad.any()


def test_it_changes_no_caption_and_no_dense_model(pruned):
    pixels, (ids, mask) = small.images(3), small.words(3)
    loss = pruned.loss(pixels, ids, mask)
    with vp.collect() as traces:
        assert torch.equal(pruned.loss(pixels, ids, mask), loss)
        dense = pruned.host.loss(pixels, ids, mask)
    assert len(traces) == 1
    assert torch.equal(dense, pruned.host.loss(pixels, ids, mask))


def test_nobody_listens_without_training_or_guide(pruned):
    pixels, (ids, mask) = small.images(3), small.words(3)
    unguided = vp.prune(pruned.host, "random")
    with vp.collect() as traces:
        unguided.loss(pixels, ids, mask)
        pruned.generate(pixels, GreedySearch(), max_length=9)
        with torch.no_grad():
            pruned.loss(pixels, ids, mask)
    assert len(traces) == 3
    for trace in traces:
        with pytest.raises(LookupError, match="pruned BlipCaption with gradients"):
            trace.caption_aligned  # noqa: B018
