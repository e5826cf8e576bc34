"""What the ablations change, and how their results are kept."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULE = runpy.run_path(str(FOLDER / "variants.py"))
OWN = {"task": "nlvr", "model": "blip_nlvr_tiny", "data": "synthetic:train:8", "val": "synthetic:val:8"}


@pytest.mark.parametrize("variant", MODULE["VARIANTS"])
def test_a_variant_is_a_config_that_differs(variant):
    base, config = (MODULE["config_of"](name, **OWN, parts={"at": {"image": (0,)}}) for name in ("madtp", variant))
    assert (config == base) == (variant == "madtp")
    assert config.parts["at"] == {"image": (0,)}
    other = {key for key, value in config.to_dict().items() if value != base.to_dict()[key]}
    assert other <= {"parts", "budget", "align", "distil", "distil_summaries", "saliency", "serve"}


def test_results_of_one_run_replace_older_ones_and_a_table_has_their_means(tmp_path):
    file = tmp_path / "results" / "some.json"
    rows = [
        ("dense", 0, 0.0, 0.9),
        ("madtp", 0, 0.5, 0.7),
        ("madtp", 1, 0.5, 0.8),
        ("drop", 0, 0.5, 0.4),
        ("drop", 0, 0.5, 0.6),
    ]
    for name, seed, reduction, score in rows:
        saved = reduction if name != "drop" else 0.44
        row = {"name": name, "seed": seed, "reduction": reduction, "macs_saved": saved, "score": score}
        MODULE["record"](file, ("name", "seed", "reduction"), row)
    assert len(json.loads(file.read_text())) == 4
    lines = MODULE["table"](file, lambda row: row["score"]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["dense", "1", "90.0"],
        ["madtp", "2", "75.0", "±", "7.1"],
        ["drop", "1", "60.0", "at", "44%"],
    ]


def test_differences_are_taken_seed_by_seed(tmp_path):
    file = tmp_path / "some.json"
    for name, seed, score in (
        ("madtp", 0, 0.7),
        ("madtp", 1, 0.8),
        ("drop", 0, 0.6),
        ("drop", 1, 0.75),
        ("random", 1, 0.1),
    ):
        row = {"name": name, "seed": seed, "reduction": 0.5, "score": score}
        MODULE["record"](file, ("name", "seed", "reduction"), row)
    told = MODULE["differences"](file, lambda row: row["score"], "madtp", ["madtp", "drop", "random"])
    assert [line.split() for line in told.splitlines()[1:]] == [["drop", "7.5", "±", "3.5", "5.0", "..", "10.0"]]


def test_each_guide_can_be_without_maps_and_runs_are_compared_with_their_like():
    guides = {name: MODULE["config_of"](name, **OWN).parts["guide"] for name in MODULE["VARIANTS"]}
    twins = [name for name in guides if name.endswith(" without maps")]
    assert {name.removesuffix(" without maps") for name in twins} == {
        name for name, guide in guides.items() if guide is not None and name not in twins
    }
    assert all("project=False" in guides[name] for name in twins)
    assert not any("project" in (guide or "") for name, guide in guides.items() if name not in twins)

    mapped, plain = set(MODULE["compared"]("madtp")), set(MODULE["compared"]("madtp without maps"))
    assert mapped & set(twins) == {"madtp without maps"}
    assert mapped & plain == {name for name, guide in guides.items() if guide is None} | {"madtp without maps"}
