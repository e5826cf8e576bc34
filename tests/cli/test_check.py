"""`check` from end to end, and `--import`, which registers parts of one's own for every command."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

import vltprune as vp
from vltprune.cli import main as cli

MODULE = '''
import vltprune as vp


@vp.scorers.register("largest")
class Largest(vp.TokenScorer):
    """The sum of a token's contents."""

    def __init__(self, spec, width: float = 1.0):
        super().__init__(spec)
        self.width = width

    def forward(self, tokens, stats, guidance):
        return self.width * tokens.x.float().sum(-1)


def half(spec):
    return Half(spec)


class Half(vp.KeepRatioPredictor):
    """Half of the whole batch."""

    def forward(self, scores, tokens, guidance):
        return (scores > scores.mean()).long().sum().expand(tokens.layout.batch)
'''


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """A folder with the module own_parts, which is the working directory; what it registers goes at the end."""
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_parts", None)
    vp.scorers._makers.pop("largest", None)


@pytest.mark.parametrize("part", ["own_parts:Largest", "own_parts.py:Largest(width=0.5)", "scorer:random(3)"])
def test_a_sound_part_passes(part, own_parts, capsys):
    assert cli.main(["check", part, "--examples", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^alone as in the batch +4  passed$", out, re.MULTILINE)
    assert "broken" not in out


@pytest.mark.parametrize("part", ["own_parts:half", "own_parts:Half"])
def test_a_broken_part_is_explained_and_ends_in_status_1(part, own_parts, capsys):
    assert cli.main(["check", part]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"keeper {part.partition(':')[2]}\n")
    assert re.search(r"\ncounts\n  expected  at most \d of .*\n  found     \d .*\n  on        x \[.*\n  change ", out)
    seed = re.findall(r"seed (\d+)$", out, re.MULTILINE)[0]
    assert cli.main(["check", part, "--examples", "1", "--seed", seed]) == 1


def test_arguments_apart(own_parts, capsys):
    assert cli.main(["check", "own_parts:Largest", "--args", "width=0.5", "--examples", "1"]) == 0
    assert capsys.readouterr().out.startswith("scorer Largest(width=0.5)\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_parts"], "write module:Name, path/to/file.py:Name or kind:name"),
        (["own_parts:Largst"], "own_parts has no 'Largst'; did you mean Largest?"),
        (["no_such_module:Part"], "cannot import no_such_module: ModuleNotFoundError"),
        (["missing.py:Part"], "there is no file missing.py"),
        (["scorer:largst"], "there is no scorer 'largst'"),
        (["own_parts:Largest(height=1)"], "scorer Largest takes no argument 'height'"),
        (["own_parts:Largest(1)", "--args", "width=1"], "has arguments already: write them in one place"),
        (["pathlib:Path"], "Path is no part: make it a subclass of one of vltprune.AlignmentGuide"),
    ],
)
def test_what_names_no_part(arguments, message, own_parts, fails):
    assert message in fails("check", *arguments)


def test_every_command_imports_own_parts(own_parts, photos, capsys, fails):
    """Listed, pruned with, saved, loaded and evaluated; without --import the error says what to import."""
    wrong = ["prune", "test_vit", "--reduction", "0.3", "--data", str(photos), "--scorer", "largest"]
    assert "one of your own needs --import MODULE" in fails(*wrong)
    capsys.readouterr()
    assert cli.main(["list", "--scorers", "larg", "--import", "own_parts"]) == 0
    assert capsys.readouterr().out.split() == ["largest"]

    torch.manual_seed(0)
    dense = vp.save(vp.create_model("vit_tiny_patch16_224", img_size=64, depth=2), own_parts / "dense")
    command = ["prune", str(dense), "--reduction", "0.3", "--data", str(photos), "--output", "pruned"]
    assert cli.main([*command, "--scorer", "largest(width=2.0)", "--import=own_parts.py"]) == 0
    config = json.loads((own_parts / "pruned" / "config.json").read_text())
    assert config["modules"] == {"scorer largest": "own_parts"}

    vp.scorers._makers.pop("largest")
    sys.modules.pop("own_parts")
    message = fails("macs", "pruned")
    assert "import own_parts before loading, or give a command --import own_parts" in message
    assert cli.main(["macs", "pruned", "--import", "own_parts"]) == 0


def test_eval_imports_own_parts(own_parts):
    model = vp.create_model("blip_nlvr_tiny")
    assert cli.main(["list", "--scorers", "--import", "own_parts"]) == 0
    vp.save(vp.prune(model, "random", scorer="largest"), own_parts / "pruned")
    vp.scorers._makers.pop("largest")
    sys.modules.pop("own_parts")
    command = ["eval", "--task", "nlvr", "--model", "pruned", "--data", "synthetic:test", "--limit", "4"]
    assert cli.main([*command, "--output", "results", "--import", "own_parts"]) == 0
    assert (own_parts / "results" / "summary.json").is_file()


def test_compress_imports_own_parts(own_parts):
    pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")
    small = {"vision_depth": 2, "text_depth": 2, "merge_from": 1, "image_size": 48}
    command = ["compress", "--task", "nlvr", "--model", "blip_nlvr_tiny", "--reduction", "0.5", "--output", "run"]
    command += ["--data", "synthetic:train:2x2", "--val", "synthetic:val:4", "--import", "own_parts"]
    fields = [f"model_args={small}", "steps=1", "batch_size=2", "val_limit=2", "workers=0", "saliency=0.0"]
    assert cli.main([*command, "--set", *fields, "parts={'keep': 'ratio', 'scorer': 'largest'}"]) == 0
    assert vp.load(own_parts / "run" / "model").pruning.config.part("scorer").name == "largest"


def test_a_module_that_fails_is_told(own_parts, fails):
    (own_parts / "own_parts.py").write_text("1 / 0")
    assert (
        fails("list", "--import", "own_parts")
        == "vltprune: error: cannot import own_parts: ZeroDivisionError: division by zero"
    )
