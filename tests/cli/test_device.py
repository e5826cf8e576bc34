"""--device and --dtype of every command that runs a model."""

from __future__ import annotations

import pytest
import torch

from vltprune.cli import common
from vltprune.cli import main as cli

COMMANDS = ("info", "macs", "features", "prune", "predict", "eval")


@pytest.fixture
def commands(pair, photos, tmp_path):
    """A short run of each command."""
    output = ["--output", str(tmp_path / "out")]
    return {
        "info": ["info", "blip_nlvr_tiny_evit"],
        "macs": ["macs", "blip_retrieval_tiny_evit"],
        "features": ["features", "blip_tiny", str(photos), "--reduction", "0.3", *output],
        "prune": ["prune", "blip_nlvr_tiny", "--data", "synthetic:val:4", "--reduction", "image=0.3", *output],
        "predict": ["predict", *pair, "a circle", "--model", "blip_nlvr_tiny_evit", *output],
        "eval": ["eval", "--task", "nlvr", "--data", "synthetic:test:2", "--model", "blip_nlvr_tiny_evit", *output],
    }


@pytest.mark.parametrize(("command", "dtype"), [*((command, "bfloat16") for command in COMMANDS), ("prune", "float16")])
def test_every_command_runs_in_half_precision(command, dtype, commands, monkeypatch, capsys):
    opened = []
    load = common.load_model
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: opened.append(load(*args, **kwargs)) or opened[0])
    assert cli.main([*commands[command], "--dtype", dtype, "--device", "cpu"]) == 0
    assert {weight.dtype for weight in opened[0].parameters()} == {getattr(torch, dtype)}
    assert "nan" not in capsys.readouterr().out
