"""The benchmark for GPUs runs from end to end, on a CPU and a tiny model: it must not fail first where a GPU is rented."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module, with those that it imports from its folder."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    yield gpu
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_it_runs(gpu, tmp_path, capsys):
    assert gpu.main([*TINY, "--output", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["passed"] for row in found["checks"])
    assert not any(row.get("kernel") for row in found["checks"])  # there is none on a CPU, and the table says so
    assert {row["model"] for row in found["models"]} == {"dense", "tome 30%", "evit 30%", "madtp 30%"}
    assert all(row["mac_speedup"] == pytest.approx(1 / 0.7, abs=0.1) for row in found["models"][1:4])
    assert "images_a_second" in capsys.readouterr().out


def test_a_check_that_fails_is_the_exit_status(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "_difference", lambda *_: {"difference": 1.0, "tolerance": 0.1, "passed": False})
    monkeypatch.setattr(gpu, "_padding", lambda options: [])
    monkeypatch.setattr(gpu, "_models", lambda options: [])
    assert gpu.main(TINY) == 1
