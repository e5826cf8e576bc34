"""Whole runs of a vision-language model with a language model: the loss is that of the answer behind the prompt."""

from __future__ import annotations

import json

import pytest
import torch

import vltprune as vp
from vltprune.data import SyntheticNLVR
from vltprune.data.llava import llava_processor, statement_inputs
from vltprune.evaluation.tasks import Nlvr
from vltprune.training import CompressConfig, compress
from vltprune.training.losses.objectives import build_objective

SIZES = {
    "patch_size": 24,
    "vision_width": 32,
    "vision_depth": 3,
    "vision_heads": 2,
    "text_width": 32,
    "text_depth": 2,
    "text_heads": 2,
    "text_hidden": 64,
}
RUNS = {
    # DTP's threshold, in the image tower and in a layer of the language model
    "controller": ("threshold", {"image": [0, 1], "language": [0]}),
    # soft tokens of the image tower, which flow into a language model that is not pruned
    "learned": ("learned(threshold=-1.0)", {"image": [0, 1]}),
}


def config(**changes):
    common = {
        "task": "nlvr",
        "model": "llava_tiny",
        "model_args": SIZES,
        "data": "synthetic:train:16x2",
        "val": "synthetic:val:8",
        "reduction": 0.2,
        "ramp": 0.25,
        "steps": 12,
        "batch_size": 4,
        "lr": 3e-3,
        "checkpoint_every": 12,
        "log_every": 1,
        "workers": 0,
    }
    return CompressConfig.from_dict({**common, **changes})


@pytest.mark.parametrize("budget", RUNS)
def test_the_cost_is_reached_and_the_loss_falls(budget, tmp_path):
    keep, at = RUNS[budget]
    parts = {"guide": "codebook(anchors=4)", "keep": keep, "at": at}
    done = compress(config(budget=budget, parts=parts, distill=0.5, distill_summaries=0.1), tmp_path)
    dense, pruned = done.rows
    assert pruned["macs_saved"] == pytest.approx(0.2, abs=0.02)
    assert pruned["scores"].keys() == dense["scores"].keys() == {"accuracy"}
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert sum(row["task"] for row in history[-3:]) < 0.85 * sum(row["task"] for row in history[:3])
    wanted = {"align", "distill", "saliency", "saved"} | ({"budget"} if budget == "learned" else {"knob"})
    assert wanted <= history[1].keys()
    assert [row["saved"] for row in history if "saved" in row][-1] == pytest.approx(0.2, abs=0.15)

    model = vp.load(tmp_path / "model")
    anchors = model.pruning.guide.anchors
    assert not model.pruning.guide.is_untrained and torch.isfinite(anchors).all()
    pair = SyntheticNLVR("val", 1)[0]
    with torch.no_grad(), vp.collect() as traces:
        model.generate(**statement_inputs([pair.images], pair.sentence, llava_processor(24)), max_new_tokens=1)
    assert traces[0].output_tokens.layout.total < traces[0].input_tokens.layout.total


def test_the_loss_is_the_models_own_on_the_answer():
    torch.manual_seed(0)
    model = vp.create_model("llava_tiny", **SIZES)
    task, records = Nlvr.from_model(model), SyntheticNLVR("train", 3)
    objective = build_objective(task, model)
    images = torch.stack([record.load_tensor(vp.transforms(model)) for record in records])
    loss = objective(model, records, images, 0)
    (ids, mask), _ = task.tokenize(records)
    inputs = statement_inputs(
        [record.images for record in records],
        [record.sentence for record in records],
        llava_processor(24),
    )
    assert torch.equal(ids, inputs["input_ids"]) and torch.equal(mask, inputs["attention_mask"])
    torch.testing.assert_close(images.flatten(0, 1), inputs["pixel_values"], atol=1e-6, rtol=0)
    answers = torch.tensor([[58 if record.label else 59, 60] for record in records])
    whole = {
        "input_ids": torch.cat([ids, answers], 1),
        "attention_mask": torch.nn.functional.pad(mask, (0, 2), value=1),
        "pixel_values": inputs["pixel_values"],
    }
    logits = model(**whole).logits.log_softmax(-1)
    want = sum(-logits[row, -3 + i, answers[row, i]] for row in range(3) for i in range(2))
    torch.testing.assert_close(loss.total, want)
    assert int(loss.count) == 6
    torch.testing.assert_close(loss.outputs.log_softmax(-1), logits[:, -3])


def test_other_words_are_refused():
    with pytest.raises(
        ValueError, match="in the 61 words of llava_tiny, and this LlavaForConditionalGeneration has 99"
    ):
        Nlvr.from_model(vp.create_model("llava_tiny", **SIZES, vocab_size=99))
