"""The leaderboard runs each cell once, and its page says what the results file says."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import timm
import torch

import vltprune as vp

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the leaderboard, imported as the script imports them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import leaderboard
    import leaderboard_page
    import leaderboard_tasks

    yield types.SimpleNamespace(run=leaderboard, page=leaderboard_page, tasks=leaderboard_tasks)
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def task(scripts):
    """A tiny ViT; the score is how many inputs keep their largest feature."""
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", img_size=128, num_classes=5).eval()
    batches = torch.randn(12, 3, 128, 128).split(4)
    with torch.no_grad():
        labels = torch.cat([dense(batch).argmax(-1) for batch in batches])

    def score(logits):
        return {"accuracy": logits.argmax(-1) == labels}

    return scripts.tasks.Task(dense, batches[:1], batches, lambda model, batch: model(batch), score)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_cell_runs_once_to_the_cost_that_is_asked(scripts, task, tmp_path):
    file = tmp_path / "results" / "leaderboard.jsonl"
    scripts.run.run("nlvr", task, ["evit", "random"], [0.3], file)
    rows = rows_of(file)
    assert [(row["preset"], row["seed"]) for row in rows] == [
        ("dense", 0),
        ("evit", 0),
        ("random", 0),
        ("random", 1),
    ]
    assert rows[0]["scores"]["accuracy"] == 1 and rows[0]["macs_saved"] == 0
    for row in rows[1:]:
        assert row["macs_saved"] == pytest.approx(0.3, abs=0.05)
        tokens = row["tokens"]["image"]
        assert len(tokens) == 1 + len(task.dense.blocks) and tokens[0] == 65 > tokens[-1]
    scripts.run.run("nlvr", task, ["attention", "evit", "random"], [0.3], file)
    assert rows_of(file)[:4] == rows and [row["preset"] for row in rows_of(file)[4:]] == ["attention"]


def test_a_cell_that_cannot_run_is_a_line_with_the_reason(scripts, task, tmp_path):
    file = tmp_path / "leaderboard.jsonl"
    scripts.run.run("nlvr", task, ["evit", "random"], [0.3, 0.99], file)
    (failed, *_) = [row for row in rows_of(file) if row["reduction"] == 0.99]
    assert failed["error"].startswith("BudgetError: reduction=0.99")
    text = scripts.page.Board(rows_of(file)).markdown()
    assert "- `evit` at 99%: reduction=0.99 is out of reach" in text


def test_stages_behind_the_tower_move_into_it(scripts):
    inner = vp.Stage("self_attention", "ratio(0.5)", at=(0,))
    outer = vp.Stage("self_attention", "ratio(0.5)", place="output")
    config = vp.PruneConfig("self_attention", "ratio(0.5)", at=(0,), then=(outer,))
    assert scripts.run.inside(config.with_stages([inner])) == config.with_stages([inner])
    first, second = scripts.run.inside(config).stages
    assert first == inner and (second.place, second.at) == ("block", (0.25,))


def row(preset, score, reduction=0.5, seed=0, **own):
    costs = {"macs": 5e6, "dense_macs": 1e7, "macs_saved": 0.5, "time": 0.75, "tokens": {"image": [17, 9, 9, 4]}}
    cell = {"task": "nlvr", "preset": preset, "reduction": reduction, "seed": seed, "moved": False}
    return {**cell, "scores": {"accuracy": score}, "errors": {"accuracy": 0.04}, **costs, **own}


def test_the_page_marks_what_is_worse_than_random_choice(scripts, tmp_path):
    rows = [
        row("dense", 0.9, 0.0),
        row("random", 0.6),
        row("random", 0.8, seed=1),
        row("good", 0.5),
        row("good", 0.8),
        row("level", 0.66),
        row("bad", 0.6),
        row("broken", 0.0, error="ValueError: scorer='x' needs a grid. Write 'y'"),
    ]
    page = tmp_path / "leaderboard.md"
    page.write_text("# Leaderboard\n\n" + scripts.page.MARKER + "old")
    scripts.page.write(rows, page)
    text = page.read_text()
    assert text.startswith("# Leaderboard\n\n" + scripts.page.MARKER) and "old" not in text
    for line in (
        "| `good` | **80.0** |",
        "| `random` | 70.0 |",
        "| `level` | 66.0 |",
        "| `bad` | 60.0 ▼ |",
        "| `broken` | - |",
        "| `good` | 50% | 80.0 | -10.0 | +10.0 | 17 9*2 → 4 | 5.0 | 50% | 0.75 |",
        "- `broken` at 50%: scorer='x' needs a grid",
    ):
        assert line in text, line
    assert page.with_suffix(".svg").read_text().count("<circle") == 4


def test_the_committed_page_is_that_of_the_committed_results(scripts):
    rows, page = scripts.run.read_rows(scripts.run.RESULTS), scripts.page.PAGE
    board = scripts.page.Board(rows)
    assert page.read_text().partition(scripts.page.MARKER)[2] == board.markdown()
    assert page.with_suffix(".svg").read_text() == board.svg()
