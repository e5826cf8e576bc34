"""`demo --vlm` from end to end on a handful of pairs."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vltprune.cli import demo_vlm
from vltprune.cli import main as cli

MODELS = ("dense", "random, 32 of 64", "vispruner, 32 of 64", "vispruner, 16 of 64", "fastv", "pyramiddrop", "vtw")


def test_it_prints_a_table_and_draws_what_was_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_vlm, "_TURNS", 1)
    assert cli.main(["demo", "--vlm", "--pairs", "5", "--output", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "vlm.json").read_text())
    assert results["pairs"] == 5
    assert tuple(results["models"]) == MODELS
    assert all(name in printed for name in results["models"]) and demo_vlm.NOTE in printed

    dense, half, quarter = (results["models"][name] for name in (MODELS[0], *MODELS[2:4]))
    assert [one["visual_tokens"] for one in (dense, half, quarter)] == [128, 64, 32]
    assert dense["tower"] == pytest.approx(half["tower"], rel=0.05) and dense["prefill"] > half["prefill"]
    assert dense["first_token_speedup"] == 1 and dense["later_token_speedup"] == 1
    # two of six layers read all, and four the half
    assert results["models"]["fastv"]["visual_tokens"] == pytest.approx((2 * 128 + 4 * 64) / 6)
    with Image.open(tmp_path / "new" / "vlm.png") as image:
        assert image.width > 500 and image.height > 600
