"""`ablate` from end to end: files, resumption, processes, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.data import SyntheticPairs
from vltprune.evaluation import ablation

GRID = "preset=random,attention; reduction=0.3,0.99"
FILES = ("cells.jsonl", "ablation.json", "ablation.csv", "ablation.md", "ablation.html")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small dense model that answers nlvr."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "vision_depth": 3, "text_depth": 2, "vision_width": 32, "text_width": 32}
    dense = vp.create_model("blip_nlvr_tiny", **sizes, vision_heads=2, text_heads=2, merge_from=1)
    return str(vp.save(dense, tmp_path_factory.mktemp("model")))


def ablate(model, output, *options, grid=GRID):
    argv = ["ablate", "--model", model, "--task", "nlvr", "--data", "synthetic:test:6", "--output", str(output)]
    return [*argv, "--tolerance", "0.1", "--repeats", "0", "--workers", "0", "--grid", grid, *options]


def rows(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(ablate(model, folder)) == 0
    return folder


def test_files_and_what_is_printed(model, tmp_path, capsys):
    assert cli.main(ablate(model, tmp_path, "--repeats", "1")) == 0
    out = capsys.readouterr().out
    assert "2 of 4 cells ran, 2 did not" in out and "| dense |" in out and "BudgetError" in out
    assert f"wrote {tmp_path / 'ablation.html'}" in out
    assert [bool(row.get("error")) for row in rows(tmp_path)] == [False, False, True, False, True]
    assert all("accuracy" in row["scores"] and row["time"] > 0 for row in rows(tmp_path) if "error" not in row)
    saved = json.loads((tmp_path / "ablation.json").read_text())
    assert saved["settings"]["task"] == "nlvr" and saved["rows"] == rows(tmp_path)


def test_a_stopped_run_resumes_to_the_same_files(model, whole, tmp_path, monkeypatch):
    ran = []

    def interrupted(self, cell, _run=ablation.CellRunner._run):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(cell)
        return _run(self, cell)

    with monkeypatch.context() as patch:
        patch.setattr(ablation.CellRunner, "_run", interrupted)
        assert cli.main(ablate(model, tmp_path)) == 130
    assert len(rows(tmp_path)) == 2
    with (tmp_path / "cells.jsonl").open("a") as log:
        log.write('{"cell": {"pre')  # a line that was cut short
    assert cli.main(ablate(model, tmp_path)) == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_cells_that_are_there_are_not_run_again_and_a_grid_may_grow(model, whole, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(ablation.CellRunner, "_run", lambda self, cell: ran.append(cell) or {"error": "not now"})
    before = (whole / "cells.jsonl").read_bytes()
    assert cli.main(ablate(model, whole)) == 0 and not ran
    assert (whole / "cells.jsonl").read_bytes() == before
    pages = {name: (whole / name).read_bytes() for name in FILES}
    assert cli.main(ablate(model, whole, grid="preset=random,evit; reduction=0.3")) == 0
    assert [cell.preset for cell in ran] == ["evit"]
    assert "1 of 2 cells ran, 1 did not" in capsys.readouterr().out
    for name, content in pages.items():
        (whole / name).write_bytes(content)


def test_two_processes_give_the_same_results(model, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, jobs in ((one, "1"), (two, "2")):
        assert cli.main(ablate(model, folder, "--jobs", jobs, grid="preset=random; reduction=0.3; seed=0,1")) == 0
    assert sorted(rows(two), key=str) == sorted(rows(one), key=str)
    for name in FILES[1:]:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name


def test_a_folder_of_other_settings_is_refused(model, whole, tmp_path, fails):
    assert "other settings (limit: None there, 2 now)" in fails(*ablate(model, whole, "--limit", "2"))
    before = (whole / "ablation.json").read_bytes()
    assert cli.main(ablate(model, tmp_path, grid="preset=random")) == 0
    assert cli.main(ablate(model, tmp_path, "--limit", "2", "--overwrite", grid="preset=evit")) == 0
    assert [row["cell"] and row["cell"]["preset"] for row in rows(tmp_path)] == [None, "evit"]
    assert (whole / "ablation.json").read_bytes() == before


def test_guides_are_fitted_and_costs_set_on_other_records_than_scores(model, tmp_path):
    grid = "preset=madtp; guide=codebook(anchors=4); reduction=0.2"
    assert cli.main(ablate(model, tmp_path, "--val", "synthetic:val:4", grid=grid)) == 0
    assert rows(tmp_path)[1]["macs_saved"] == pytest.approx(0.2, abs=0.08)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--grid", "preset=rnadom"], "no preset 'rnadom'; did you mean random"),
        (["--grid", "preset=random; reduction=2"], "must lie between 0 and 1"),
        (["--model", "blip_nlvr_tiny_evit"], "names the preset evit: name the dense model"),
        (["--val", "nowhere.json"], "--val: there is no annotation file nowhere.json"),
        (["--answers", __file__], "--answers goes with --task vqa"),
        (["--jobs", "0"], "no whole number above 0"),
    ],
)
def test_refusals_come_before_a_model_and_leave_nothing_behind(options, complaint, model, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(cli.ablate.eval, "load", None)
    assert complaint in fails(*ablate(model, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default:1 of 3 records")
def test_records_that_cannot_be_read_are_reported_and_val_has_its_own_folder(model, tmp_path, capsys):
    for split, count in (("dev", 3), ("train", 2)):
        (tmp_path / split).mkdir()
        entries = []
        for i in range(count):
            names = [f"{i}-{side}.png" for side in ("left", "right")]
            for name, pixels in zip(names, SyntheticPairs("val", count)[i].images, strict=True):
                Image.fromarray(pixels).save(tmp_path / split / name)
            entries.append({"images": names, "sentence": "there are two stars", "label": str(i == 0)})
        (tmp_path / split / f"{split}.json").write_text(json.dumps(entries))
    (tmp_path / "dev" / "2-left.png").write_bytes(b"broken")
    data = ["--data", str(tmp_path / "dev" / "dev.json"), "--val", str(tmp_path / "train" / "train.json")]
    assert cli.main(ablate(model, tmp_path / "out", *data, grid="preset=random")) == 0
    assert capsys.readouterr().err.count("1 of 3 records are not scored, the first is entry 2: cannot read") == 1


def test_a_run_of_which_no_cell_runs_fails(model, tmp_path, fails):
    complaint = fails(*ablate(model, tmp_path, grid="preset=random; reduction=0.99"))
    assert "none of the 1 cells ran, the first because: BudgetError" in complaint
    assert (tmp_path / "ablation.html").exists()
