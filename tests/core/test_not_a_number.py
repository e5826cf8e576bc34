"""NaN is no answer: whoever would choose, rank or score by it says so instead."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import vltprune as vp
from vltprune import data
from vltprune.cli import main as cli
from vltprune.demo import measure
from vltprune.evaluation import metrics, tasks
from vltprune.evaluation.evaluator import summarize
from vltprune.models.generation import BeamSearch, GenerationConfig, GreedySearch, NucleusSampling
from vltprune.models.momentum import _hard_negatives

NAN, INF = float("nan"), float("inf")
IMAGES = torch.randn(3, 1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def broken(name: str):
    """A model of random weights, one of which is NaN, far behind in it."""
    model = vp.create_model(name)
    with torch.no_grad():
        [*model.parameters()][-1].view(-1)[:1].fill_(NAN)
        if hasattr(model, "decoder"):
            model.decoder.body.word.weight[5:9].fill_(NAN)
        if hasattr(model, "text_projection"):
            model.text_projection.bias[0] = NAN
    return model


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_metrics_refuse_it(bad):
    with pytest.raises(ValueError, match=r"probabilities\[1\] is"):
        metrics.accuracy([0.3, bad], [0, 0])
    good, wrong = torch.eye(3), torch.eye(3)
    wrong[1, 2] = bad
    for pair in ((wrong, None), (good, wrong)):
        with pytest.raises(ValueError, match="must be finite"):
            metrics.recalls(pair[0], [0, 1, 2], by_text=pair[1])
    with pytest.raises(ValueError, match="similarity holds NaN or infinity"):
        tasks.rerank(wrong, lambda images, texts: torch.zeros(len(images)))
    with pytest.raises(FloatingPointError, match="a match in row 0"):
        tasks.rerank(good, lambda images, texts: torch.full((len(images),), bad))


class State:
    def reorder(self, rows):
        return self


@pytest.mark.parametrize("strategy", [GreedySearch(), BeamSearch(1), BeamSearch(3), NucleusSampling()], ids=repr)
@pytest.mark.parametrize("bad", [NAN, INF, "all"])
@pytest.mark.parametrize("at", [1, 3])
def test_no_token_is_chosen_by_it(strategy, bad, at):
    lengths = []

    def step(new, state):
        lengths.append(new.shape[1])
        logits = torch.arange(12.0).repeat(len(new), 1)
        if len(lengths) == at:
            logits[-1] = torch.where(torch.arange(12) == 4, bad, logits[-1]) if bad != "all" else -INF
        return logits[:, None].squeeze(1), state

    rules = GenerationConfig(eos_id=0, pad_id=1, min_length=4, max_length=6)
    with pytest.raises(FloatingPointError, match="no token can be chosen"):
        strategy(step, State(), torch.full((2, 1), 2), rules)


def test_impossible_tokens_are_no_fault():
    def step(new, state):
        logits = torch.full((len(new), 12), -INF)
        logits[:, 7] = 0.0
        return logits, state

    rules = GenerationConfig(eos_id=0, pad_id=1, min_length=2, max_length=4)
    assert GreedySearch()(step, State(), torch.full((1, 1), 2), rules).tolist() == [[2, 7, 7, 7]]


def records(task):
    if task == "nlvr":
        return [data.Statement(7 + i, (), "no star", 1) for i in range(3)]
    if task == "vqa":
        return [data.Question(7 + i, (), str(i), "no star", ("red",) * 3) for i in range(3)]
    return [data.Captioned(7 + i, (), str(i), ("a star", "no star")) for i in range(3)]


@pytest.mark.filterwarnings("ignore:captions are written, and not scored")
@pytest.mark.parametrize(
    ("task", "answers"),
    [("nlvr", False), ("vqa", False), ("vqa", True), ("caption", False), ("retrieval", False)],
)
@torch.no_grad()
def test_no_task_answers_by_it(task, answers, tmp_path):
    (tmp_path / "answers.json").write_text('["red", "no star", "blue"]')
    options = tasks.Options(answers=tmp_path / "answers.json" if answers else None)
    model, some = broken(f"blip_{task}_tiny"), records(task)
    one = tasks.tasks[task].from_model(model, options)
    texts, _ = one.tokenize(some)
    images = IMAGES.expand(-1, 2, -1, -1, -1) if task == "nlvr" else IMAGES
    with pytest.raises(FloatingPointError, match=r"NaN"):
        one.predict(model, some, images, texts)


@torch.no_grad()
def test_the_record_is_named():
    model, some = vp.create_model("blip_nlvr_tiny"), records("nlvr")
    task = tasks.Nlvr.from_model(model)

    def second_is_bad(*inputs):
        return torch.tensor([[0.0, 1.0], [NAN, NAN], [1.0, 0.0]])

    with pytest.raises(FloatingPointError, match="logits of entry 8 are NaN or infinite"):
        task.predict(second_is_bad, some, IMAGES, ())


@torch.no_grad()
def test_the_second_stage_judges_nothing_by_it():
    model = vp.create_model("blip_retrieval_tiny")
    first, some = tasks.Retrieval.from_model(model), records("retrieval")
    rows = [
        {"index": 7 + i, **row} for i, row in enumerate(first.predict(model, some, IMAGES, first.tokenize(some)[0]))
    ]
    second = first.matching(some, rows, k=2)
    model.head.bias[0] = NAN
    pairs = second.pairs()[:1]
    with pytest.raises(FloatingPointError, match="matching logits of entry 0"):
        second.predict(model, pairs, IMAGES[:1], second.tokenize(pairs)[0])


def test_a_score_that_is_none_is_not_reported():
    class Scores:
        def score(self, rows):
            return {"CIDEr": NAN}

    row = {"macs": 1.0, "dense_macs": 1.0, "towers": {}, "kept": {}, "seconds": 1.0}
    with pytest.raises(FloatingPointError, match="CIDEr of 1 records is nan"):
        summarize(Scores(), [row])


@pytest.mark.parametrize(
    ("task", "model", "options"),
    [("nlvr", "blip_nlvr_tiny", []), ("vqa", "blip_vqa_tiny", []), ("vqa", "blip_vqa_tiny", ["--answers"])],
)
def test_commands_end_with_the_reason(task, model, options, tmp_path, capsys):
    from PIL import Image

    vp.save(broken(model), tmp_path / "model")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    entry = {"image": "a.png", "question": "no star", "answer": ["red"] * 10}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (tmp_path / "answers.json").write_text('["red", "no star"]')
    source = "synthetic:test:4" if task == "nlvr" else str(tmp_path / "a.json")
    answers = [*options, str(tmp_path / "answers.json")] if options else []
    argv = ["eval", "--task", task, "--model", str(tmp_path / "model"), "--data", source, *answers]
    assert cli.main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert "NaN" in capsys.readouterr().err and not (tmp_path / "out" / "summary.json").exists()
    if task == "nlvr":
        argv = ["predict", *[str(tmp_path / "a.png")] * 2, "no star", "--output", str(tmp_path)]
        assert cli.main([*argv, "--pretrained", str(tmp_path / "model"), "--model", model]) == 2
        assert "NaN" in capsys.readouterr().err


def test_pruned_features_are_numbers(tmp_path, capsys):
    from PIL import Image

    model = vp.create_model("blip_tiny")
    with torch.no_grad():
        model.visual.norm.bias[0] = NAN
    vp.save(model, tmp_path / "model")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photos" / "a.png")
    argv = ["features", "blip_tiny_evit", str(tmp_path / "photos"), "--pretrained", str(tmp_path / "model")]
    assert cli.main([*argv, "--output", str(tmp_path / "out"), "--draw", "0"]) == 2
    assert "a.png are NaN or infinite" in capsys.readouterr().err


def test_results_count_it_as_wrong():
    result = measure.ModelResult(np.array([NAN, 0.2, 0.9]), np.array([0, 0, 1]), ("count",) * 3)
    assert result.correct.tolist() == [False, True, True]
    with pytest.raises(FloatingPointError, match="no answer"):
        measure.evaluate_models({"it": vp.prune(broken("blip_nlvr_tiny"), "evit")}, measure.generate_batches("test", 2))


def test_hard_negatives_are_drawn_all_the_same():
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    features[2] = NAN
    texts, images = _hard_negatives(features, features, torch.tensor([0, 0, 1, 2]), torch.tensor(0.1))
    assert all(i not in (0, 1) for i in texts[:2].tolist()) and texts[2] != 2 and images[3] != 3
    assert math.isfinite(float(texts.sum()))
