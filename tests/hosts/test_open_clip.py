"""open_clip's towers, option by option."""

from __future__ import annotations

import checks
import open_clip
import pytest
import torch
from cases_open_clip import ENDS, IMAGE, LENGTH, PAD, TEXT, TEXT_SIZE, image_case, make, sentences, text_case
from checks import Case, randomize, same
from open_clip.transformer import TextTransformer

import vltprune as vp
from vltprune.core import attention

LOOPS = [f"image: {n}" for n in IMAGE] + [f"text: {n}" for n in TEXT]


def into_blocks(tower, inputs):
    """The dense input of the first block, the blocks as functions of tokens and of which keys a query sees, causality."""
    text = isinstance(tower, TextTransformer)
    x = tower._embeds(inputs)[0] if text else tower._embeds(inputs)
    blocks = [lambda x, seen, block=block: block(x, attn_mask=hidden(seen)) for block in tower.transformer.resblocks]
    return x, blocks, text and tower.attn_mask is not None


def hidden(seen):
    """[batch, n, n] bool -> what open_clip's attention adds to the logits, [batch * heads, n, n]."""
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).repeat_interleave(4, 0)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("at", [(0,), None])
@torch.no_grad()
def test_dropping_is_hiding(name, at):
    """In causal text among others: nothing sees the future, and EOT is read where it stands after pruning."""
    case = make(name)
    pruned = checks.ragged(case, scorer="self_attention", at=at)
    x, blocks, causal = into_blocks(case.model, *case.inputs)
    x = checks.dropping_is_hiding(pruned, case.inputs, x, blocks, causal)
    if name.startswith("text"):
        places = torch.tensor([place for [place] in case.protected["text"]])
        pooled = case.model.ln_final(x[torch.arange(3), places])
        projection = case.model.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection
        same(checks.tensors(pruned(*case.inputs))[0], pooled)


@pytest.mark.parametrize("option", IMAGE)
@torch.no_grad()
def test_pooling_is_the_towers_over_what_is_left(option):
    case = image_case(option)
    tower, pruned = case.model, checks.ragged(case)
    tokens, _ = pruned.encode(*case.inputs)
    for i, x in enumerate(tokens.x.split(tokens.layout.lengths)):
        pooled, rest = tower._pool(x.unsqueeze(0))
        want = [pooled @ tower.proj, rest] if tower.output_tokens else [pooled @ tower.proj]
        for got, one in zip(checks.tensors(pruned(*case.inputs)), want, strict=True):
            checks.same_row(got[i], one[0])


@pytest.mark.parametrize("option", ["avg", "ln after avg"])
@torch.no_grad()
def test_averages_weigh_merged_tokens_by_their_size(option):
    case = image_case(option)
    pruned, tower = case.pruned(), case.model
    tokens, _ = pruned.encode(*case.inputs)
    sizes, rows = tokens.size.split(tokens.layout.lengths), tokens.x.split(tokens.layout.lengths)
    for out, size, x in zip(pruned(*case.inputs), sizes, rows, strict=True):
        assert size.sum() == 17
        repeated = x.repeat_interleave(size, 0).unsqueeze(0)
        same(out, (tower._pool(repeated)[0] @ tower.proj)[0])


@pytest.mark.parametrize("option", ["argmax", "eos", "all scales", "proj_bias"])
@pytest.mark.parametrize("preset", checks.PRESETS)
@torch.no_grad()
def test_tokens_after_the_end_never_matter(option, preset):
    case = text_case(option)
    ids = case.inputs[0]
    other = ids.clone()
    for row, end in zip(other, ENDS, strict=True):
        row[end + 1 :] = torch.randint(10, 50, (LENGTH - 1 - end,))
    assert not torch.equal(ids, other)
    pruned = case.pruned(preset)
    (before,), lengths = checks.run(pruned, (ids,))
    (after,), other_lengths = checks.run(pruned, (other,))
    assert torch.equal(before, after)
    assert lengths == other_lengths
    assert lengths["text"][0] == tuple(end + 1 for end in ENDS)


@torch.no_grad()
def test_a_first_token_that_sees_nothing_needs_nothing():
    model = randomize(TextTransformer(**TEXT_SIZE, pool_type="first"))
    case = Case(model, (sentences(),), {"text": [[0]] * 3}, prunes=False, ragged=False)
    for preset in checks.PRESETS:
        (out,), lengths = checks.run(case.pruned(preset), case.inputs)
        same(out, case.expected())
        assert set(lengths["text"]) == {(1, 1, 1)}


@pytest.mark.parametrize("option", ["argmax", "pad mask", "qk_norm"])
@pytest.mark.parametrize("preset", checks.PRESETS)
@torch.no_grad()
def test_instance_by_instance_is_padded(option, preset, monkeypatch):
    """Attention has one way for small batches and one for large ones."""
    case = text_case(option)
    pruned = case.pruned(preset)
    padded, lengths = checks.run(pruned, case.inputs)
    monkeypatch.setattr(attention, "_SMALL", {})
    looped, same_lengths = checks.run(pruned, case.inputs)
    same(looped, padded)
    assert lengths == same_lengths


@pytest.mark.parametrize("option", ["pad mask", "pad mask, first"])
def test_a_pooled_token_that_is_padding_is_refused(option):
    case = text_case(option)
    ids = case.inputs[0].clone()
    ids[1] = PAD
    with pytest.raises(ValueError, match="is padding"):
        case.pruned()(ids)


@pytest.mark.parametrize("name", ["text: argmax", "clip", "custom clip"])
@pytest.mark.parametrize("bad", ["negative", "too large", "too long", "flat", "empty"])
def test_wrong_text_is_refused(name, bad):
    pruned = make(name).pruned()
    encode = pruned if name.startswith("text") else pruned.encode_text
    ids = sentences()
    text, says = {
        "negative": (ids - 100, r"0 \.\. 59"),
        "too large": (ids + 1, r"0 \.\. 59"),
        "too long": (torch.cat([ids, ids], 1), f"has 28 tokens, the tower has {LENGTH}"),
        "flat": (ids[0], r"\[batch, length\]"),
        "empty": (ids[:0], "not empty"),
    }[bad]
    with pytest.raises(ValueError, match=says):
        encode(text)


@pytest.mark.parametrize("name", ["image: tok", "text: argmax", "custom clip"])
@torch.no_grad()
def test_large_batches(name):
    case = make(name)
    inputs = tuple(x.repeat(20, *[1] * (x.dim() - 1)) for x in case.inputs)  # more tokens than a tile of rows
    same(case.pruned(keep="ratio(ratio=1.0)")(*inputs), case.model(*inputs))


@pytest.mark.parametrize("name", ["image: tok", "image: custom", "text: argmax", "text: siglip", "custom clip", "clip"])
def test_gradient_checkpointing(name):
    case = make(name)
    if name.endswith("custom"):
        case.model.transformer.forward = None  # open_clip's own loop cannot checkpoint custom blocks; ours may
    blocks = [m for m in case.model.modules() if type(m).__name__.endswith("ResidualAttentionBlock")]
    checks.recomputing_changes_nothing(case, [block.mlp for block in blocks], case.model.set_grad_checkpointing)


@torch.no_grad()
def test_trunks_of_timm_are_merged_before_they_are_projected():
    case = make("timm: token, linear")
    with vp.collect() as traces:
        case.pruned()(*case.inputs)
    assert any(step.reduced_early for step in traces[0].layers)


REFUSED = {
    "embed_cls": lambda: TextTransformer(**TEXT_SIZE, embed_cls=True),
    "pool_type": lambda: TextTransformer(**TEXT_SIZE, pool_type="none"),
    "scaled cosine": lambda: TextTransformer(**TEXT_SIZE, scaled_cosine_attn=True),
    "ModifiedResNet": lambda: open_clip.CLIP(
        24, {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8}, {**CLIP_TEXT}
    ),
}
CLIP_TEXT = {"layers": 2, "width": 32, "heads": 4, "context_length": LENGTH, "vocab_size": 60}


@pytest.mark.parametrize("says", REFUSED)
def test_refused_by_name(says):
    with pytest.raises(TypeError, match=says) as refusal:
        vp.prune(REFUSED[says](), "random")
    assert "upported" in str(refusal.value)
