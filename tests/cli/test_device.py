"""--device and --dtype of every command that runs a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from vltprune.cli import common
from vltprune.cli import main as cli

COMMANDS = ("info", "macs", "features", "prune", "predict", "eval", "compress")


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
        "compress": [
            *("compress", "--task", "nlvr", "--model", "blip_nlvr_tiny", "--reduction", "0.3", *output),
            *("--data", "synthetic:train:2", "--val", "synthetic:val:2"),
            *("--set", "steps=2", "batch_size=2", "workers=0", "val_limit=2", "parts={'keep': 'ratio'}"),
        ],
        "eval": ["eval", "--task", "nlvr", "--data", "synthetic:test:2", "--model", "blip_nlvr_tiny_evit", *output],
    }


def dtype_of(output):
    return getattr(output, "dtype", None)


@pytest.mark.parametrize(("command", "dtype"), [*((command, "bfloat16") for command in COMMANDS), ("prune", "float16")])
def test_every_command_runs_in_half_precision(command, dtype, commands, monkeypatch, capsys):
    if command == "compress":
        pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")
    opened, computed = [], set()
    load = common.load_model
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: opened.append(load(*args, **kwargs)) or opened[0])
    with register_module_forward_hook(lambda module, _, output: computed.add((type(module), dtype_of(output)))):
        assert cli.main([*commands[command], "--dtype", dtype, "--device", "cpu"]) == 0
    assert (nn.Linear, getattr(torch, dtype)) in computed
    # of a compression the products alone have the dtype, its weights stay float32
    weights = {weight.dtype for model in opened for weight in model.parameters()}
    assert weights == (set() if command == "compress" else {getattr(torch, dtype)})
    assert "nan" not in capsys.readouterr().out
