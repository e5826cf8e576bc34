"""`demo` from end to end on a handful of pairs, and its report."""

from __future__ import annotations

import html
import json
import re

import pytest

from vltprune.cli import demo
from vltprune.cli import main as cli
from vltprune.demo.measure import draw
from vltprune.models import zoo


@pytest.fixture(scope="session")
def shown(tiny_weights, tmp_path_factory):
    """The demo's folder and what it printed, on a handful of pairs."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "WEIGHTS", tiny_weights)
        patch.setattr(demo, "_CALIBRATION_PAIRS", 2)
        assert cli.main(["demo", "--pairs", "9", "--output", str(folder / "new")]) == 0
    return folder / "new"


MODELS = ("dense", "MADTP 70%", "random 70%", "MADTP 80%", "random 80%", "random 80%, tuned weights")


def test_demo_writes_its_numbers(shown):
    results = json.loads((shown / "results.json").read_text())
    assert tuple(results["models"]) == MODELS
    assert results["pairs"] == 9
    dense = results["models"]["dense"]
    assert dense["macs_saved"] == 0
    assert dense["time_relative_to_dense"] == 1
    assert dense["tokens_kept"]["image"] == [145] * 7
    for target in (70, 80):
        assert results["models"][f"random {target}%"]["macs_saved"] == pytest.approx(target / 100, abs=0.03)
    for model in results["models"].values():
        assert 0 <= model["accuracy"] <= 1
        assert sum(model["accuracy_by_family"].values()) / 6 <= 1


def test_demo_report_is_self_contained(shown):
    page = (shown / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 8 * 3
    assert all(source.startswith("data:image/") for source in sources)


def test_demo_report_says_what_it_shows(shown):
    page = (shown / "report.html").read_text()
    assert all(html.escape(name) in page for name in MODELS)
    questions = [question for batch in draw("test", 9) for question in batch.sentences]
    assert sum(question in page for question in questions) == 8
    assert page.count("in truth: <b>") == 8


def test_demo_without_weights_says_so(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path / "none")
    assert "no weights come with" in fails("demo", "--output", str(tmp_path / "out"))
