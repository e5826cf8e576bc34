"""transformers' towers from within: what tokens see, what is pooled, dropout, stochastic depth, recomputing."""

from __future__ import annotations

import copy
import inspect

import checks
import pytest
import torch
from cases_transformers import IMAGES, TEXTS, WORDS, image_case, make, text_case
from checks import same
from torch import nn
from transformers_parts import ENDS, LENGTH

import vltprune as vp
from vltprune.io.checkpoint import load_into


def blocks_of(pruned):
    return pruned.adapter.blocks(pruned.host)


# BLIP's and BLIP-2's own attention takes no mask in images, and in this version hides nothing of what sentences look at
UNMASKABLE = ("blip image: plain", "blip2 image: plain", "blip text: memory")
MASKABLE = [name for name in (*TEXTS, *IMAGES) if name not in UNMASKABLE]


@pytest.mark.parametrize("name", [*MASKABLE, "bert: types and positions", "clip text: eos 2", "modernbert: positions"])
@pytest.mark.parametrize("at", [(0,), None])
@torch.no_grad()
def test_dropping_is_hiding(name, at):
    case = make(name)
    pruned = checks.ragged(case, scorer="self_attention", at=at)
    blocks, entered = blocks_of(pruned), []

    def note(block, args, rest):
        entered.append(inspect.signature(block.forward).bind(*args, **rest).arguments)

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    case.model(*case.inputs)
    for hook in hooks:
        hook.remove()

    def dense(block, given):
        rest = {key: given[key] for key in ("position_embeddings", "position_bias") if key in given}
        window = block.config.sliding_window if getattr(block, "attention_type", "") == "sliding_attention" else LENGTH
        near = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool).triu(-window).tril(window)

        def run(x, seen):
            seen = seen & near if seen.shape[-1] == LENGTH else seen
            out = block(x, attention_mask=torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None], **rest)
            return out[0] if isinstance(out, tuple) else out

        return run

    causal = pruned.adapter.causal(case.model)
    x, run = entered[0]["hidden_states"], list(map(dense, blocks, entered))
    checks.dropping_is_hiding(pruned, case.inputs, x, run, causal)


@pytest.mark.parametrize("name", [*TEXTS, *IMAGES])
@torch.no_grad()
def test_pooled_is_pooled_from_what_is_left(name):
    case = make(name)
    pruned = checks.ragged(case)
    tokens, block_inputs = pruned.encode(*case.inputs)
    out = pruned(*case.inputs)
    for i, x in enumerate(tokens.x.split(tokens.layout.lengths)):
        alone = vp.PackedTokens.pack(
            x[None], summary=None if tokens.summary is None else own(tokens.summary, tokens, i)
        )
        want = pruned.adapter.head(case.model, alone, block_inputs)
        assert not out.last_hidden_state[i, len(x) :].any()
        same(out.last_hidden_state[i, : len(x)], want.last_hidden_state[0])
        if "pooler_output" in out:
            same(out.pooler_output[i], want.pooler_output[0])


def own(mark, tokens, i):
    return mark.split(tokens.layout.lengths)[i]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("preset", checks.PRESETS)
@torch.no_grad()
def test_padding_never_matters(name, preset):
    case = make(name)
    ids, mask = case.inputs
    other = torch.where(mask.bool(), ids, torch.randint(3, 50, ids.shape))
    assert not torch.equal(ids, other)
    pruned = case.pruned(preset)
    (before, *_), lengths = checks.run(pruned, (ids, mask))
    (after, *_), other_lengths = checks.run(pruned, (other, mask))
    if "roberta" in name:  # which counts its positions over all that is not padding by its id
        assert lengths["text"][0] == other_lengths["text"][0] == ENDS
    else:
        assert torch.equal(before, after)
        assert lengths == other_lengths
    full, _ = checks.run(pruned, (ids, torch.ones_like(mask)))
    without, _ = checks.run(pruned, (ids,))
    same(full, without)


@pytest.mark.parametrize("eos", [2, 55])
@torch.no_grad()
def test_the_end_of_text_is_found_as_the_host_finds_it(eos):
    """By the largest id where the configuration says 2, which it always did once; by the first end otherwise."""
    case = make("clip text: masked")
    case.model.eos_token_id = eos
    ids = torch.randint(3, 50, (3, LENGTH))
    ids[:, 3] = ids[1:, 6] = 55
    ids[:2, 9] = 58
    pruned = case.pruned()
    with vp.collect() as traces:
        pruned(ids)
    last = traces[0].layers[-1]
    assert last.position[last.protected].tolist() == ([9, 9, 3] if eos == 2 else [3, 3, 3])
    same(case.pruned(keep="ratio(ratio=1.0)")(ids), case.model(ids))


DROPPING = ["vit: plain", "bert: plain", "distilbert: plain", "mpnet: plain", "modernbert: plain", "dinov3: plain"]
DROPPING += ["clip", "blip retrieval"]


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("where", ["Attention", ""])
def test_dropout_is_the_hosts(name, where):
    """All of it, so that chance has no say; and in training only. That of attention by itself too, as others hide it."""
    case = make(name)
    for module in case.model.modules():
        for own in ("dropout", "attention_dropout") if type(module).__name__.endswith(where) else ():
            dropout = getattr(module, own, None)
            if isinstance(dropout, nn.Dropout):
                dropout.p = 1.0
            elif dropout is not None:
                setattr(module, own, 1.0)
    checks.keep_all_is_the_host(case)
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    trained, plain = (checks.tensors(pruned.train(mode)(*case.inputs))[0] for mode in (True, False))
    assert not torch.allclose(trained, plain, atol=1e-2)


@pytest.mark.parametrize("dropped", ["attention_dropout", "mlp_dropout", "embedding_dropout"])
def test_modernbert_drops_where_it_was_built_to(dropped):
    """Behind the projection of attention, inside the MLP, behind the embedding; biases are what is left without them."""
    checks.keep_all_is_the_host(text_case("modernbert", "biases", **{dropped: 1.0}))


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("family", ["dinov2", "registers", "dinov3"])
@torch.no_grad()
def test_drop_path_draws_once_an_instance(family, keep):
    """Either branch of an instance is gone, or doubled, for all of its tokens."""
    still = {"pos_embed_rescale": None} if family == "dinov3" else {}
    case = image_case(family, "plain", num_hidden_layers=1, drop_path_rate=0.5, **still)
    images = torch.randn(1, 3, 32, 32).expand(24, -1, -1, -1)
    config = case.config("random", keep=f"ratio(ratio={keep})")
    got = vp.prune(case.model, config).train().encode(images)[0].unpack()[0]

    outcomes = []
    for attention, mlp in [(0, 0), (0, 2), (2, 0), (2, 2)]:
        known = copy.deepcopy(case.model).eval()
        [block] = blocks_of(vp.prune(known, config))
        block.layer_scale1.lambda1.mul_(attention)
        block.layer_scale2.lambda1.mul_(mlp)
        outcomes.append(vp.prune(known, config).encode(images[:1])[0].x)
    distance = (got[:, None] - torch.stack(outcomes)).abs().amax((2, 3)) / torch.stack(outcomes).abs().max()
    assert (distance.amin(1) < 1e-5).all()
    assert len(set(distance.argmin(1).tolist())) == 4


@pytest.mark.parametrize("augmented", ["pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"])
def test_rotary_augmentation_is_the_hosts(augmented):
    checks.keep_all_is_the_host(image_case("dinov3", "plain", **{augmented: 1.5}))


MLPS = {"BertLayer": "intermediate", "BlipTextLayer": "intermediate", "TransformerBlock": "ffn.lin1"}
CHECKPOINTED = [
    "bert: plain",
    "distilbert: plain",
    "modernbert: local first",
    "vit: plain",
    "dinov2: plain",
    "clip",
    "blip retrieval",
]


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name):
    case = make(name)
    blocks = [block for tower in case.pruned().pruning.towers.values() for block in blocks_of(tower)]
    parts = [block.get_submodule(MLPS.get(type(block).__name__, "mlp")) for block in blocks]
    checks.recomputing_changes_nothing(case, parts, case.model.activation_checkpointing_enable)


LARGE = [
    "bert: plain",
    "distilbert: plain",
    "mpnet: plain",
    "modernbert: plain",
    "vit: plain",
    "dinov2: swiglu",
    "clip",
]


@pytest.mark.parametrize("name", LARGE)
@torch.no_grad()
def test_large_batches(name):
    case = make(name)
    inputs = tuple(x.repeat(20, *[1] * (x.dim() - 1)) for x in case.inputs)  # more tokens than a tile of rows
    pruned = case.pruned()
    few, many = (
        getattr(pruned(*x), "vision_model_output", pruned(*x)).last_hidden_state for x in (case.inputs, inputs)
    )
    same(many[:3], few)


@pytest.mark.parametrize("name", ["vit: plain", "mpnet: plain", "modernbert: plain"])
@torch.no_grad()
def test_half_precision(name):
    case = make(name)
    assert case.pruned().bfloat16()(*case.inputs).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["vit: plain", "bert: plain", "mpnet: plain", "modernbert: plain", "clip"])
@torch.no_grad()
def test_saved_pruning_fits_the_model_again(name, tmp_path):
    case = make(name)
    pruned = case.pruned()
    vp.save(pruned, tmp_path, only="pruning")
    other = vp.prune(case.model, pruned.pruning.config)
    load_into(other, tmp_path)
    same(other(*case.inputs), pruned(*case.inputs))
