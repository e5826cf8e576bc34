"""open_clip's towers, option by option, and the models made of two of them."""

from __future__ import annotations

import checks
import open_clip
import pytest
import torch
import torch.nn.functional as F
from checks import Case, randomise, same
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer

import vltprune as vp
from vltprune import attention

EOT, EOS, PAD = 59, 7, 0
LENGTH = 14
ENDS = (4, 13, 9)  # where each sentence ends; one fills all places
CUSTOM = {
    "qk_norm": {"qk_norm": True},
    "scale_heads": {"scale_heads": True},
    "scale_attn_inner": {"scale_attn_inner": True},
    "scale_attn": {"scale_attn": True},
    "scale_fc": {"scale_fc": True},
    "custom": {"block_type": "custom"},
    "all scales": {
        "qk_norm": True,
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
    },
    "layer_scale": {"ls_init_value": 1.0},
}
POOLER = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2}
IMAGE = {
    "tok": {},
    "avg": {"pool_type": "avg"},
    "none": {"pool_type": "none"},
    "ln after tok": {"final_ln_after_pool": True},
    "ln after avg": {"final_ln_after_pool": True, "pool_type": "avg"},
    "no_ln_pre": {"no_ln_pre": True},
    "sin_cos": {"pos_embed_type": "sin_cos_2d"},
    "output_tokens": {"output_tokens": True},
    "avg, output_tokens": {"output_tokens": True, "pool_type": "avg"},
    "ln after tok, output_tokens": {"output_tokens": True, "final_ln_after_pool": True},
    "pooler": POOLER,
    "pooler, avg": {**POOLER, "pool_type": "avg"},
    "pooler, output_tokens": {**POOLER, "output_tokens": True},
    "pooler, parallel": {**POOLER, "attentional_pool": "parallel"},
    "pooler, cascade": {**POOLER, "attentional_pool": "cascade", "output_tokens": True},
    "patch_dropout": {"patch_dropout": 0.25},
    **CUSTOM,
}
TEXT = {
    "argmax": {},
    "eos": {"pool_type": "eos", "eos_id": EOS},
    "last": {"pool_type": "last"},
    "no_causal_mask": {"no_causal_mask": True},
    "no_causal_mask, eos": {"no_causal_mask": True, "pool_type": "eos", "eos_id": EOS},
    "no_causal_mask, first": {"no_causal_mask": True, "pool_type": "first"},
    "siglip": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "pad mask": {"no_causal_mask": True, "use_pad_mask": True},
    "pad mask, first": {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "first"},
    "pad mask, eos, scales": {**CUSTOM["all scales"], "no_causal_mask": True, "use_pad_mask": True, "pool_type": "eos"},
    "pad mask of causal": {"use_pad_mask": True},  # open_clip ignores it there
    "proj_bias": {"proj_bias": True},
    "no projection": {"proj_type": "none"},
    "output_tokens": {"output_tokens": True},
    **CUSTOM,
}
TIMM = {
    "token, linear": {"pool": "token"},
    "avg, mlp": {"pool": "avg", "proj": "mlp", "proj_bias": True},
    "trunk's head": {"pool": "token", "proj": ""},
    "no head": {"pool": "token", "proj": "none"},
}
NAMES = [f"image: {n}" for n in IMAGE] + [f"text: {n}" for n in TEXT] + [f"timm: {n}" for n in TIMM]
NAMES += ["clip", "clip, eos", "clip, dict", "custom clip", "custom clip, dict"]
LOOPS = [f"image: {n}" for n in IMAGE] + [f"text: {n}" for n in TEXT]
WIDTH = 32


def images(size: int = 32):
    return torch.randn(3, 3, size, size) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)


def sentences(end: int = EOT, length: int = LENGTH):
    """Ids [3, length] with `end` at ENDS and padding behind it; no other token is as large as EOT."""
    ids = torch.randint(10, 50, (3, length))
    for row, place in zip(ids, ENDS, strict=True):
        row[place] = end
        row[place + 1 :] = PAD
    return ids


def image_case(option: str) -> Case:
    pooler = IMAGE[option].get("attentional_pool")
    size = {"image_size": 32, "patch_size": 8, "width": WIDTH, "layers": 3, "heads": 4, "mlp_ratio": 2.0}
    model = VisionTransformer(**size, output_dim=WIDTH if isinstance(pooler, str) else 24, **IMAGE[option])
    idle = ("ln_k.bias", "attn_pool") if pooler else ("ln_k.bias",)
    return Case(randomise(model), (images(),), {"image": [[0]] * 3}, idle=idle)


def text_case(option: str) -> Case:
    options = {"eos_id": EOS, **TEXT[option]}
    size = {"context_length": LENGTH, "vocab_size": 60, "width": WIDTH, "heads": 4, "layers": 3, "output_dim": 24}
    model = TextTransformer(**size, **options)
    by_eos = options.get("pool_type") == "eos"
    ids = sentences(EOS if by_eos else EOT)
    places = {"first": (0, 0, 0), "last": (LENGTH - 1,) * 3}.get(model.pool_type, ENDS)
    return Case(
        randomise(model),
        (ids,),
        {"text": [[place] for place in places]},
        idle=("ln_k.bias",),
        alone=lambda i: (trimmed(model, ids[i : i + 1], ENDS[i]),),
    )


def trimmed(model, ids, end):
    """Without the places behind the end, where they make no difference."""
    counted = model.attn_mask is None and not model.use_pad_mask
    return ids if counted or model.pool_type == "last" or model.output_tokens else ids[:, : end + 1]


def timm_case(option: str) -> Case:
    model = TimmModel("test_vit", 24, image_size=160, **{"proj": "linear", **TIMM[option]})
    return Case(randomise(model), (images(160),), {"image": [[0]] * 3})


def clip_case(name: str) -> Case:
    pool = {"pool_type": "eos", "eos_id": EOS} if "eos" in name else {}
    kind = open_clip.CustomTextCLIP if name.startswith("custom") else open_clip.CLIP
    model = kind(
        24,
        {"layers": 3, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 32},
        {"layers": 2, "width": 32, "heads": 4, "context_length": LENGTH, "vocab_size": 60, **pool},
        output_dict="dict" in name,
    )
    protected = {"image": [[0]] * 3, "text": [[end] for end in ENDS]}
    return Case(randomise(model), (images(), sentences(EOS if pool else EOT)), protected)


def make(name: str) -> Case:
    family, _, option = name.partition(": ")
    return {"image": image_case, "text": text_case, "timm": timm_case}[family](option) if option else clip_case(name)


every = pytest.mark.parametrize("name", NAMES)
with_presets = pytest.mark.parametrize("preset", checks.PRESETS)


@every
@pytest.mark.parametrize("reducer", checks.REDUCERS)
def test_keep_all_is_the_host(name, reducer):
    checks.keep_all_is_the_host(make(name), reducer)


@every
def test_the_dense_model_stays(name):
    checks.the_dense_model_stays(make(name))


@every
@with_presets
def test_batch_mates_do_not_matter(name, preset):
    checks.batch_mates_do_not_matter(make(name), preset)


@every
@pytest.mark.parametrize("preset", ["madtp", "random"])  # one that merges and one that drops
def test_depths_are_sound(name, preset):
    checks.depths_are_sound(make(name), preset)


@every
def test_gradients_reach(name):
    checks.gradients_reach(make(name))


@every
def test_reducing_early_changes_nothing(name):
    checks.reducing_early_changes_nothing(make(name))


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
def test_what_stands_behind_the_end_never_matters(option, preset):
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
    options = {"context_length": LENGTH, "vocab_size": 60, "width": WIDTH, "heads": 4, "layers": 3, "output_dim": 24}
    model = randomise(TextTransformer(**options, pool_type="first"))
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
    pruned = case.pruned().train()
    calls = []
    blocks = [m for m in case.model.modules() if type(m).__name__.endswith("ResidualAttentionBlock")]
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def step():
        pruned.zero_grad()
        calls.clear()
        out = checks.tensors(pruned(*case.inputs))
        sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in out).backward()
        return len(calls), out, [p.grad.clone() for p in pruned.parameters() if p.grad is not None]

    plain_calls, *plain = step()
    case.model.set_grad_checkpointing()
    saving_calls, *saving = step()
    assert (plain_calls, saving_calls) == (len(blocks), 2 * len(blocks))
    same(saving, plain)


class TestClip:
    @pytest.mark.parametrize("name", ["clip", "clip, eos", "custom clip"])
    @pytest.mark.parametrize("normalize", [False, True])
    @torch.no_grad()
    def test_encoders_are_the_hosts(self, name, normalize):
        case = make(name)
        pruned, (pictures, text) = case.pruned(keep="ratio(ratio=1.0)"), case.inputs
        same(pruned.encode_image(pictures, normalize=normalize), case.model.encode_image(pictures, normalize=normalize))
        same(pruned.encode_text(text, normalize=normalize), case.model.encode_text(text, normalize=normalize))
        same(list(pruned.get_logits(pictures, text)), list(case.model.get_logits(pictures, text)))

    @pytest.mark.parametrize("name", ["clip", "custom clip"])
    @torch.no_grad()
    def test_encoders_are_what_forward_runs(self, name):
        case = make(name)
        pruned, (pictures, text) = case.pruned(), case.inputs
        image, words, scale = pruned(pictures, text)
        assert torch.equal(image, pruned.encode_image(pictures, normalize=True))
        assert torch.equal(words, pruned.encode_text(text, normalize=True))
        assert torch.equal(words, F.normalize(pruned.encode_text(text), dim=-1))
        assert torch.equal(scale, case.model.logit_scale.exp())
        assert not torch.allclose(image, case.model(pictures, text)[0], atol=1e-3)

    @pytest.mark.parametrize("name", ["clip, dict", "custom clip, dict"])
    @torch.no_grad()
    def test_dicts(self, name):
        case = make(name)
        out, expected = case.pruned()(*case.inputs), case.model(*case.inputs)
        assert list(out) == list(expected)
        assert all(out[key].shape == value.shape for key, value in expected.items())

    @pytest.mark.parametrize("name", ["clip", "custom clip"])
    @torch.no_grad()
    def test_one_modality_alone(self, name):
        case = make(name)
        pruned, (pictures, text) = case.pruned(), case.inputs
        both = pruned(pictures, text)
        image, nothing, _ = pruned(image=pictures)
        assert nothing is None
        assert torch.equal(image, both[0])
        nothing, words, _ = pruned(text=text)
        assert nothing is None
        assert torch.equal(words, both[1])

    @pytest.mark.parametrize("name", ["clip", "custom clip"])
    def test_one_guide_serves_both_towers(self, name):
        case = make(name)
        pruned = case.pruned()
        guides = {id(tower.guide) for tower in pruned.pruning.towers.values()}
        assert guides == {id(pruned.pruning.guide)}
        assert pruned.visual.guide is pruned.text.guide
        with vp.collect() as traces:
            pruned(*case.inputs)
        image, text = (trace.aligned for trace in traces)
        assert image.shape == text.shape == (3, 12, 48)  # the wider tower's width
        vp.losses.alignment(image, text).backward()
        assert pruned.pruning.guide.anchors.grad.any()

    @pytest.mark.parametrize("name", ["clip", "custom clip"])
    @torch.no_grad()
    def test_towers_left_alone(self, name):
        case = make(name)
        pruned, (pictures, text) = case.pruned(at={"image": (1,)}), case.inputs
        same(pruned.encode_text(text), case.model.encode_text(text))
        assert not torch.allclose(pruned.encode_image(pictures), case.model.encode_image(pictures), atol=1e-3)

    @pytest.mark.parametrize("preset", ["evit", "random"])
    @torch.no_grad()
    def test_its_own_text_is_a_text_transformer(self, preset):
        case = make("clip")
        tower = TextTransformer(**SMALL).eval()
        tower.load_state_dict({k: v for k, v in case.model.state_dict().items() if k in tower.state_dict()})
        text = case.inputs[1]
        assert torch.equal(case.pruned(preset).encode_text(text), vp.prune(tower, preset)(text))

    @pytest.mark.parametrize("name", ["clip", "custom clip"])
    def test_weights_are_shared(self, name):
        case = make(name)
        pruned = case.pruned()
        own = {id(parameter) for parameter in pruned.pruning.guide.parameters()}
        assert {id(p) for p in pruned.parameters()} == {id(p) for p in case.model.parameters()} | own

    def test_towers_and_depths_that_are_not_there(self):
        case = make("clip")
        with pytest.raises(ValueError, match=r"'audio'.*image, text"):
            case.pruned(at={"audio": None})
        with pytest.raises(ValueError, match=r"text tower has depths 0 \.\. 1"):
            case.pruned(at=(2,))

    @pytest.mark.parametrize("name", ["clip", "custom clip"])
    def test_pruning_twice_is_refused(self, name):
        with pytest.raises(TypeError, match="pruned already"):
            vp.prune(make(name).pruned(), "random")


SMALL = {"context_length": LENGTH, "vocab_size": 60, "width": WIDTH, "heads": 4, "layers": 2, "output_dim": 24}
REFUSED = {
    "embed_cls": lambda: TextTransformer(**SMALL, embed_cls=True),
    "pool_type": lambda: TextTransformer(**SMALL, pool_type="none"),
    "scaled cosine": lambda: TextTransformer(**SMALL, scaled_cosine_attn=True),
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
