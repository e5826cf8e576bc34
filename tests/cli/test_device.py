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
        "macs": ["macs", "clip_vit_s_32_alt_evit"],
        "features": ["features", "vit_tiny_patch16_224", str(photos), "--reduction", "0.3", *output],
        "prune": ["prune", "blip_nlvr_tiny", "--data", "synthetic:val:4", "--reduction", "image=0.3", *output],
        "predict": ["predict", *pair, "a circle", "--model", "blip_nlvr_tiny_evit", *output],
        "demo": ["demo", *output],
        "eval": ["eval", "--task", "nlvr", "--data", "synthetic:test:2", "--model", "blip_nlvr_tiny_evit", *output],
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_in_half_precision(command, dtype, commands, monkeypatch, capsys):
    opened = []
    load = common.load_model
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: opened.append(load(*args, **kwargs)) or opened[0])
    assert cli.main([*commands[command], "--dtype", dtype, "--device", "cpu"]) == 0
    assert {weight.dtype for weight in opened[0].parameters()} == {getattr(torch, dtype)}
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("command", [*COMMANDS, "demo"])
def test_a_device_or_dtype_that_there_is_not_is_refused(command, commands, fails):
    assert "is no device of this machine: it has cpu" in fails(*commands[command], "--device", "cuda:99")
    assert "there is no dtype 'bf16'; did you mean bfloat16" in fails(*commands[command], "--dtype", "bf16")
