"""Pruned vision-language models whose `forward` was wrapped on the model itself: hooks, autocast, compilation, training."""

from __future__ import annotations

import copy
import functools

import accelerate
import pytest
import torch
import transformers as hf
from small_models import soften
from small_vlms import IMAGE_ID, STEPS, make
from test_vlm import same

import vltprune as vp

PLACES = {
    "output": {"keep": "count(count=2)"},
    "layers": {"preset": "random", "keep": "ratio(ratio=0.5)", "at": {"language": (0,)}},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.fixture(params=PLACES)
def place(request):
    return PLACES[request.param]


@pytest.fixture(params=["llava", "qwen3"])
def case(request):
    return make(request.param)


def copied(case, **parts):
    """A pruned copy of the case's model, which a test may wrap."""
    return vp.prune(copy.deepcopy(case.model), **{"preset": "divprune", **parts})


def dispatched(model):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def compiled(model):
    model.compile()
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward)
    return model


WRAPS = {"compile": compiled, "compiled forward": compiled_forward, "hooks": dispatched}


@pytest.mark.parametrize("wrap", WRAPS)
@torch.no_grad()
def test_wrapped_models_are_pruned_as_without(case, place, wrap):
    plain, inputs = copied(case, **place), case.prompts((3, 4))
    # wrappers are all that is asked about, not what dynamo makes of the code
    with torch.compiler.set_stance("force_eager"):
        model = WRAPS[wrap](copied(case, **place))
        with vp.collect() as traces:
            same(model(**inputs).logits, plain(**inputs).logits)
            same(model.generate(**inputs, **STEPS).logits, plain.generate(**inputs, **STEPS).logits)
        text = case.prompts((4,))
        same(model.generate(**text, **STEPS).logits, plain.generate(**text, **STEPS).logits)
    assert len(traces) >= 2


@pytest.mark.slow
@torch.no_grad()
def test_compiled_by_dynamo(place):
    case = make("llava")
    plain, inputs = copied(case, **place), case.prompts((3, 4))
    model = copied(case, **place)
    model.forward = torch.compile(model.forward, backend="eager")
    for _ in range(2):
        same(model(**inputs).logits, plain(**inputs).logits)
        same(model.generate(**inputs, **STEPS).logits, plain.generate(**inputs, **STEPS).logits)


@torch.no_grad()
def test_a_wrapper_acts_once_a_call_and_once_a_step(case, place):
    model, inputs, lengths = copied(case, **place), case.prompts((3, 4)), []
    forward = model.forward

    @functools.wraps(forward)
    def wrapper(*args, **named):
        lengths.append(named["input_ids"].shape[1])
        return forward(*args, **named)

    model.forward = wrapper
    whole = inputs["input_ids"].shape[1]
    model(**inputs)
    assert lengths == [whole]
    model.generate(**inputs, **STEPS)
    short = whole - (case.rows - 2 if place is PLACES["output"] else 0)
    assert lengths == [whole, short] + [1] * (STEPS["max_new_tokens"] - 1)
    model(**inputs)
    assert lengths[-1] == whole
    assert model.as_dense().forward.__func__ is type(case.model).forward


def test_accelerate_in_bfloat16(case, place):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    plain, inputs = copied(case, **place), case.prompts((3, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = plain(**inputs).logits
    model = accelerator.prepare(copied(case, **place))
    same(model(**inputs).logits, want.float())
    accelerator.backward(model(**inputs, labels=inputs["input_ids"]).loss)
    assert model.lm_head.weight.grad.abs().sum() > 0
    types = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    model.generate(**inputs, **STEPS)
    hook.remove()
    assert set(types) == {torch.bfloat16}
    model = accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    with torch.no_grad():
        same(model(**inputs).logits, plain(**inputs).logits)


def test_what_runs_the_dense_model_is_refused(case, place):
    model = copy.deepcopy(case.model)
    with pytest.raises(TypeError, match="hooks of accelerate"):
        vp.prune(dispatched(model), **{"preset": "divprune", **place})
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    inputs = case.prompts((3, 4))
    with torch.no_grad():
        pruned = dispatched(vp.prune(model, **{"preset": "divprune", **place}))
        same(pruned(**inputs).logits, copied(case, **place)(**inputs).logits)
    model = copy.deepcopy(case.model)
    model.generate = functools.partial(model.generate)
    with pytest.raises(TypeError, match=r"`del model\.generate`"):
        vp.prune(model, **{"preset": "divprune", **place})


INSIDE = {
    "windows": ("mistral window", {"keep": "count(count=2)"}),
    "attention of the tower": ("llava-next", {"preset": "fastervlm", "keep": "count(count=9)"}),
    "attention of the tower, windows": ("gemma3 window", {"preset": "dart", "keep": "count(count=2)"}),
}


@pytest.mark.parametrize("what", INSIDE)
@torch.no_grad()
def test_hooks_on_what_is_copied_for_a_call(what):
    name, parts = INSIDE[what]
    case = make(name)
    plain, model, inputs = copied(case, **parts), copied(case, **parts), case.prompts((3, 4, 3))
    dispatched(model)
    same(model(**inputs).logits, plain(**inputs).logits)
    same(model.generate(**inputs, **STEPS).logits, plain.generate(**inputs, **STEPS).logits)


@torch.no_grad()
def test_compiled_parts_are_copied_for_a_call():
    case = make("mistral window")
    plain, model, inputs = (
        copied(case, keep="count(count=2)"),
        copied(case, keep="count(count=2)"),
        case.prompts((3, 4)),
    )
    with torch.compiler.set_stance("force_eager"):
        model.model.compile()
        model.model.language_model.compile()
        same(model(**inputs).logits, plain(**inputs).logits)
    model.model.forward = functools.partial(model.model.forward)
    with pytest.raises(TypeError, match="forward of this LlavaModel was replaced"):
        model(**inputs)


def test_hooks_in_soft_training():
    # the host of the language model takes its place, in a copy of what is around it
    parts = {"preset": "madtp", "guide": "codebook(anchors=5)", "keep": "learned(threshold=-0.3)", "place": "output"}
    plain, inputs = soften(copied(make("llava"), reducer="drop", **parts), 0.5), make("llava").prompts((3, 4))
    model = dispatched(copy.deepcopy(plain))
    assert model.pruning.towers["image"].decides_softly
    want, got = (one(**inputs, labels=inputs["input_ids"]).loss for one in (plain, model))
    same(got, want)


# peft reads the old name of an attribute of transformers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "where"), [("llava", "output"), ("llava", "layers"), ("qwen3", "output"), ("qwen3", "layers")]
)
def test_trainer_and_adapters(name, where, bf16, tmp_path):
    peft = pytest.importorskip("peft")
    case, place = make(name), PLACES[where]
    rows = [case.prompts((3, 4)) for _ in range(2)]
    for row in rows:
        row["labels"] = row["input_ids"].masked_fill(row["input_ids"] == IMAGE_ID, -100)
    pruned = copied(case, **place)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    options |= {"bf16": bf16, "save_strategy": "no"}
    collate = lambda given: {key: torch.cat([row[key] for row in given]) for key in given[0]}  # noqa: E731

    def train(model):
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        arguments = hf.TrainingArguments(str(tmp_path), **options)
        assert hf.Trainer(model, arguments, collate, rows).train().training_loss > 0
        return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}

    assert "lm_head.weight" in train(pruned)
    adapted = peft.get_peft_model(pruned, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    changed = train(adapted)
    assert changed and all("lora" in name for name in changed)
    inputs = case.prompts((3, 4))
    length = inputs["input_ids"].shape[1]
    assert adapted.generate(**inputs, max_new_tokens=3).shape == (1, length + 3)
    with vp.collect() as traces:
        adapted.eval()(**inputs)
    layout = traces[-1].output_tokens.layout
    assert traces and layout.total < traces[-1].input_tokens.layout.total
