"""The entry point: help, versions, interruptions, and whose mistake an error is."""

from __future__ import annotations

import runpy

import pytest
from torch import nn

import vltprune as vp
from vltprune.cli import listing
from vltprune.cli import main as cli


def test_without_a_command_it_helps(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "predict", "list", "info", "macs", "features", "eval"))


@pytest.mark.parametrize(
    "argv", [["--version"], ["--help"], *([c, "--help"] for c in ("demo", "predict", "features", "eval"))]
)
def test_version_and_help(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    assert "vltprune" in capsys.readouterr().out


def test_module_runs(monkeypatch, capsys):
    """As `python -m vltprune`."""
    monkeypatch.setattr("sys.argv", ["vltprune", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("vltprune", run_name="__main__", alter_sys=True)
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"vltprune {vp.__version__}"


def test_unknown_command_and_option(fails):
    assert "bogus" in fails("bogus")
    assert "--pears" in fails("demo", "--pears", "3")
    assert "'0' is no whole number" in fails("demo", "--pairs", "0")


def test_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "list_models", interrupted)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "vltprune: interrupted\n"


def test_bugs_are_not_dressed_up_as_user_errors(monkeypatch):
    def buggy(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(listing, "list_models", buggy)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["list"])


def test_traceback_on_demand():
    with pytest.raises(LookupError, match="no model"):
        cli.main(["info", "nothing_of_the_kind", "--traceback"])


@pytest.mark.parametrize("command", ["demo", "predict", "features", "prune", "eval", "compress"])
def test_output_is_checked_before_the_work(command, tmp_path, monkeypatch, pair, photos, fails):
    def work(*args, **kwargs):
        raise AssertionError("a model was built before the output was checked")

    if command == "compress":
        pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")
    monkeypatch.setattr(nn.Module, "__init__", work)
    (tmp_path / "file").write_text("in the way")
    task = ["--task", "nlvr", "--model", "blip_nlvr_tiny", "--data", "synthetic:val:2"]
    arguments = {
        "demo": [],
        "predict": [*pair, "a circle"],
        "features": ["vit_tiny_patch16_224_evit", str(photos)],
        "prune": ["vit_tiny_patch16_224", "--reduction", "0.5", "--data", str(photos)],
        "eval": task,
        "compress": [*task, "--val", "synthetic:val:2"],
    }
    complaint = fails(command, *arguments[command], "--output", str(tmp_path / "file" / "below"))
    assert "cannot write to the folder" in complaint
    assert "choose another --output" in complaint
