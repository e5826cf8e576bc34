"""The oracle's table says what ran and what was refused, and tells a model that computes something else."""

from __future__ import annotations

import contextlib
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "vlm_oracle.py"))
SOME = {
    "in the image tower": {"evit": {"at": {"image": 0}}},
    "between tower and language model": {"visionzip": {}, "divprune": {}},
    "before a layer": {"pyramiddrop": {}},
}


@torch.no_grad()
def test_a_row_for_each_model_and_a_reason_for_each_refusal():
    found = [*SCRIPT["results"](["llava", "llava-onevision", "blip2 t5"], SOME)]
    ran = [one for one in found if one.deviation is not None]
    assert len(found) == 12 and len(ran) == 9 and max(one.deviation for one in ran) < 1e-5
    lines = SCRIPT["tables"](found).splitlines()
    assert lines[0] == f"| model | {' | '.join(SOME)} |"
    assert lines[2].startswith("| llava | ") and "refused" not in lines[2]
    assert lines[3].startswith("| llava-onevision | refused | ") and "(1, 1 refused)" in lines[3]
    assert lines[4].startswith("| blip2 t5 | ") and lines[4].endswith(" | refused |")
    assert lines[-3].startswith("| evit, in the image tower | llava-onevision | scorer='mean_cls_attention' reads")
    assert lines[-3].endswith("the image tower has none |")
    assert lines[-2].startswith("| visionzip, between tower and language model | llava-onevision | scorer=")
    assert lines[-1].startswith("| pyramiddrop, before a layer | blip2 t5 | it names the tower 'language'; ")


@pytest.mark.parametrize(
    ("model", "place", "preset"),
    [
        ("llava", "in the image tower", "evit"),
        ("llava", "before a layer", "pyramiddrop"),
        ("blip2 opt", "between tower and language model", "divprune"),
    ],
)
@torch.no_grad()
def test_a_model_that_computes_something_else_is_far_off(model, place, preset, monkeypatch):
    inside = SCRIPT["results"].__globals__
    monkeypatch.setitem(inside, "placed", lambda whole, short, kept: whole)
    monkeypatch.setattr(inside["lm"], "gone", lambda trace, valid: [torch.zeros_like(valid)] * 2)
    monkeypatch.setattr(inside["WithQFormer"], "masked", lambda case, trace, features: contextlib.nullcontext())
    (found,) = SCRIPT["results"]([model], {place: {preset: SOME[place][preset]}})
    assert found.deviation > 1e-3
