"""`compress` from end to end."""

from __future__ import annotations

import json

import pytest

import vltprune as vp
from vltprune.cli import main as cli

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")

SMALL = {"vision_depth": 2, "text_depth": 2, "merge_from": 1, "image_size": 48}
SHORT = [
    "--set",
    f"model_args={SMALL}",
    "steps=2",
    "batch_size=2",
    "lr=1e-4",
    "checkpoint_every=1",
    "val_limit=4",
    "workers=0",
    "parts={'keep': 'ratio'}",
]


def command(output, *options):
    data = ["--data", "synthetic:train:2x2", "--val", "synthetic:val:8"]
    return ["compress", "--task", "nlvr", "--model", "blip_nlvr_tiny", *data, "--output", str(output), *options]


def test_it_trains_prints_results_and_resumes(tmp_path, capsys):
    options = ["--reduction", "0.5", *SHORT, "--set", "seed=3"]  # beside the fields that were set before
    assert cli.main(command(tmp_path / "run", *options)) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["steps"], settings["seed"]) == (2, 3)
    out = capsys.readouterr().out
    assert "accuracy %" in out and "50% asked" in out and "dense" in out and "ratio 0." in out
    model = vp.load(tmp_path / "run" / "model")
    assert model.pruning.config.part("keep").name == "ratio"
    before = json.loads((tmp_path / "run" / "results.json").read_text())
    assert cli.main(command(tmp_path / "run", *options)) == 0  # there is nothing left to do
    assert json.loads((tmp_path / "run" / "results.json").read_text())[1]["scores"] == before[1]["scores"]


@pytest.mark.filterwarnings("ignore:the nearest cost is evaluated")  # of texts of few tokens, whose counts jump
def test_a_target_for_each_tower(tmp_path, capsys, fails):
    short = [*SHORT, "--set", "steps=1", "saliency=0.0"]
    assert "names the tower 'vision'; this model has image, text" in fails(
        *command(tmp_path / "run", "--reduction", "vision=0.5", *short)
    )
    assert cli.main(command(tmp_path / "run", "--reduction", "image=0.5,text=0.7", *short)) == 0
    out = capsys.readouterr().out
    assert "image 50%, text 70% asked" in out and "image ratio 0." in out and ", text ratio 0." in out
    _, row = json.loads((tmp_path / "run" / "results.json").read_text())
    assert row["reduction"] == {"image": 0.5, "text": 0.7}
    assert f"{row['reductions']['text']:.1%}  {row['shares']['text']:>9.0%}" in out
    assert sum(row["shares"].values()) == pytest.approx(1)
    kept = vp.load(tmp_path / "run" / "model").pruning.config.keep
    assert {tower: part.name for tower, part in kept.items()} == {"image": "ratio", "text": "ratio"}


def test_what_is_given_wins_over_the_file(tmp_path, fails):
    fields = {
        "task": "nlvr",
        "model": "blip_nlvr_tiny",
        "model_args": SMALL,
        "data": "synthetic:train:2",
        "val": "synthetic:val:2",
        "steps": 1,
        "workers": 0,
    }
    (tmp_path / "run.json").write_text(json.dumps({**fields, "batch_size": 2, "reduction": 0.7, "dtype": "bfloat16"}))
    base = ["compress", "--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "run")]
    assert cli.main([*base, "--reduction", "0.4", "--preset", "random", "--dtype", "float32"]) == 0
    there = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (there["reduction"], there["preset"], there["batch_size"]) == (0.4, "random", 2)
    assert there["dtype"] == "float32"
    assert "is the run of another config (preset" in fails(*[*base, "--reduction", "0.4", "--dtype", "float32"])
    assert "takes no argument 'step'; did you mean steps" in fails(*[*base, "--set", "step=3"])
    assert "a compression config needs task" in fails("compress", "--output", str(tmp_path / "other"))
