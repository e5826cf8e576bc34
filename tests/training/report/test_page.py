"""The page of a compression: what it must say, that its numbers are those of results.json, and odd runs."""

from __future__ import annotations

import html
import json
import re
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config

import vltprune as vp
from vltprune.evaluation import metrics
from vltprune.evaluation.tasks import Options, Retrieval
from vltprune.training import compress, final_evaluation
from vltprune.training.report import curves
from vltprune.training.report import page as report
from vltprune.training.report.examples import Example, Prediction
from vltprune.viz import charts
from vltprune.viz.kept_tokens import TokenState

NASTY = "<b>both</b> & <script>alert(1)</script>"


def run(task, tmp_path, **changes):
    """A compression's page, what it returned, and the data that the page was written from."""
    told, page = [], report.page

    def listening(story, *rest):
        told.append((story, *rest))
        return page(story, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "page", listening)
        done = compress(config(task, tmp_path / "data", **changes), tmp_path / "run")
    assert done is not None
    (story,) = told
    return done.page.read_text(), done, story


def cells(page):
    return [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", page)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What `run` gives of a task, run once."""
    return cache(lambda task: run(task, tmp_path_factory.mktemp(task), serve=(0.2, 0.97), distill=0.5))


@pytest.fixture(params=["nlvr", "retrieval"])
def made(request, runs):
    return request.param, *runs(request.param)


@pytest.fixture
def finished(runs, tmp_path):
    """The config of a finished run, and a copy of its folder without its page."""
    _, done, (story, *_) = runs("nlvr")
    folder = shutil.copytree(done.folder, tmp_path / "run")
    (folder / "report.html").unlink()
    return story.config, folder


def test_the_page_is_self_contained(made):
    page = made[1]
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_the_page_says_what_was_done_and_what_was_chosen_on_what(made):
    task, page, _, _ = made
    text = html.unescape(page)
    assert f"blip_{task}_tiny, weights: random" in text
    assert "codebook(anchors=4)" in text
    assert "4 steps of 4 records, seed 0, one run" in text
    assert "set on all 8 validation records" in text
    assert "The weights are those of the last step, 4," in text
    assert "No test split was read" in text
    assert "Training and validation read the same file" in text
    assert "out of these parts' reach: 97 % fewer MACs" in text


def test_the_numbers_are_those_of_the_results(made):
    _, page, done, _ = made
    rows = json.loads((done.folder / "results.json").read_text())
    found = cells(page)
    for row in rows:
        expected = [f"{100 * score:.2f}" for score in row["scores"].values()]
        expected += [f"{row['macs'] / 1e9:.4g}", f"{row['macs_saved']:.1%}"]
        assert "records_per_second" not in row  # of a few seconds, one model after another: no measure of speed
        if row["knob"]:
            expected += [f"ratio {row['knob']['value']:.4g}"]
        assert set(expected) <= set(found)
        for tower in row["kept"]:
            assert any(cell.startswith(f"{row['kept'][tower][-1]:.1f} (") for cell in found)
    assert len(re.findall(r'aria-label="(?:image|text) tokens that are left"', page)) == 2


def test_every_column_is_explained(made):
    page = html.unescape(made[1])
    header = re.search("<th>validation</th>.*?</thead>", page)[0]
    explained = page[page.index("What the columns mean") : page.index("What was done")]
    for column in re.findall("<th>([^<]*)</th>", header):
        assert re.search(f"<th>{re.escape(column)}</th><td>[^<]{{20,}}", explained), column


def test_the_page_shows_how_training_went(made):
    page = made[1]
    for title in ("the task's loss", "alignment", "what the dense model teaches", "dense MACs saved", "knob: ratio"):
        assert title in html.unescape(page)
    assert "Up to step 4, 0 steps were skipped" in page


def test_the_first_records_are_shown(made):
    task, page, done, (_, shown, missing) = made
    assert not missing
    assert [example.index for example in shown] == list(range(6))
    assert all(len(example.predictions) == len(done.rows) for example in shown)
    entries = json.loads((done.folder.parent / "data" / f"{task}.json").read_text())
    if task == "nlvr":
        assert [example.prompt for example in shown] == [entry["sentence"] for entry in entries[:6]]
        assert [word for word, _ in shown[3].words] == entries[3]["sentence"].split()
        assert shown[1].reference == "true"
    else:
        captions = {caption for entry in entries for caption in entry["caption"]}
        assert {prediction.text.split(" (of")[0] for example in shown for prediction in example.predictions} <= captions
        assert not shown[0].words  # the task cannot spell ids
    assert page.count("in truth: <b>") == 6


@pytest.mark.parametrize("made", ["retrieval"], indirect=True)
def test_nearest_texts_agree_with_recall(made):
    _, _, done, (_, shown, _) = made
    for place, row in enumerate(done.rows):  # 8 images, and 6 of them shown
        right = sum(example.predictions[place].correct for example in shown)
        assert right <= 8 * row["scores"]["i2t_r1"] <= right + 2


@pytest.mark.parametrize("made", ["retrieval"], indirect=True)
def test_blips_second_stage_is_reported(made):
    """Every pair of so few is judged: the recalls of the sum of cosine and head, worked out here."""
    _, page, done, _ = made
    assert "scores again the 128 texts nearest to each image" in page
    entries = json.loads((done.folder.parent / "data" / "retrieval.json").read_text())
    model, prepare = done.model.eval(), vp.transforms(done.model)
    words = Retrieval.from_model(model, Options(str(done.folder.parent / "data" / "vocab.txt"))).encode
    ids, mask = words([text for entry in entries for text in entry["caption"]])
    with torch.no_grad():
        pixels = torch.stack([prepare(Image.open(done.folder.parent / "data" / entry["image"])) for entry in entries])
        cosines = model.image_features(pixels) @ model.text_features(ids, mask).T
        heads = torch.stack([model(one[None], ids, mask)[:, 1] for one in pixels])
    text_to_image = [i for i, entry in enumerate(entries) for _ in entry["caption"]]
    found = done.rows[-1]["matching"]
    assert found["scores"] == pytest.approx(metrics.recalls(cosines + heads, text_to_image))
    assert f"<td>{found['pairs']:,}</td>" in page and found["pairs"] == 8 * 16
    assert found["macs"] < found["dense_macs"]


def test_the_second_stage_can_be_left_out(tmp_path):
    page, done, _ = run(
        "retrieval", tmp_path, k_test=0, budget="learned", parts=LEARNED, steps=1, saliency=0.0, val_limit=2
    )
    assert "Second stage" not in page and "matching" not in done.rows[0]


@pytest.mark.filterwarnings("ignore:captions are written, and not scored")
def test_captions(tmp_path):
    page, done, (_, shown, missing) = run("caption", tmp_path, parts=LEARNED, steps=2, val_limit=2)
    assert not missing
    assert shown[0].predictions[0].correct is None
    assert "text tokens" not in page
    if not done.rows[0]["scores"]:
        assert "nothing could be scored" in page
        assert "Not scored: captions" in page


def test_answers(tmp_path):
    page, _, (_, shown, missing) = run("vqa", tmp_path, budget="learned", parts=LEARNED, val_limit=2)
    assert not missing
    assert shown[0].reference == "red (7), blue (3)"
    assert "what color is the" in page
    assert "expected MACs off their target" in page


LEARNED = {"guide": "codebook(anchors=4)", "keep": "learned(threshold=-0.5)"}


def test_a_dense_model_that_was_trained(tmp_path):
    page, done, (story, shown, missing) = run("nlvr", tmp_path, reduction=0.0, freeze=("text.word*",))
    assert not missing
    assert story.names == ["dense", "trained"]
    assert "none: the dense model was trained" in page
    assert "text.word*" in page
    assert "The knob" not in page
    assert len(shown) == 6
    assert {f"{row['macs'] / 1e9:.4g}" for row in done.rows} <= set(cells(page))


def test_a_finished_run_makes_its_page_anew(runs, finished, monkeypatch):
    page, done, _ = runs("nlvr")
    settings, folder = finished
    rows = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr(
        final_evaluation.Evaluator, "_predict", lambda *given: pytest.fail("no record is answered again")
    )
    again = compress(settings, folder)
    assert again.page.read_text() == page
    assert again.page != done.page
    assert json.loads((folder / "results.json").read_text()) == rows


def test_images_that_cannot_be_drawn_lose_nothing_else(finished, monkeypatch):
    settings, folder = finished
    (folder / "results.json").unlink()

    def fails(*given):
        raise ValueError("no <grid>")

    monkeypatch.setattr(final_evaluation, "examples", fails)
    with pytest.warns(UserWarning, match=r"the report has no pictures: ValueError: no <grid>"):
        done = compress(settings, folder)
    assert "No images: ValueError: no &lt;grid&gt;." in done.page.read_text()
    assert (folder / "results.json").is_file()


@pytest.mark.parametrize("history", [[], [{"step": 1, "task": 0.5, "knob": 0.3, "target": 0.3}]])
def test_short_histories(made, history):
    _, _, _, (story, shown, _) = made
    page = report.page(report.ReportData(**{**vars(story), "history": history}), shown)
    assert "nan" not in page.lower().replace("base64", "")[: page.find("What each layer kept")]
    assert ("the task's loss" in html.unescape(page)) == bool(history)
    assert ("There are no rows in history.jsonl" in page) != bool(history)


def test_texts_are_escaped(made):
    _, _, _, (story, *_) = made
    example = Example(0, NASTY, NASTY, [Prediction(NASTY, True)] * len(story.rows), None, [(NASTY, TokenState.KEPT)])
    page = report.page(report.ReportData(**{**vars(story), "config": story.config.replace(val=NASTY)}), [example])
    assert NASTY not in page
    assert "<script" not in page
    assert page.count(html.escape(NASTY)) >= 4 + len(story.rows)


def test_bands_are_of_records():
    """Ten records, the last far off: the mean follows it, the band does not."""
    rows = [{"kept": {"image": [10.0, float(n)]}} for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 1000)]
    rows.append({"skipped": "no image"})
    drawn = curves.tokens([[{"kept": {}}], rows], ["dense", "half"])
    low, high = np.percentile([*range(1, 10), 1000], curves.SPREAD)
    assert f"104.5 ({low:g}&ndash;{high:g})" in drawn


@pytest.mark.parametrize(
    "values", [[], [0.0], [3.0, 3.0], [float("nan"), 2.0], [-1.5, 7.25], [1e-4, 30.0], [0.99, 0.991]]
)
@pytest.mark.parametrize("kind", [charts.Axis.from_values, charts.Axis.log_from_values])
def test_axes_hold_what_they_are_over(values, kind):
    axis = kind(values)
    assert all(-1e-5 <= axis.position(value) <= 1 + 1e-5 for value in values if np.isfinite(value))
    assert 2 <= len(axis.labels) <= 8
    assert (
        charts.chart([charts.Line([(0, v) for v in values], "red")], charts.layer_axis(3), axis, "it").count("nan") == 0
    )
