"""Who is told of a call: threads, gradient checkpointing, failing decoders; and what several processes need of gradients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import open_clip
import pytest
import torch
import torch.distributed as dist
from small_models import BLIP, images, scrambled, sentences, small
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vltprune as vp
from vltprune.models.blip import BlipNlvr
from vltprune.models.caption import BlipCaption

CLIP = (
    16,
    {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
    {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 3},
)


def captioner():
    sizes = {name: value for name, value in BLIP.items() if name != "merge_from"}
    dense = scrambled(BlipCaption(**sizes, prompt=(5,), bos_id=38, eos_id=3))
    return vp.prune(dense, "madtp", guide="codebook(anchors=5)").train()


def test_threads_that_collect_nothing_report_to_those_who_do():
    model = vp.prune(small("vit").model, "random")
    both = Barrier(2, timeout=60)

    def own(pixels):
        both.wait()
        with torch.no_grad(), vp.collect() as traces:
            model(pixels)
            both.wait()
        return traces

    pixels = images(2)
    with vp.collect() as traces, vp.collect(threads=False) as mine, ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(model, [pixels] * 5))) == 5
        assert (len(traces), len(mine)) == (5, 0)
        assert [len(some) for some in pool.map(own, [pixels] * 2)] == [1, 1]
        assert pool.submit(vp.count_macs, model, pixels).result().total > 0
        assert (len(traces), len(mine)) == (5, 0)
        model(pixels)
        assert (len(traces), len(mine)) == (6, 1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(model, [pixels] * 2))
    assert len(traces) == 6


def test_threads_count_the_same_model_and_leave_it_in_its_mode():
    model, pixels = vp.prune(small("vit").model, "random", keep="ratio(ratio=0.5)").train(), images(2)
    want = vp.count_macs(model, pixels).total
    with ThreadPoolExecutor(4) as pool:
        assert {cost.total for cost in pool.map(vp.count_macs, [model] * 8, [pixels] * 8)} == {want}
    assert all(module.training for module in model.pruners.modules())
    model.eval()


def test_each_decoder_reports_to_the_tower_of_its_own_thread():
    model = captioner().eval()
    ids, mask = sentences(2)
    with torch.no_grad(), vp.collect() as traces, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: model(images(1), ids[:1, :n], mask[:1, :n]), range(2, 10)))
    assert sorted(sum(piece.tokens for piece in trace.decode_stats) for trace in traces) == list(range(2, 10))


@pytest.mark.parametrize("how", ["blocks", "whole"])
@pytest.mark.parametrize("at", [{"image": (1,)}, {"text": (1,)}])
def test_backward_may_come_when_nobody_collects_any_more(at, how):
    model = vp.prune(scrambled(open_clip.CLIP(*CLIP)), "madtp", guide="codebook(anchors=5)", at=at).train()
    inputs = images(2), torch.randint(1, 40, (2, 12))
    gradients, number = [], []
    for saves in (False, True):
        model.host.set_grad_checkpointing(saves and how == "blocks")
        model.zero_grad()
        with vp.collect() as traces:
            recomputed = saves and how == "whole"
            out = checkpoint(model, *inputs, use_reentrant=False) if recomputed else model(*inputs)
        loss = out[0].square().sum() + out[1].sum() + vp.losses.alignment(*(trace.aligned for trace in traces))
        with vp.collect() as again:
            loss.backward()
        assert not again
        number.append(len(traces))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert number == [2, 2]
    assert_close(*gradients)


def test_a_decoder_that_fails_leaves_nothing_behind(monkeypatch):
    model = captioner()
    pixels, (ids, mask) = images(2), sentences(2)
    with vp.collect() as traces:
        model(pixels, ids, mask)
    right = traces[0].caption_aligned

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.decoder.body.layers[-1].register_forward_pre_hook(fail)
    last = model.decoder.body.layers[-1].fc2.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), vp.collect():
        model(pixels, ids, mask)
    hook.remove()
    last.remove()
    with vp.collect() as traces:
        model(pixels, ids, mask)
    assert_close(traces[0].caption_aligned, right)


@pytest.fixture
def world(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/address", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [{}, {"reducer": "drop"}, {"keep": "learned"}, {"at": {"text": (1,)}}, {"at": ()}])
def test_each_weight_has_a_gradient_in_each_step_of_several_processes(world, parts):
    """Without find_unused_parameters: also for texts of one word, of which nothing is merged."""
    dense = scrambled(open_clip.CLIP(*CLIP)).requires_grad_("at" not in parts)
    dense.visual.conv1.requires_grad_(True)
    dense.token_embedding.requires_grad_(True)
    model = vp.prune(dense, "madtp", **{"guide": "codebook(anchors=5)", **parts}).train()
    model.logit_scale.requires_grad_(False)
    wrapped, ids = DistributedDataParallel(model), torch.zeros(2, 12, dtype=torch.int64)
    ids[:, 0] = 39
    for saves in (False, True):
        model.host.set_grad_checkpointing(saves)
        for _ in range(2):  # the second step fails where the first left a weight without a gradient
            image, text, _ = wrapped(images(2), ids)
            (image @ text.T).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_ties_change_nothing_and_are_left_out_elsewhere(world):
    model = vp.prune(scrambled(BlipNlvr(**BLIP)), "madtp", guide="codebook(anchors=5)").train()
    inputs = images(2, 2), *sentences(2)
    tied = model(*inputs)
    tied.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        free = model(*inputs)
        free.sum().backward()
    assert_close(tied, free, rtol=0, atol=0)
    for name, p in model.named_parameters():
        assert_close(gradients.get(name), p.grad) if p.grad is not None else None
