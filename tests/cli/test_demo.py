"""`demo` from end to end on a handful of pairs, and its report."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re

import pytest
from PIL import Image

from vltprune.cli import demo
from vltprune.cli import main as cli
from vltprune.demo.measure import generate_batches
from vltprune.models import zoo


@pytest.fixture(scope="session")
def shown(tiny_weights, tmp_path_factory):
    """The demo's folder on a handful of pairs, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(zoo, "WEIGHTS", tiny_weights)
        patch.setattr(demo, "_CALIBRATION_PAIRS", 2)
        assert cli.main(["demo", "--pairs", "9", "--output", str(folder / "new")]) == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder / "new"


MODELS = (
    "dense",
    "MADTP 70 %, trained",
    "random 70 %, untrained",
    "MADTP 80 %, trained",
    "random 80 %, untrained",
    "random 80 %, MADTP's weights",
)
EQUAL_TRAINING = (
    "After equal training of 300 steps, choosing tokens by score is worth 9.8 ± 2.2 points over random choice"
)


def test_demo_writes_its_numbers(shown):
    results = json.loads((shown / "results.json").read_text())
    assert tuple(results["models"]) == MODELS
    assert results["pairs"] == 9
    dense = results["models"]["dense"]
    assert dense["macs_saved"] == 0
    assert dense["speedup"] == 1
    assert dense["tokens_kept"]["image"] == [145] * 7
    for target in (70, 80):
        assert results["models"][f"random {target} %, untrained"]["macs_saved"] == pytest.approx(target / 100, abs=0.03)
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
    questions = [question for batch in generate_batches("test", 9) for question in batch.sentences]
    assert sum(question in page for question in questions) == 8
    assert page.count("in truth: <b>") == 8


def test_demo_says_what_was_trained(shown):
    """In the terminal and in the report: rows that were trained and rows that were not stand in one table."""
    printed, page = (shown.parent / "printed.txt").read_text(), html.unescape((shown / "report.html").read_text())
    for text in (printed, page):
        assert all(name in text for name in MODELS)
        assert EQUAL_TRAINING in text


def test_demo_report_explains_itself(shown):
    page = html.unescape((shown / "report.html").read_text())
    for heading in ("What was compared", "What the columns mean", "What this page does not show"):
        assert f"<h2>{heading}</h2>" in page
    columns = re.findall("<th>([^<]*)</th>", page[: page.index("</thead>")])
    terms = re.findall("<tr><th>([^<]*)</th><td>", page)
    assert all(any(column.startswith(term) for term in terms) for column in columns[1:])
    assert "{" not in re.sub("<style>.*?</style>", "", page, flags=re.DOTALL)  # every number was filled in


def test_demo_chart_shows_every_model(shown):
    chart = re.search("<svg viewBox=.*?</svg>", (shown / "report.html").read_text().split("Where the tokens go")[1])[0]
    strokes = re.findall(r'<polyline points="([^"]*)"[^>]*?stroke="([^"]*)" stroke-width="2.5"( stroke-dash)?', chart)
    assert len({color for _, color, _ in strokes}) == len(MODELS)
    seen = [points for points, _, dashed in strokes if not dashed]
    assert len(set(seen)) == len(seen)  # a line that coincides with another has gaps


def test_demo_draws_what_was_kept(shown):
    with Image.open(shown / "kept.png") as image:
        assert image.width > 900 and image.height > 300


def test_demo_runs_in_half_precision(tiny_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "WEIGHTS", tiny_weights)
    monkeypatch.setattr(demo, "_CALIBRATION_PAIRS", 2)
    assert cli.main(["demo", "--pairs", "2", "--dtype", "bfloat16", "--output", str(tmp_path / "out")]) == 0


def test_demo_without_weights_says_so(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path / "none")
    assert "no weights come with" in fails("demo", "--output", str(tmp_path / "out"))
