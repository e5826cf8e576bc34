"""Whole runs, small ones: every task, targets for each tower, and input that cannot be read."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import SHORT, config, weights

import vltprune as vp
from vltprune.training import compress
from vltprune.training.loop import trainer as trainer_module
from vltprune.training.models import load_dense_model

TASKS = ["nlvr", "caption", "vqa", "retrieval"]
FEW = {"saliency": 0.0, "val_limit": 2}


@pytest.mark.filterwarnings("ignore:captions are written, and not scored")
@pytest.mark.parametrize(("task", "budget"), [("nlvr", "controller"), *((task, "learned") for task in TASKS)])
def test_every_task_can_be_compressed(task, budget, tmp_path):
    """Its scores are distilled too, besides logits and summaries."""
    steps = 4 if budget == "learned" else 2  # to the first one of the milder cost
    keep = {"keep": "learned(threshold=-0.5)"} if budget == "learned" else {"keep": "ratio(ratio=0.7)"}
    parts = {"guide": "codebook(anchors=4)", **keep}
    settings = config(
        task,
        tmp_path / "data",
        budget=budget,
        parts=parts,
        distill=0.5,
        distill_summaries=0.5,
        saliency=0.5,
        serve=(0.2,),
        accumulate=2,
        steps=steps,
        val_limit=4,
        k_test=2,
    )
    before = load_dense_model(settings).state_dict()
    done = compress(settings, tmp_path / "run")
    assert done is not None

    dense, *pruned = done.rows
    assert [row["reduction"] for row in done.rows] == [0.0, 0.2, 0.3]
    assert [row["macs_saved"] for row in pruned] == pytest.approx([row["reduction"] for row in pruned], abs=0.02)
    assert all(set(row["scores"]) == set(dense["scores"]) for row in pruned)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [*range(1, steps + 1)]
    assert [name for row in history for name in row if name == "task 0.2"] == ["task 0.2"]  # of the last step
    assert all(0 < row["saliency"] < 1 for row in history[:-1])
    said = {"task", "align", "distill", "lr", "target", "skipped_steps", "budget" if budget == "learned" else "knob"}
    assert said <= set(history[0])

    model = vp.load(tmp_path / "run" / "model")
    after = model.pruning.host.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("visual") for name in changed)
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text())[2]["knob"]["value"] == done.rows[2]["knob"]["value"]
    )


def test_a_dense_model_can_be_trained_first(tmp_path):
    changes = {"freeze": ["visual.blocks.0.*"], "augment": True, "k_test": 2, "val_limit": 4}
    settings = config("retrieval", tmp_path / "data", reduction=0.0, **changes)
    before = load_dense_model(settings).state_dict()
    done = compress(settings, tmp_path / "run")
    model = vp.load(tmp_path / "run" / "model")
    assert not hasattr(model, "pruning")
    assert [row["macs_saved"] for row in done.rows] == [0.0, 0.0]
    assert "saliency" not in (tmp_path / "run" / "history.jsonl").read_text()  # no teacher, for there are no scores
    after = model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("visual.blocks.0.")} <= same
    assert not any(name.startswith(("visual.blocks.1.attn.qkv", "text.layers")) for name in same)
    with pytest.raises(
        ValueError, match=r"freeze: no parameter's name matches 'vision\.\*': names are temperature, visual"
    ):
        compress(settings.replace(freeze=["vision.*"]), tmp_path / "other")


def test_a_cost_out_of_reach_gives_the_nearest(tmp_path):
    parts = {"guide": "codebook(anchors=4)", "keep": "ratio", "at": {"text": [1]}}
    settings = config("nlvr", tmp_path / "data", reduction=0.9, serve=[0.8], parts=parts, steps=1, **FEW)
    with pytest.warns(UserWarning, match=r"the nearest cost is evaluated and saved: reduction=0\.9 is out of reach"):
        done = compress(settings, tmp_path / "run")
    assert [row["reduction"] for row in done.rows] == [0.0, 0.9]
    assert 0 < done.rows[-1]["macs_saved"] < 0.5
    kept = vp.load(tmp_path / "run" / "model").pruning.config.part("keep")
    assert kept.args["ratio"] == done.rows[-1]["knob"]["value"] == 0.0
    assert "90% fewer MACs are out of these parts' reach: the nearest, " in html.unescape(done.page.read_text())


@pytest.mark.filterwarnings("ignore:the nearest cost is evaluated")  # of texts of few tokens, whose counts jump
def test_each_tower_is_trained_and_set_to_its_own_target(tmp_path, request):
    asked = {"text": 0.3, "image": 0.4}
    settings = config("retrieval", tmp_path / "data", reduction=asked, ramp=0.0, k_test=0, saliency=0.0)
    done = compress(settings, tmp_path / "run")
    dense, row = done.rows
    assert (dense["reduction"], row["reduction"]) == (0.0, asked)
    for tower, share in asked.items():
        macs, whole = row["towers"][tower]
        assert 1 - macs / whole == pytest.approx(share, abs=0.06)  # of whole tokens, of which there are few
    ratios = {tower: one["value"] for tower, one in row["knob"]["towers"].items()}
    config_of = vp.load(tmp_path / "run" / "model").pruning.config
    assert {tower: config_of.part("keep", tower).args["ratio"] for tower in ratios} == ratios
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert all(row[f"target {tower}"] == share for row in history for tower, share in asked.items())
    assert {"saved", "saved image", "saved text", "knob image", "knob text"} <= history[-1].keys()

    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(json.dumps(done.rows))
    page = html.unescape(done.page.read_text())
    assert "text 30 %, image 40 % fewer MACs" in page
    assert "share of the dense MACs of the text tower saved" in page
    assert f"image ratio {ratios['image']:.4g}, text ratio {ratios['text']:.4g}" in page

    whole = weights(tmp_path / "run")  # and the same again where it was stopped on the way
    shutil.rmtree(tmp_path / "run" / "checkpoints/step_00000004")
    request.getfixturevalue("no_final_evaluation")
    again = compress(settings, tmp_path / "run").state_dict()
    assert again.keys() == whole.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    last = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    assert all(last[name] == history[-1][name] for name in ("knob image", "knob text", "saved image", "saved text"))


def test_a_tower_that_is_left_out_stays_as_its_parts_say(tmp_path):
    parts = {"guide": "codebook(anchors=4)", "keep": {"image": "ratio(ratio=0.7)", "text": "ratio(ratio=0.75)"}}
    settings = config("nlvr", tmp_path / "data", reduction={"image": 0.4}, parts=parts, steps=1, **FEW)
    compress(settings, tmp_path / "run")
    kept = vp.load(tmp_path / "run" / "model").pruning.config
    assert kept.part("keep", "text") == vp.Part("ratio", {"ratio": 0.75})
    assert kept.part("keep", "image").args["ratio"] not in (0.7, 0.75)


@pytest.mark.filterwarnings("ignore:the nearest cost is evaluated")
def test_a_towers_cost_out_of_reach_gives_the_nearest(tmp_path):
    parts = {"guide": "codebook(anchors=4)", "keep": "ratio", "at": {"image": [1], "text": None}}
    asked = {"image": 0.95, "text": 0.3}
    changes = {"reduction": asked, "parts": parts, "steps": 1, "k_test": 0, "saliency": 0.0, "val_limit": 4}
    settings = config("retrieval", tmp_path / "data", **changes)
    with pytest.warns(UserWarning, match=r"nearest cost is evaluated and saved: .* of the image tower is out of reach"):
        done = compress(settings, tmp_path / "run")
    kept = vp.load(tmp_path / "run" / "model").pruning.config
    assert kept.part("keep", "image").args["ratio"] == 0.0
    towers = done.rows[-1]["knob"]["towers"]
    assert 1 - towers["text"]["macs"] / towers["text"]["dense_macs"] == pytest.approx(0.3, abs=0.06)
    missed = "95% fewer MACs of the image tower are out of these parts' reach: the nearest, "
    assert missed in html.unescape(done.page.read_text())


@pytest.mark.parametrize(
    ("task", "reduction", "parts", "complaint"),
    [
        ("nlvr", {"vision": 0.5}, {}, r"names the tower 'vision'; this model has image, text"),
        ("caption", {"image": 0.5, "text": 0.3}, {}, r"names the tower 'text'; this model has image"),
        ("retrieval", {"text": 0.3}, {"at": {"image": None}}, r"the text tower is pruned nowhere"),
        (
            "retrieval",
            {"text": 0.3},
            {"keep": {"image": "ratio", "text": "count(count=4)"}},
            r"no knob that a budget can set in the text tower",
        ),
    ],
)
def test_towers_that_cannot_have_a_target_are_refused_before_training(task, reduction, parts, complaint, tmp_path):
    settings = config(task, tmp_path / "data", reduction=reduction, parts={"guide": "codebook(anchors=4)", **parts})
    with pytest.raises(ValueError, match=complaint):
        compress(settings, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())  # and the folder is free for the config that is right


def test_images_that_cannot_be_opened_are_reported(tmp_path):
    settings = config("nlvr", tmp_path / "data", steps=2, saliency=0.0)  # each record once
    (tmp_path / "data" / "0.png").write_bytes(b"no image")
    done = compress(settings, tmp_path / "run")
    assert [len(row["skipped"]) for row in done.rows] == [2, 2]  # the records that show it
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_records"] > 0
    notes = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert notes == list(done.skipped) and len(notes) == rows[-1]["skipped_records"]
    assert all(note.startswith("entry ") and str(tmp_path / "data" / "0.png") in note for note in notes)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # from Python 3.12 on
def test_workers_change_nothing(no_final_evaluation, tmp_path):
    settings = config("nlvr", tmp_path / "data", **{**SHORT, "steps": 3, "augment": True})
    (tmp_path / "data" / "0.png").write_bytes(b"no image")
    alone, by_two = (compress(settings.replace(workers=n), tmp_path / f"run{n}").state_dict() for n in (0, 2))
    assert all(torch.equal(value, by_two[name]) for name, value in alone.items())


def test_runs_of_both_dtypes_in_one_process(tmp_path):
    parts = {"guide": "codebook(anchors=4)", "keep": "learned(threshold=-0.5)"}
    changes = {"budget": "learned", "parts": parts, "distill": 0.5, "val_limit": 2}
    settings = config("nlvr", tmp_path / "data", steps=2, **changes)
    for dtype in ("bfloat16", "float32", "bfloat16"):
        assert compress(settings.replace(dtype=dtype), tmp_path / dtype) is not None
    full, half = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    assert {value.dtype for value in half.values()} == {value.dtype for value in full.values()}
    assert all(value.isfinite().all() for value in half.values())
    assert any(not torch.equal(value, half[name]) for name, value in full.items())


def test_distillation_of_what_is_not_pruned_costs_nothing(tmp_path):
    """A pruned model that keeps every token agrees with its teacher until it has trained."""
    parts = {"guide": "codebook(anchors=4)", "keep": "learned(threshold=-20.0)"}
    settings = config("nlvr", tmp_path / "data", distill=1.0, distill_summaries=1.0, parts=parts, steps=1)
    run = engine_of(settings, tmp_path / "run")
    records, images = next(run.loader.batches(0, 1))
    figures = run.module(records, images, 0, True)
    assert figures["distill"] == pytest.approx(0.0, abs=1e-5)
    assert figures["kept"]["image"].tolist() == [65.0] * 3


def engine_of(settings, folder):
    """A run that has not begun."""
    import copy

    from vltprune.evaluation import tasks

    dense = load_dense_model(settings)
    teacher = vp.prune(copy.deepcopy(dense), "random", at=())
    model = vp.prune(dense, settings.pruning)
    kind = tasks.tasks[settings.task]
    task = kind.from_model(model, tasks.Options(settings.vocabulary))
    folder.mkdir()
    records = kind.load_records(settings.data, str(Path(settings.data).parent))
    return trainer_module.Trainer(settings, folder, model, task, records, teacher)


def test_pruned_models_are_not_pruned_again(tmp_path):
    with pytest.raises(
        TypeError, match=r"model='blip_nlvr_tiny_evit' is pruned already: give its dense model, and this"
    ):
        compress(config("nlvr", tmp_path / "data", model="blip_nlvr_tiny_evit"), tmp_path / "run")


def test_a_run_can_start_from_a_milder_one(tmp_path):
    """The weights, anchors among them, are the earlier run's; the dense model stays the one that is compared with."""
    first = config("nlvr", tmp_path / "data", reduction=0.2, steps=2, **FEW)
    mild = compress(first, tmp_path / "mild")
    further = first.replace(reduction=0.4, start=str(tmp_path / "mild" / "model"), ramp=0.0, lr=1e-12, steps=1)
    done = compress(further, tmp_path / "further")
    assert [row["reduction"] for row in done.rows] == [0.0, 0.4]
    assert done.rows[0]["scores"] == mild.rows[0]["scores"]
    assert f"initial weights</th><td>{tmp_path / 'mild' / 'model'}" in done.page.read_text()
    there, now = weights(tmp_path / "mild"), weights(tmp_path / "further")
    assert there.keys() == now.keys()
    assert all(torch.allclose(there[name], now[name], atol=1e-9) for name in there)
    with pytest.raises(vp.CheckpointError, match=r"there is no file .*nowhere"):
        compress(further.replace(start=str(tmp_path / "nowhere")), tmp_path / "other")


def test_batches_that_do_not_split(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size=4 does not split into 1 processes x accumulate=3 equal parts"):
        compress(config("nlvr", tmp_path / "data", accumulate=3), tmp_path / "run")


@pytest.mark.filterwarnings("ignore:captions are written, and not scored")
@pytest.mark.parametrize("task", TASKS)
def test_texts_that_cannot_be_read_are_reported(task, tmp_path):
    """Half an emoji is repaired; a text of more tokens than the model takes, and answers held back, are not learned from."""
    settings = config(task, tmp_path / "data", **{**SHORT, "steps": 2, "val_limit": None})
    file = Path(settings.data)
    entries = json.loads(file.read_text())
    half, long = "above \ud83d blue", " ".join("abcdefgh" * 4)
    for entry, text in ((entries[0], half), (entries[1], long)):
        changed = {"nlvr": "sentence", "vqa": "question"}.get(task, "caption")
        entry[changed] = text
    if task == "vqa":
        del entries[2]["answer"]
        entries[3]["answer"] = [long] * 2
    file.write_text(json.dumps(entries))
    done = compress(settings, tmp_path / "run")
    assert done is not None
    wrong = {"nlvr": {1}, "vqa": {2, 3}, "caption": {1}, "retrieval": set()}[task]
    assert {int(note.split()[1].rstrip(":")) for note in done.skipped} <= wrong
    assert all(row["records"] >= 7 for row in done.rows)
