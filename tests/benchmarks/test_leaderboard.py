"""The leaderboard runs each cell once, and its page says what the results file says."""

from __future__ import annotations

import dataclasses
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
    import leaderboard_board
    import leaderboard_page
    import leaderboard_tasks

    modules = {"run": leaderboard, "board": leaderboard_board, "page": leaderboard_page, "tasks": leaderboard_tasks}
    yield types.SimpleNamespace(**modules)
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

    def resized(ratio):
        return vp.resized(dense, ratio), batches

    return scripts.tasks.Task(dense, batches[:1], batches, lambda model, batch: model(batch), score, resized)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_cell_runs_once_to_the_cost_that_is_asked(scripts, task, tmp_path):
    file = tmp_path / "results" / "leaderboard.jsonl"
    scripts.run.run("nlvr", task, ["evit", "random"], [0.3], file)
    rows = rows_of(file)
    assert [(row["preset"], row["seed"]) for row in rows] == [
        ("dense", 0),
        ("resize", 0),
        ("evit", 0),
        ("random", 0),
        ("random", 1),
    ]
    assert rows[0]["scores"]["accuracy"] == 1 and rows[0]["macs_saved"] == 0
    for row in rows[1:]:
        assert row["macs_saved"] == pytest.approx(0.3, abs=0.08 if row["preset"] == "resize" else 0.05)
        assert row["dense_macs"] == rows[0]["macs"] and row["count"] == 12
        assert 12 * row["scores"]["accuracy"] == pytest.approx(sum(scripts.board.unpack(row["instances"])), abs=1e-3)
        tokens = row["tokens"]["image"]
        assert len(tokens) == 1 + len(task.dense.blocks)
        if row["preset"] == "resize":
            assert len(set(tokens)) == 1 and tokens[0] == 50
        else:
            assert tokens[0] == 65 > tokens[-1]
    scripts.run.run("nlvr", task, ["attention", "evit", "random"], [0.3], file)
    assert rows_of(file)[:5] == rows and [row["preset"] for row in rows_of(file)[5:]] == ["attention"]


def test_a_cell_that_cannot_run_is_a_line_with_the_reason(scripts, task, tmp_path):
    file = tmp_path / "leaderboard.jsonl"
    scripts.run.run("nlvr", dataclasses.replace(task, resized=None), ["evit", "random"], [0.3, 0.99], file)
    smaller, failed, *_ = [row for row in rows_of(file) if row["reduction"] == 0.99]
    assert failed["error"].startswith("BudgetError: reduction=0.99")
    assert smaller["error"] == "ValueError: texts have no smaller size"
    lines = scripts.page.markdown(scripts.board.Board(rows_of(file))).splitlines()
    assert any(line.startswith("| `evit` | 99% | - |") and "reduction=0.99 is out of reach" in line for line in lines)
    assert any(line.startswith("| *resize* | 30% | - |") and "texts have no smaller size" in line for line in lines)


def test_stages_behind_the_tower_move_into_it(scripts):
    inner = vp.Stage("self_attention", "ratio(0.5)", at=(0,))
    outer = vp.Stage("self_attention", "ratio(0.5)", place="output")
    config = vp.PruneConfig("self_attention", "ratio(0.5)", at=(0,), then=(outer,))
    assert scripts.run.inside(config.with_stages([inner])) == config.with_stages([inner])
    first, second = scripts.run.inside(config).stages
    assert first == inner and (second.place, second.at) == ("block", (0.25,))


def test_shares_of_instances_are_packed_exactly(scripts):
    shares = [0, 1, 0.5, 1 / 3, 2 / 3, 0.1, 0.9, 0.2]
    text = scripts.board.pack(shares)
    assert len(text) == len(shares) and scripts.board.unpack(text) == pytest.approx(shares)


def row(scripts, preset, right, reduction=0.5, seed=0, **other):
    """A cell that is right about `right` of 20 instances, the first ones."""
    costs = {"macs": 5e6, "dense_macs": 1e7, "macs_saved": 0.5, "time": 0.75, "tokens": {"image": [17, 9, 9, 4]}}
    cell = {"task": "nlvr", "preset": preset, "reduction": reduction, "seed": seed, "moved": False, "count": 20}
    shares = [float(instance < right) for instance in range(20)]
    return {**cell, "scores": {"accuracy": right / 20}, "instances": scripts.board.pack(shares), **costs, **other}


def test_differences_are_paired_by_instance(scripts):
    rows = [row(scripts, "dense", 20, 0.0), row(scripts, "random", 12), row(scripts, "random", 16, seed=1)]
    rows += [row(scripts, "level", 13), row(scripts, "bad", 6), row(scripts, "good", 19)]
    shifted = scripts.board.pack([float(instance >= 10) for instance in range(20)])
    rows += [row(scripts, "other", 10, instances=shifted)]
    board = scripts.board.Board(rows)
    assert board.score("nlvr", "random", 0.5) == pytest.approx(70)
    assert board.verdict("nlvr", "random", 0.5) == 0
    for preset, apart, verdict in (("level", -5, 0), ("bad", -40, -1), ("good", 25, 1), ("other", -20, 0)):
        found, error = board.difference("nlvr", preset, 0.5)
        assert found == pytest.approx(apart) and board.verdict("nlvr", preset, 0.5) == verdict, preset
    # six instances whole and four half: less than if the instances were not the same
    paired = torch.tensor([0.0] * 6 + [1.0] * 6 + [0.5] * 4 + [0.0] * 4)
    _, error = board.difference("nlvr", "bad", 0.5)
    assert error == pytest.approx(100 * paired.std().item() / 20**0.5)
    assert board.verdict("nlvr", "good", 0.5, "bad") == 1 and board.difference("nlvr", "good", 0.3) is None


def test_the_page_marks_what_is_worse_than_random_choice(scripts, tmp_path):
    rows = [
        row(scripts, "dense", 18, 0.0),
        row(scripts, "random", 12),
        row(scripts, "random", 16, seed=1),
        row(scripts, "resize", 15),
        row(scripts, "good", 9),
        row(scripts, "good", 18),
        row(scripts, "level", 13),
        row(scripts, "bad", 6, time=1.25),
        row(scripts, "broken", 0, error="ValueError: scorer='x' needs a grid. Write 'y'"),
    ]
    page = tmp_path / "leaderboard.md"
    page.write_text("# Leaderboard\n\n" + scripts.page.MARKER + "old")
    scripts.page.write(rows, page)
    text = page.read_text()
    assert text.startswith("# Leaderboard\n\n" + scripts.page.MARKER) and "old" not in text
    for line in (
        "| Synthetic pairs | 20 | accuracy 90.0 |",
        "| Synthetic pairs | 50% | `good` 90.0, `level` 65.0, `bad` 30.0 | 70.0 | - | 75.0 | 1 of 3 | 1 of 3 | 0 of 3 |",
        "- **Synthetic pairs, below `random`**. 50%: `bad`.",
        "- **No faster than dense at 50% fewer MACs**: `bad` on synthetic pairs (1.25).",
        "| `good` | **90.0** | 1 / 0 |",
        "| `random` | 70.0 |  |",
        "| *resize* | 75.0 |",
        "| `level` | 65.0 | 0 / 0 |",
        "| `bad` | 30.0 ▼ | 0 / 1 |",
        "| `broken` | - | 0 / 0 |",
        "| `good` | 50% | 90.0 ± 6.9 | +0.0 | +20.0 ± 7.6 | 17 9*2 → 4 | 5.000 | 50% | 0.75 |",
        "| `broken` | 50% | - |  |  | scorer='x' needs a grid |",
    ):
        assert line in text, line
    chart = page.with_suffix(".svg").read_text()
    assert chart.count("<circle") == 5 and chart.count('fill="white" stroke') == 1
    assert (tmp_path / "leaderboard_time.svg").read_text().count("<circle") == 5


def test_the_committed_page_is_that_of_the_committed_results(scripts):
    rows, page = scripts.run.read_rows(scripts.run.RESULTS), scripts.page.PAGE
    board = scripts.board.Board(rows)
    assert page.read_text().partition(scripts.page.MARKER)[2] == scripts.page.markdown(board)
    for file, chart in scripts.page.charts(board, page).items():
        assert file.read_text() == chart, file.name
