"""Ablations: the grid's text, cells of equal cost, seeds, cells that cannot run, and the files that are written."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small

import vltprune as vp
from vltprune.evaluation.ablation_grid import FIELDS, Grid
from vltprune.evaluation.ablation_page import _COLUMNS, page
from vltprune.evaluation.ablation_table import Summary
from vltprune.pruning.stage import PRUNER_KINDS

PARTS = {
    "scorer": ["random", "random(seed=3)", "self_attention"],
    "keep": ["ratio(ratio=0.5, decay=0.25)", "distortion(error=0.1)", {"image": "ratio(ratio=0.5)", "text": "top_p"}],
    "reducer": ["drop", "fuse(normalize=False)"],
    "guide": [None, "codebook(anchors=4)", "codebook(anchors=8, attend='sparsemax')"],
    "at": [None, (1,), (0, 2), (0.25, 0.5), {"image": (0, 1)}],
    "reduction": [None, 0.3, 0.55, {"image": 0.5, "text": 0.25}],
    "seed": [0, 1, 7],
}


def lists(values):
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique_by=repr)


@given(
    st.fixed_dictionaries({"preset": lists(["attention", "random"])}, optional={k: lists(v) for k, v in PARTS.items()})
)
def test_a_grid_is_its_text(fields):
    grid = Grid(fields)
    again = Grid.from_text(str(grid))
    assert again.fields == grid.fields
    assert [cell.to_dict() for cell in again] == [cell.to_dict() for cell in grid]
    size = 1
    for values in fields.values():
        size *= len(values)
    assert len({cell.key for cell in grid}) == len(grid) == size


def test_a_grid_takes_all_that_a_stage_has():
    (cell,) = Grid.from_text("preset=random; place=block; modality=image; at=-1")
    assert (cell.config.place, cell.config.modality, cell.config.at) == ("block", "image", (-1,))


def test_commas_in_brackets_belong_to_a_value():
    grid = Grid.from_text("preset = random; keep=ratio(ratio=0.5, decay=0.25),distortion(error=0.1); at=(1, 2),3;")
    assert [cell.labels["keep"] for cell in grid][::2] == ["ratio(ratio=0.5, decay=0.25)", "distortion(error=0.1)"]
    assert [cell.config.at for cell in grid] == [(1, 2), (3,)] * 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("presets=evit", r"no field 'presets'; did you mean preset\?"),
        ("preset=evti", "no preset 'evti'; did you mean evit"),
        ("preset=evit; keep=ratoi", "no keeper 'ratoi'; did you mean ratio"),
        ("preset=evit; keep=ratio(ration=0.5)", "takes no argument 'ration'; did you mean ratio"),
        ("preset=evit; reduction=0.5,1.5", "reduction=1.5 must lie between 0 and 1"),
        ("preset=evit; reduction=much", "cannot read reduction=much"),
        ("preset=evit; seed=-1", "seed=-1 is no seed"),
        ("preset=evit; place=attnetion", "place='attnetion' is no place; did you mean attention"),
        ("preset=evit; modality=images", "modality='images' is no modality; did you mean image"),
        ("reduction=0.5", "names no preset"),
        ("preset=evit; preset=madtp", "preset= twice"),
        ("preset=evit,evit", "preset=evit twice"),
        ("preset=evit; keep=ratio(0.5),ratio(ratio=0.5)", "twice"),
        ("preset=evit; keep=", "no value may be empty"),
        ("preset=evit; keep=ratio(ratio=0.5", "brackets must close"),
        ("preset", "cannot read 'preset'"),
        ("preset=evit,madtp; scorer=madtp", "preset=evit, scorer=madtp, .* cannot be built: .*guide='codebook'"),
        ("preset=madtp; guide=none", "cannot be built: .*reads the alignment guide"),
    ],
)
def test_bad_grids_are_refused_before_a_model_is_there(text, complaint):
    with pytest.raises((LookupError, TypeError, ValueError), match=complaint):
        vp.ablate(None, text, None, ())


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = small("vit")
    return model.model, [*model.draw(12)]


def distance_to(dense, images):
    """A metric: how far logits are from the dense model's, by two names."""
    wanted = dense(images)

    def metric(model):
        difference = (model(images) - wanted).abs().detach()
        return {"mean": difference.mean(), "largest": float(difference.max())}

    return metric


@pytest.fixture(scope="module")
def ablation(vit):
    dense, batches = vit
    torch.manual_seed(0)
    grid = {"preset": ["attention", "random", "madtp"], "reduction": [0.3, 0.99], "seed": [0, 1]}
    return vp.ablate(dense, grid, distance_to(dense, batches[0]), batches, tolerance=0.05, repeats=1)


def test_cells_of_one_reduction_have_equal_macs_and_dense_is_there(ablation):
    dense, *cells = ablation.rows
    assert dense["cell"] is None and dense["scores"]["mean"] == 0 and dense["time"] == 1
    assert dense["tokens"]["image"] == [17.0] * 5
    assert len(cells) == 12
    for row in cells:
        if "error" not in row:
            wanted = 1 - row["cell"]["reduction"]
            assert row["macs"] == pytest.approx(wanted * row["dense_macs"], rel=0.05)
            assert row["macs_saved"] == pytest.approx(1 - row["macs"] / dense["macs"])
            assert row["tokens"]["image"][0] == 17 and row["time"] > 0
    assert {row["cell"]["reduction"] for row in cells if "error" not in row} == {0.3}


def test_a_cell_is_what_prune_does(ablation, vit):
    dense, batches = vit
    model = vp.prune(dense, "attention", reduction=0.3, data=batches, tolerance=0.05)
    (row,) = [row for row in ablation.rows if row["cell"] == {"preset": "attention", "reduction": 0.3, "seed": 0}]
    assert row["keep"] == model.pruning.config.describe("keep")
    wanted = {name: float(value) for name, value in distance_to(dense, batches[0])(model).items()}
    assert row["scores"] == pytest.approx(wanted)
    assert row["macs"] == pytest.approx(vp.measure(model, batches).macs)


def test_a_cell_that_cannot_run_is_a_row_with_its_reason(ablation):
    assert len(ablation.failed) == 6
    assert all(re.match("BudgetError: reduction=0.99 is out of reach", row["error"]) for row in ablation.failed)
    text = ablation.markdown()
    assert "| random | 0.99 | 0 | - |" in text
    assert text.count("Did not run: preset=random, reduction=0.99: BudgetError") == 1


def test_seeds_are_merged_into_mean_and_deviation(ablation):
    by_seed = [
        row["scores"]["mean"]
        for row in ablation.rows[1:]
        if row["cell"]["preset"] == "random" and row["cell"]["reduction"] == 0.3
    ]
    assert by_seed[0] != by_seed[1]
    mean, deviation = sum(by_seed) / 2, abs(by_seed[0] - by_seed[1]) / 2**0.5
    assert f"| random | 0.3 | 2 | {mean:.4g} ± {deviation:.2g} |" in ablation.markdown()


def test_seeds_reach_guides_and_parts_without_one_of_their_own():
    grid = Grid.from_text("preset=random; keep=random_ratio,random_ratio(seed=9); seed=4")
    first, second = (cell.config for cell in grid)
    assert first.part("scorer").args == {"seed": 4}
    assert (first.part("keep").args["seed"], second.part("keep").args["seed"]) == (4, 9)


@pytest.mark.parametrize("name", vp.presets.names())
def test_a_cell_has_every_stage_of_its_preset(name):
    (cell,) = Grid.from_text(f"preset={name}")

    def stages(config):
        parts = [[str(stage.part(kind)) for kind in PRUNER_KINDS] for stage in config.stages]
        return (
            config.guide,
            re.sub(r"\(seed=0\)|, seed=0", "", str(parts)),
            [(stage.at, stage.place) for stage in config.stages],
        )

    assert stages(cell.config) == stages(vp.preset(name))


def test_guides_are_fitted_by_the_seed_whatever_ran_before(vit):
    dense, batches = vit

    def anchors(model):
        return 0.0 if not vp.is_pruned(model) else float(model.pruning.guide.anchors.sum())

    def run(grid):
        rows = vp.ablate(dense, f"preset=madtp; guide=codebook(anchors=4); {grid}", anchors, batches, repeats=0).rows
        return {row["cell"]["seed"]: row["scores"]["anchors"] for row in rows[1:]}

    both, second = run("seed=0,1"), run("seed=1")
    assert both[0] != both[1] == second[1]


def test_the_callers_random_numbers_and_model_stay_as_they_are(vit):
    dense, batches = vit
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in dense.state_dict().items()}
    dense.train()
    vp.ablate(dense, "preset=random", lambda model: torch.rand(()), batches, repeats=0)
    assert dense.training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    dense.eval()


def test_without_a_reduction_cells_prune_as_their_preset_says(vit):
    dense, batches = vit
    ((_, row),) = [vp.ablate(dense, "preset=random", lambda model: 1, batches, repeats=0).rows]
    assert row["macs"] == pytest.approx(vp.count_macs(vp.prune(dense, "random"), batches[0]).total / 12)
    assert row["keep"] == "ratio(ratio=0.85)" and row["time"] is None and row["scores"] == {"score": 1.0}


class Tags(HTMLParser):
    """Checks that each element is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.external = [], []

    def handle_starttag(self, tag, attrs):
        self.external += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_files_are_well_formed(ablation, tmp_path):
    shown = ablation.save(tmp_path / "new").read_text()
    tags = Tags()
    tags.feed(shown)
    assert tags.open == [] and tags.external == []
    assert shown.count("<svg viewBox") == 2
    assert "mean against time of an instance" in shown and re.search(
        r"With (29|30|31)\.\d % fewer MACs, mean ranges from", shown
    )

    saved = json.loads((tmp_path / "new" / "ablation.json").read_text())
    assert saved["rows"] == [dict(row) for row in ablation.rows]
    assert Grid.from_text(saved["grid"]).fields == ablation.grid.fields
    rows = [*csv.DictReader((tmp_path / "new" / "ablation.csv").read_text().splitlines())]
    assert [row["preset"] for row in rows[:2]] == ["dense", "attention"] and len(rows) == len(ablation.rows)
    assert float(rows[1]["macs"]) == ablation.rows[1]["macs"]
    header, rule, *lines = (tmp_path / "new" / "ablation.md").read_text().partition("\n\n")[0].splitlines()
    assert {line.count("|") for line in (header, rule, *lines)} == {header.count("|")}
    assert len(lines) == 7


def test_the_page_shows_settings_and_no_digests(ablation):
    settings = {"model": "vit <small>", "content_of_model": "abcdef", "limit": None}
    shown = page(Summary(ablation.grid, ablation.rows), settings)
    assert "vit &lt;small&gt;" in shown and "abcdef" not in shown and "limit" not in shown


def test_the_page_explains_every_field():
    assert [field for field in FIELDS if field not in ("seed", *_COLUMNS)] == []


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [(lambda model: float("nan"), "which is no score"), (lambda model: "good", "return a number, or numbers by name")],
)
def test_what_a_metric_must_return(metric, complaint, vit):
    dense, batches = vit
    with pytest.raises((FloatingPointError, TypeError), match=complaint):
        vp.ablate(dense, "preset=random", metric, batches)


def test_a_metric_that_fails_on_a_pruned_model_is_that_cells_row(vit):
    dense, batches = vit

    def metric(model):
        if vp.is_pruned(model):
            raise RuntimeError("not\nthis one")
        return 1

    (row,) = vp.ablate(dense, "preset=random", metric, batches, repeats=0).failed
    assert row["error"] == "RuntimeError: not this one"


def test_pruned_models_and_no_batches_are_refused(vit):
    dense, batches = vit
    with pytest.raises(TypeError, match=r"give its dense host, model\.host"):
        vp.ablate(vp.prune(dense, "random"), "preset=evit", lambda model: 1, batches)
    with pytest.raises(ValueError, match="at least one batch"):
        vp.ablate(dense, "preset=evit", lambda model: 1, [])
