"""What the ablations change, and how their results are kept."""

from __future__ import annotations

import argparse
import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULE = runpy.run_path(str(FOLDER / "variants.py"))
OWN = {"task": "nlvr", "model": "blip_nlvr_tiny", "data": "synthetic:train:8", "val": "synthetic:val:8"}


@pytest.mark.parametrize("variant", MODULE["VARIANTS"])
def test_a_variant_is_a_config_that_differs(variant):
    base, config = (MODULE["config_of"](name, **OWN, parts={"at": {"image": (0,)}}) for name in ("madtp", variant))
    assert (config == base) == (variant == "madtp")
    assert config.parts["at"] == {"image": (0,)}
    other = {key for key, value in config.to_dict().items() if value != base.to_dict()[key]}
    assert other <= {"parts", "budget", "align", "distill", "saliency", "serve"}


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_a_script_is_complete(script, monkeypatch):
    """Whatever it imports is there, and its docstring says what it measures."""
    monkeypatch.syspath_prepend(str(FOLDER))
    assert runpy.run_path(str(script))["__doc__"]


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


def test_runs_are_compared_with_runs_of_the_same_kind():
    parts = {name: MODULE["config_of"](name, **OWN).parts for name in MODULE["VARIANTS"]}
    turned, plain = (
        {name.removesuffix(end) for name in parts if name.endswith(end)} for end in (" by temperature", " without maps")
    )
    firsts = {name for name in parts if not name.endswith((" by temperature", " without maps"))}
    assert turned == {name for name in firsts if "threshold" in parts[name].get("keep", "threshold")}
    assert plain == {name for name in firsts if parts[name]["guide"] is not None}
    for name in firsts:
        assert "project" not in (parts[name]["guide"] or "") and "knob" not in parts[name].get("keep", "")
    for name in turned:
        assert parts[name + " by temperature"]["keep"].endswith("knob='temperature')")
        assert parts[name + " by temperature"]["guide"] == parts[name]["guide"]
    for name in plain:
        assert "project=False" in parts[name + " without maps"]["guide"]
        assert ("temperature" in parts[name + " without maps"].get("keep", "")) == (name in turned)

    compared = {base: set(MODULE["compared"](base)) for base in ("madtp", "madtp by temperature", "madtp without maps")}
    own = set(compared)
    assert compared["madtp"] == firsts | own
    assert compared["madtp by temperature"] == firsts - turned | {f"{name} by temperature" for name in turned} | own
    assert compared["madtp without maps"] == firsts - plain | {f"{name} without maps" for name in plain} | own


def test_what_a_part_is_worth_is_of_like_runs_and_two_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    worth = runpy.run_path(str(FOLDER / "worth.py"))["worth"]
    runs = {"madtp, short": {0: 5.0, 1: 7.0, 2: 9.0}, "drop, short": {1: 6.0}, "random": {0: 1.0, 1: 2.0}}
    runs |= {"madtp by temperature": {0: 4.0, 1: 5.0}, "drop by temperature": {0: 3.0, 1: 2.0, 2: 8.0}}
    runs |= {"madtp without maps": {0: 4.0, 1: 5.0}}
    lengths = {", short": "", "": "l"}
    assert worth(runs, "madtp", "drop", lengths) == "2.0 ± 1.4 (2) lt"
    assert worth(runs, "madtp", "random", {"": ""}) == "3.0 ± 0.0 (2) t"
    assert worth(runs, "madtp", "madtp without maps", lengths) == "0.0 ± 0.0 (2) lt"
    assert worth(runs, "drop", "drop without maps", lengths) == ""
    assert worth({**runs, "drop, short": {1: 6.0, 2: 4.0}}, "madtp", "drop", lengths) == "3.0 ± 2.8 (2)"


def test_the_page_has_the_tables_that_the_script_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / "worth.py"), run_name="__main__")
    page = (FOLDER.parent / "docs" / "ablations.md").read_text()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2
    for table in tables:
        assert f"\n\n{table}\n\n" in page


@pytest.mark.parametrize("file", sorted((FOLDER / "results").glob("*_*.json")), ids=lambda file: file.stem)
def test_each_row_of_results_says_once_how_it_was_measured(file):
    runs = json.loads((FOLDER / "results" / "provenance.json").read_text())["runs"]
    patterns = [run["rows"] for run in runs if run["file"] == file.name]
    names = {row["name"] for row in json.loads(file.read_text())}
    for name in names:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern in patterns) == 1, name
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_the_page_on_compressing_has_the_results_of_presets_that_are_trained():
    rows = {row["name"]: row for row in json.loads((FOLDER / "results" / "trained_presets.json").read_text())}
    page = (FOLDER.parent / "docs" / "compress.md").read_text()
    presets = [name.removesuffix(", untrained") for name in rows if name.endswith(", untrained")]
    assert len(presets) == 5 and f"{rows['dense']['accuracy']:.1%}".replace("%", " %") in page.replace("\n", " ")
    for preset in presets:
        before, trained = rows[f"{preset}, untrained"], rows[f"{preset}, 200 steps"]
        accuracy = " | ".join(f"{100 * row['accuracy']:.1f}" for row in (before, trained))
        tokens = ", ".join(map(str, trained["tokens"][1:4]))
        assert re.search(rf"^\| `{preset}`[^|]*\| {re.escape(accuracy)} \| {tokens} \|$", page, re.MULTILINE)
    for preset in ("asvit", "dynamicvit"):
        relaxed = rows[f"{preset} relaxed, 200 steps"]
        tokens = ", ".join(map(str, relaxed["tokens"][1:4]))
        assert f"| `{preset}`, relaxed | | {100 * relaxed['accuracy']:.1f} | {tokens} |" in page


def test_another_keeper_takes_the_place_of_the_variants_own(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = runpy.run_path(str(FOLDER / "compress_nlvr_tiny.py"))
    options = argparse.Namespace(
        drawn=16, reduction=0.8, keep="distortion", serve=[], rate=1e-4, steps=2, pairs=8, seed=0, start=None
    )
    assert script["config_of"](options).parts["keep"] == "distortion"
    options.start = "blip_nlvr_tiny_madtp.p80"
    assert script["config_of"](options).parts["keep"] == "distortion"


def test_the_table_of_photographs_has_the_runs_of_one_size_and_length(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = runpy.run_path(str(FOLDER / "flickr8k_retrieval.py"))
    called, table = script["called"], script["table"]
    monkeypatch.setitem(table.__globals__, "RESULTS", tmp_path / "some.json")
    usual = {"size": 112, "short": False, "steps": 140, "dtype": "float32", "reduction": None}
    runs = [
        argparse.Namespace(**usual | change)
        for change in (
            {},
            {"short": True},
            {"size": 224},
            {"size": 224, "short": True},
            {"short": True, "steps": 600, "dtype": "bfloat16"},
        )
    ]
    assert [called("dense", run) for run in runs] == [
        "dense",
        "dense, short",
        "dense, 224 px",
        "dense, 224 px, short",
        "dense, bf16, 600 steps",
    ]
    scores = {f"{way}_r{k}": 0.5 for way in ("t2i", "i2t") for k in (1, 5, 10)} | {"mean_recall": 0.5}
    kept = {"image": [65.0, 12.0], "text": [14.0, 7.0]}
    for run in runs:
        for name in ("dense", "free, distortion", "madtp"):  # the last is an ablation, which has a table of its own
            row = {"name": called(name, run), "seed": 0, "reduction": 0.0, "macs_saved": 0.0, "macs": 1e9}
            MODULE["record"](tmp_path / "some.json", ("name",), row | {"scores": scores, "kept": kept})
    for run in runs:
        lines = [line.split("  ")[0] for line in table(run).splitlines()[1:]]
        assert lines == [called(name, run) for name in ("dense", "free, distortion")]
    assert "madtp, 224 px" in script["ablations"](runs[2])[0]
    assert script["ablations"](argparse.Namespace(**usual | {"size": 56})) == []
    assert script["ablations"](argparse.Namespace(**usual | {"reduction": 0.5})) == []
