"""The config of a compression: files, defaults, complaints."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from vltprune.training import RECIPES, CompressConfig, Recipe
from vltprune.utils.frozen import thawed

LEAST = {"task": "nlvr", "model": "blip_nlvr_base", "data": "train.json", "val": "dev.json"}


def test_saliency_is_distilled_where_there_are_scores():
    config = CompressConfig(**LEAST)
    assert config.saliency_weight == config.saliency == 0.5
    assert config.replace(reduction=0.0).saliency_weight == 0.0


def test_what_is_left_out_is_the_papers():
    config = CompressConfig(**LEAST)
    assert (config.lr, config.weight_decay, config.epochs, config.batch_size) == (3e-6, 0.05, 15, 128)
    assert (config.align, config.distill, config.preset) == (0.1, 0.0, "madtp")
    assert CompressConfig(**{**LEAST, "task": "vqa"}).lr == RECIPES["vqa"].lr
    assert CompressConfig(**LEAST, lr=1e-3).lr == 1e-3


def test_files_say_the_same_again(tmp_path):
    config = CompressConfig(**LEAST, parts={"reducer": "drop", "at": {"image": [0, 2]}}, serve=(0.3, 0.7), steps=10)
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    assert CompressConfig.from_file(tmp_path / "run.json") == config
    (tmp_path / "run.yaml").write_text("task: nlvr\nmodel: blip_nlvr_base\ndata: a.json\nval: b.json\nserve: [0.3]\n")
    there = CompressConfig.from_file(tmp_path / "run.yaml", reduction=0.8)
    assert (there.data, there.serve, there.reduction) == ("a.json", (0.3,), 0.8)
    assert config.replace(reduction=0.6).reduction == 0.6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "nlvr2"}, "there is no task 'nlvr2'; did you mean nlvr"),
        ({"reduction": 1.0}, r"reduction=1.0 must lie in 0 .. 1"),
        ({"reduction": {}}, r"reduction=\{\} must be a number, such as reduction=0.5, or one for each tower"),
        ({"reduction": "half"}, r"reduction='half' must be a number, such as reduction=0.5, or one for each tower"),
        (
            {"reduction": {"image": "half"}},
            r"reduction=\{'image': 'half'\} must be a number, .*\{'image': 0.5, 'text': 0.3\}",
        ),
        (
            {"reduction": {"image": 0.5, "text": 0}},
            r"between 0 and 1 for each tower: .*; leave a tower out to leave it",
        ),
        (
            {"reduction": {"image": 0.5, "text": 1.0}},
            r"reduction=\{'image': 0.5, 'text': 1.0\} must lie between 0 and 1",
        ),
        ({"reduction": {"image": 0.5}, "serve": (0.3,)}, r"serve=\(0.3,\): .* leave serve out, or write one number"),
        (
            {"reduction": {"image": 0.5}, "budget": "learned"},
            r"budget='learned' .*: write budget='controller' with reduction=",
        ),
        ({"serve": (0.5, -1)}, r"serve=\(0.5, -1\): shares of the dense MACs, between 0 and 1"),
        ({"serve": (0.5,), "reduction": 0.0}, r"of a model that is pruned"),
        ({"start": "run/model", "reduction": 0.0}, "start='run/model' begins a pruned model, and reduction=0 prunes"),
        ({"ramp": 1.5}, r"ramp=1.5 must lie in 0 .. 1: a share of the steps"),
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"align": -1.0}, "align=-1.0 must be 0 or more"),
        ({"distill_tokens": -1.0}, "distill_tokens=-1.0 must be 0 or more"),
        ({"losses": {"keep_ratio": -1.0}}, r"losses=\{'keep_ratio': -1.0\} must be a mapping from loss to a weight"),
        ({"losses": {"keep_ratios": 1.0}}, "losses: there is no 'keep_ratios'; did you mean keep_ratio"),
        ({"losses": {"ponder": 1.0}}, "ponder is of halting probabilities: write preset='avit'"),
        ({"losses": {"keep_ratio": 1.0}}, "keep_ratio is of a sampled ratio: write preset='dynamicvit'"),
        ({"losses": {"kept_share": 1.0}}, "kept_share is of soft training: write budget='learned'"),
        ({"dtype": "fp32"}, "dtype='fp32': write dtype='float32', 'bfloat16' or 'float16'"),
        ({"budget": "soft"}, "budget='soft': write budget='controller' or budget='learned'"),
        ({"preset": "madpt"}, "did you mean madtp"),
        ({"parts": {"keep": "ratio(ration=0.5)"}}, "takes no argument 'ration'"),
        ({"lrs": 1e-3}, "a compression config takes no argument 'lrs'; did you mean lr"),
    ],
)
def test_wrong_fields_fail_early(changes, complaint):
    with pytest.raises((ValueError, LookupError, TypeError), match=complaint):
        CompressConfig.from_dict({**LEAST, **changes})


def test_a_target_for_each_tower(tmp_path):
    asked = {"image": np.float32(0.5), "text": 0.3}
    config = CompressConfig(**LEAST, reduction=asked)
    assert config.reduction == {"image": 0.5, "text": 0.3}
    assert json.loads(json.dumps(config.to_dict()))["reduction"] == {"image": 0.5, "text": 0.3}
    assert config.saliency_weight == 0.5 and config.pruning.at is None
    assert {config} == {config.replace(reduction={"text": 0.3, "image": 0.5})}
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    assert CompressConfig.from_file(tmp_path / "run.json") == config
    least = "".join(f"{name}: {value}\n" for name, value in LEAST.items())
    (tmp_path / "run.yaml").write_text(least + "reduction: {image: 0.5, text: 3e-1}\n")
    assert CompressConfig.from_file(tmp_path / "run.yaml") == config


def test_files_that_hold_no_config(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"list\.yaml must hold the fields of a compression config, it holds list"):
        CompressConfig.from_file(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"broken\.yaml is not YAML"):
        CompressConfig.from_file(tmp_path / "broken.yaml")
    with pytest.raises(FileNotFoundError):
        CompressConfig.from_file(tmp_path / "nowhere.yaml")
    (tmp_path / "short.yaml").write_text("task: nlvr\n")
    with pytest.raises(TypeError, match="a compression config needs model, data, val"):
        CompressConfig.from_file(tmp_path / "short.yaml")


def documented() -> dict[str, list[str]]:
    """The rows of the table of fields in docs/compress.md, by field: default, unit, range, what."""
    page = Path(__file__).parents[2].joinpath("docs", "compress.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    start = rows.index(["field", "default", "unit", "range", "what"])
    return {name.strip("`"): cells for name, *cells in rows[start + 2 :]}


def test_every_field_is_documented_with_its_default():
    rows = documented()
    assert list(rows) == [field.name for field in dataclasses.fields(CompressConfig)]
    recipe = {field.name for field in dataclasses.fields(Recipe)}
    for field in dataclasses.fields(CompressConfig):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING:
            written = "required"
        elif default is None:
            written = "recipe" if field.name in recipe else "none"
        else:
            written = f"`{thawed(default)!r}`" if not isinstance(default, tuple) else f"`{default!r}`"
        assert rows[field.name][0] == written, field.name
        assert f"        {field.name}: " in (CompressConfig.__doc__ or ""), field.name


OUT_OF_RANGE = {
    "≥ 1": (0, -1),
    "≥ 0": (-1,),
    "> 0": (0, -1),
    "0 ≤ x ≤ 1": (-0.1, 1.1),
    "0 ≤ x < 1": (-0.1, 1),
    "0 < x < 1": (0, 1),
}


@pytest.mark.parametrize("name", documented())
def test_what_is_out_of_a_documented_range_is_refused(name):
    allowed = documented()[name][2]
    words = re.findall(r"`(\w+)`", allowed)
    for wrong in ["other"] if words else OUT_OF_RANGE[allowed] if allowed else []:
        value = (wrong,) if name == "serve" else wrong
        with pytest.raises((ValueError, LookupError), match=rf"{name}|{wrong}"):
            CompressConfig(**{**LEAST, name: value})
    for right in words:
        assert getattr(CompressConfig(**{**LEAST, name: right}), name) == right
