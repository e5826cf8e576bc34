"""BLIP-2 and InstructBLIP of transformers: what the Q-Former and the language model make of what pruning leaves of an image."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys

import pytest
import torch
from small_models import images
from small_qformers import MODELS, PATCHES, QUERIES, SPEAKING, make, matching
from small_vlms import IMAGE_ID, STEPS
from test_vlm import PRESETS, same

import vltprune as vp

KEEP = {"keep": "random_ratio(mean=0.5, half_width=0.4)", "at": None, "place": "output"}
KEEP_ALL = "ratio(ratio=1.0)"
READING = ["blip2 opt", "blip2 t5", "instruct llama", "instruct t5"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def answers(case, model, inputs):
    """What a model's `forward` computes of a text."""
    rows = len(inputs["input_ids"])
    out = model(**inputs, **{name: value[:rows] for name, value in case.labels.items()})
    return out.logits if "logits" in out else out.language_model_outputs[0]


def said(case, model, inputs, **how):
    """The logits of each step of `generate`, and the ids."""
    out = model.generate(**inputs, **(STEPS | how))
    return out.logits, out.sequences


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dropping_is_masking(name):
    case = make(name)
    pruned = case.pruned(**KEEP)
    for inputs in (case.prompts((4,)), case.prompts()):
        with vp.collect() as traces:
            got = answers(case, pruned, inputs)
        kept = traces[0].lengths[-1]
        assert max(kept) <= PATCHES
        with case.masked(traces[0]):
            same(got, answers(case, case.model, inputs))
            if name in SPEAKING:
                logits, ids = said(case, case.model, inputs)
        if name in SPEAKING:
            got, chosen = said(case, pruned, inputs)
            same(got, logits)
            assert torch.equal(chosen, ids)
    assert len(set(kept)) > 1


@torch.no_grad()
def test_dropping_inside_the_tower_is_masking(monkeypatch):
    case = make("blip2 opt")
    pruned, inputs = case.pruned(keep=KEEP["keep"], at=(0, 2)), case.prompts()
    with vp.collect() as traces:
        got, chosen = said(case, pruned, inputs)
    layers, vision = traces[0].layers, case.model.vision_model
    depths = {layer.self_attn: depth for depth, layer in enumerate(vision.encoder.layers)}
    module = sys.modules[type(case.model).__module__]
    eager = module.eager_attention_forward

    def hiding(attention, q, k, v, attention_mask, **options):
        seen = torch.eye(1 + PATCHES, dtype=torch.bool).repeat(3, 1, 1)
        depth = depths[attention]
        if depth:
            left = layers[depth - 1]
            seen.transpose(1, 2)[left.layout.instance, left.position] = True
        else:
            seen[:] = True
        return eager(attention, q, k, v, torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None], **options)

    monkeypatch.setattr(module, "eager_attention_forward", hiding)
    vision.set_attn_implementation("eager")
    with case.masked(traces[0]):
        want, ids = said(case, case.model, inputs)
    vision.set_attn_implementation("sdpa")
    assert len(set(traces[0].lengths[-1])) > 1
    same(got, want)
    assert torch.equal(chosen, ids)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_keeping_all_is_the_dense_model(name):
    case = make(name)
    inputs = case.prompts()
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    for parts in ({"preset": "evit"}, {"preset": "random", "at": None, "place": "output"}):
        pruned = case.pruned(**parts, keep=KEEP_ALL)
        same(answers(case, pruned, inputs), answers(case, case.model, inputs))
    if name in SPEAKING:
        (got, chosen), (want, ids) = (said(case, model, inputs) for model in (pruned, case.model))
        same(got, want)
        assert torch.equal(chosen, ids)
    after = case.model.state_dict()
    assert list(before) == list(after) == list(pruned.state_dict())
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in case.model.modules())
    assert type(pruned) is type(case.model)


@pytest.mark.parametrize("preset", ["madtp", "evit", "random"])
@pytest.mark.parametrize("name", ["blip2 opt", "instruct t5"])
@pytest.mark.filterwarnings("ignore::vltprune.UntrainedGuideWarning")
@torch.no_grad()
def test_batch_mates_do_not_matter(name, preset):
    case = make(name)
    parts = {"keep": KEEP["keep"]} if preset == "random" else {}
    pruned, inputs = case.pruned(preset, **parts), case.prompts((4, 4, 4))
    with vp.collect() as traces:
        logits, _ = said(case, pruned, inputs)
    kept = traces[0].lengths[-1]
    assert len(traces) == 1 and max(kept) < 1 + PATCHES
    assert preset == "evit" or len(set(kept)) > 1
    for row in range(3):
        with vp.collect() as traces:
            alone, _ = said(case, pruned, {key: value[row : row + 1] for key, value in inputs.items()})
        assert traces[0].lengths[-1] == (kept[row],)
        same(alone, tuple(step[row : row + 1] for step in logits))


@pytest.mark.parametrize("preset", PRESETS.split())
@torch.no_grad()
def test_a_count_is_what_enters_the_q_former(preset):
    case, seen = make("blip2 opt"), []
    pruned = case.pruned(preset, keep="count(count=6)")
    pruned.qformer.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    answers(case, pruned, case.prompts())
    # the class token too; what is fused, and what PruMerge makes of the rest, is one token more
    assert seen == [1 + 6 + int(preset in ("prumerge", "evit"))]


@pytest.mark.parametrize("name", ["blip2 opt", "instruct t5"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=lambda how: next(reversed(how)),
)
@torch.no_grad()
def test_strategies(name, how):
    case = make(name)
    pruned, inputs = case.pruned(**KEEP), case.prompts()
    with vp.collect() as traces:
        pruned.vision_model(inputs["pixel_values"])
    results = []
    for model, context in ((pruned, contextlib.nullcontext()), (case.model, case.masked(traces[0]))):
        torch.manual_seed(2)
        with context:
            results.append(model.generate(**inputs, **how, max_new_tokens=5))
    assert torch.equal(*results)


@torch.no_grad()
def test_an_image_without_a_prompt():
    case = make("blip2 opt")
    pixels = images(2)
    got, want = (
        model.generate(pixels, max_new_tokens=4, do_sample=False) for model in (case.pruned(keep=KEEP_ALL), case.model)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", READING)
def test_the_loss_is_that_of_masked_images(name):
    case = make(name)
    pruned, inputs = case.pruned(**KEEP), case.prompts()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with vp.collect() as traces:
        loss = pruned(**inputs, labels=labels).loss
    with case.masked(traces[0]):
        same(loss, case.model(**inputs, labels=labels).loss)


@pytest.mark.parametrize(("preset", "parts"), [("madtp", {"guide": "codebook(anchors=6)"}), ("random", KEEP)])
def test_a_step_of_training(preset, parts):
    case = make.__wrapped__("blip2 opt")
    pruned, inputs = case.pruned(preset, **parts).train(), case.prompts()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    pruned(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    moved = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    wanted = {
        "vision_model.encoder.layers.0.self_attn.qkv.weight",
        "qformer.encoder.layer.0.crossattention.attention.key.weight",
    }
    wanted |= {"query_tokens", "language_model.lm_head.weight"} | ({"guide.anchors"} if preset == "madtp" else set())
    assert wanted <= moved


@torch.no_grad()
def test_features():
    case, model = make("blip2 opt"), make("blip2 model")
    inputs = case.prompts()
    pixels = inputs["pixel_values"]
    pruned = case.pruned(**KEEP)
    with vp.collect() as traces:
        got = pruned.get_image_features(pixels)
    with case.masked(traces[0]):
        same(got.pooler_output, case.model.get_image_features(pixels).pooler_output)
    assert got.last_hidden_state.shape[1] == max(traces[0].lengths[-1])
    given = {name: value for name, value in inputs.items() if name != "pixel_values"}
    same(pruned(None, **given, mm_encoder_outputs={"image": got}).logits, pruned(**inputs).logits)

    pruned = model.pruned(**KEEP)
    with vp.collect() as traces:
        got = pruned.get_qformer_features(pixels)
    with model.masked(traces[0]):
        same(got, model.model.get_qformer_features(pixels))
    assert pruned.get_image_features(pixels).last_hidden_state.shape[1] == max(traces[0].lengths[-1])


@pytest.mark.parametrize("has_head", [True, False])
@torch.no_grad()
def test_retrieval(has_head):
    dense = matching()
    ids, pixels = torch.randint(2, 60, (3, 5)), images(3)
    mask, how = torch.ones_like(ids), {"use_image_text_matching_head": has_head}
    pruned = vp.prune(dense, "random", **KEEP)
    with vp.collect() as traces:
        got = pruned(pixels, ids, mask, **how).logits_per_image
    kept = traces[0].output_tokens.position.split(traces[0].lengths[-1])
    assert len(set(map(len, kept))) > 1
    for row in range(3):

        def drop(qformer, args, named, row=row):
            memory = named.get("encoder_hidden_states")
            return args, named if memory is None else {
                **named,
                "encoder_hidden_states": memory[:, kept[row]],
                "encoder_attention_mask": None,
            }

        texts = slice(row, row + 1) if has_head else slice(None)
        with dense.qformer.register_forward_pre_hook(drop, with_kwargs=True):
            same(got[row : row + 1], dense(pixels[row : row + 1], ids[texts], mask[texts], **how).logits_per_image)
    whole = vp.prune(dense, "evit", keep=KEEP_ALL)
    same(whole(pixels, ids, mask, **how).logits_per_image, dense(pixels, ids, mask, **how).logits_per_image)


@pytest.mark.parametrize("name", READING)
@torch.no_grad()
def test_copies_and_files(name, tmp_path):
    case = make.__wrapped__(name)
    pruned, inputs = case.pruned("evit", at=(1,), keep="count(count=5)"), case.prompts()
    want = answers(case, pruned, inputs)
    pruned.save_pretrained(tmp_path)
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), vp.load(tmp_path)):
        assert type(other) is type(pruned)
        same(answers(case, other.eval(), inputs), want)
    same(answers(case, type(case.model).from_pretrained(tmp_path).eval(), inputs), answers(case, case.model, inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "pixel_values"),
        ({"pixel_values": torch.zeros(3, 3, 24, 24)}, "must be .batch, 3, 32, 32."),
        ({"pixel_values": torch.full((3, 3, 32, 32), torch.nan)}, "NaN"),
    ],
)
def test_bad_images(change, message):
    case = make("blip2 opt")
    inputs = case.prompts() | change
    with pytest.raises(ValueError, match=message):
        case.pruned("evit")(**inputs)


@pytest.mark.parametrize("name", [name for name in MODELS if "eager" not in name])
@torch.no_grad()
def test_placeholders_are_queries_of_the_images(name):
    case = make(name)
    inputs, pruned = case.prompts(), case.pruned("evit")
    kind, calls = "video" if case.frames > 1 else "image", [pruned, *([pruned.generate] if name in SPEAKING else [])]
    fewer = inputs["input_ids"].clone()
    fewer[0, fewer[0] == IMAGE_ID] = 5
    queries = 3 * QUERIES * case.frames
    for change, numbers in (
        ({"pixel_values": inputs["pixel_values"][:2]}, (queries, queries * 2 // 3)),
        ({"input_ids": fewer}, (queries * 2 // 3, queries)),
    ):
        given = inputs | change
        for call in calls:
            with pytest.raises(
                ValueError,
                match=f"have {numbers[0]} placeholders of {kind}s, and the {kind}s give {numbers[1]} visual",
            ):
                call(**given)
    if name in SPEAKING:
        named = {key: value for key, value in inputs.items() if key != "pixel_values"}
        got, want = pruned.generate(inputs["pixel_values"], **named, **STEPS), pruned.generate(**inputs, **STEPS)
        assert torch.equal(got.sequences, want.sequences)


def test_a_pruned_model_with_a_language_model_is_one_graph(tmp_path):
    case = make("blip2 opt")
    pruned, inputs = case.pruned("random", keep="count(count=4)"), case.prompts()
    assert vp.export(pruned, tmp_path / "a.pt2", inputs).inputs[0].shape == (None, 3, 32, 32)


def test_what_is_refused():
    case = make("instruct llama")
    with pytest.raises(ValueError, match=f"reads the {QUERIES} queries of the Q-Former"):
        case.pruned("fastv")
    with pytest.raises(TypeError, match="does not take output_hidden_states"):
        case.pruned("evit").get_image_features(images(1), torch.ones(1, 3).long(), output_hidden_states=True)
    dense = make.__wrapped__("blip2 opt").model
    dense.qformer.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(TypeError, match="set_attn_implementation"):
        vp.prune(dense, "evit")


def test_soft_training_is_refused():
    case = make("blip2 opt")
    pruned = case.pruned("madtp", guide="codebook(anchors=6)").train()
    for pruner in pruned.pruning.towers["image"].pruners.values():
        pruner.soft_temperature = 0.1
    with pytest.raises(ValueError, match="a Q-Former cannot weigh tokens"):
        pruned(**case.prompts())
