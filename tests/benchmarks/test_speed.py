"""The benchmarks of speed: rivals at equal MACs, times side by side, streams of requests, and the page with their results."""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch

import vltprune as vp
from vltprune.core.kernels import native
from vltprune.hosts.linear_maps import measure_macs

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the benchmarks, imported as the scripts import them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import clock
    import rivals
    import scaling
    import serve
    import speed
    import speed_engines
    import speed_results
    import speed_rows

    modules = {"clock": clock, "rivals": rivals, "scaling": scaling, "serve": serve, "speed": speed}
    modules |= {"engines": speed_engines, "results": speed_results, "rows": speed_rows}
    monkeypatch.setattr(native, "_built", native._built)  # what a test compiles is not for others
    yield types.SimpleNamespace(**modules)
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def vit():
    return timm.create_model("test_vit", img_size=128, depth=8).eval()


@pytest.mark.parametrize("kind", ["Sliced", "MinimalToMe"])
def test_a_rival_that_removes_nothing_is_the_dense_model(scripts, vit, kind):
    images = torch.randn(2, 3, 128, 128)
    rival = getattr(scripts.rivals, kind)(vit, scripts.rivals.counts_at(vit, 1.0))
    with torch.no_grad():
        torch.testing.assert_close(rival(images), vit(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", [0.0, 0.3, 0.6])
def test_the_macs_of_a_schedule_are_those_of_torchs_counter(scripts, vit, reduction):
    counts = scripts.rivals.schedule(vit, reduction) if reduction else scripts.rivals.counts_at(vit, 1.0)
    found = scripts.rivals.macs(vit, counts)
    assert found == measure_macs(scripts.rivals.Sliced(vit, counts), torch.zeros(1, 3, 128, 128))
    dense = vp.count_macs(vp.prune(vit, "evit"), torch.zeros(1, 3, 128, 128)).dense_total
    assert 1 - found / dense == pytest.approx(reduction, abs=0.02)
    assert found <= (1 - reduction) * dense


def test_a_schedule_that_tome_cannot_follow_is_refused(scripts, vit):
    with pytest.raises(ValueError, match="ask for less"):
        scripts.rivals.schedule(vit, 0.99)


def test_merging_is_that_of_each_pair_by_itself(scripts):
    x, size, metric = torch.randn(3, 9, 4), torch.randint(1, 5, (3, 9, 1)).float(), torch.randn(3, 9, 6)
    found, total = scripts.rivals.merge(x, size, metric, 2)
    for n in range(3):
        unit = metric[n] / metric[n].norm(dim=-1, keepdim=True)
        pairs = [max((float(unit[a] @ unit[b]), a, b) for b in range(1, 9, 2)) for a in range(2, 9, 2)]
        merged = sorted(pairs, reverse=True)[:2]
        sums, sizes = x[n] * size[n], size[n].clone()
        for _, a, b in merged:
            sums[b] += x[n, a] * size[n, a]
            sizes[b] += size[n, a]
        kept = [a for a in range(0, 9, 2) if a not in [one[1] for one in merged]] + [1, 3, 5, 7]
        torch.testing.assert_close(found[n], (sums / sizes)[kept])
        torch.testing.assert_close(total[n], sizes[kept])


def test_tome_attends_in_proportion_to_size(scripts, vit):
    """A token that stands for two equal ones is attended to as both."""
    x = torch.randn(1, 6, vit.embed_dim)
    both = torch.cat([x, x[:, -1:]], 1)
    size = torch.tensor([1.0, 1, 1, 1, 1, 2]).view(1, 6, 1)
    with torch.no_grad():
        merged, _ = scripts.rivals._attention(vit.blocks[0], x, size)
        whole, _ = scripts.rivals._attention(vit.blocks[0], both, None)
    torch.testing.assert_close(merged, whole[:, :6])


@pytest.mark.parametrize("name", ["no-block", "keep-all", "limit", "tome", "evit", "madtp", "madtp-frozen", "pooling"])
def test_a_row_spends_what_it_says(scripts, name):
    dense = scripts.rows.subject("test_vit", 4)
    row = scripts.rows.build(name, dense, 0.4)
    saved = 0.0 if name in ("no-block", "keep-all") else 0.4
    assert 1 - 1 / row.mac_speedup == pytest.approx(saved, abs=0.06)
    if name not in ("limit", "tome"):
        cost = vp.count_macs(row.model, *dense.inputs)
        assert (row.dense_macs, row.macs) == (cost.padded_total, cost.total)
    assert (row.spread > 0) == (name == "madtp")


def test_a_row_that_a_model_lacks_is_skipped(scripts):
    dense = scripts.rows.subject("blip_nlvr_tiny", 1)
    for name in ("limit", "tome", "no such preset"):
        with pytest.raises(scripts.rows.Skipped):
            scripts.rows.build(name, dense)
    assert scripts.rows.build("evit", dense, 0.3).mac_speedup > 1.2


def test_a_table_compares_rows_with_the_dense_model(scripts, tmp_path, capsys):
    dense = scripts.rows.subject("test_vit", 2)
    options = argparse.Namespace(
        rows=["limit", "unknown"],
        engines=["eager"],
        reductions=[0.5],
        spread=0.25,
        repeats=2,
        seconds=1.0,
        device="cpu",
        clock="wall",
        memory=True,
    )
    rows = scripts.speed.measured(dense, options, tmp_path)
    assert [(row["row"], row["reduction"]) for row in rows] == [("dense", 0.0), ("limit", 0.5)]
    assert rows[0]["speedup"] == 1 and len(rows[1]["rounds"]) == 2
    assert rows[1]["realized"] == rows[1]["own_speedup"] / rows[1]["mac_speedup"]
    assert "skipped: unknown" in capsys.readouterr().out
    assert len(scripts.speed.table(rows).splitlines()) == 3


def test_engines_run_the_inputs_that_they_are_given(scripts, tmp_path):
    """All of them here, since they share the file that takes longest to write."""
    dense = timm.create_model("test_vit", img_size=32, depth=1, num_classes=3).eval()
    images = torch.randn(3, 3, 32, 32)
    for engine in scripts.engines.ENGINES:
        options = {"any_batch": True} if engine in scripts.engines.EXPORTED else {}
        found = scripts.engines.start(engine, dense, (torch.randn(2, 3, 32, 32),), tmp_path, **options)(images)
        if not torch.is_tensor(found):
            # a list of ONNX Runtime's, a mapping of OpenVINO's
            found = torch.as_tensor(next(iter(found if isinstance(found, list) else found.values())))
        with torch.no_grad():
            torch.testing.assert_close(found, dense(images), atol=1e-4, rtol=1e-4)


def test_what_an_engine_does_not_take_is_skipped(scripts, tmp_path):
    adaptive = vp.prune(timm.create_model("test_vit", img_size=32, depth=1).eval(), "attention")
    with pytest.raises(scripts.rows.Skipped, match="freeze"):
        scripts.engines.start("onnxruntime", adaptive, (torch.randn(2, 3, 32, 32),), tmp_path)


def test_calls_take_turns(scripts):
    seen = []
    times = scripts.clock.interleaved({name: lambda name=name: seen.append(name) for name in "abc"}, repeats=4)
    assert {name: len(several) for name, several in times.items()} == {"a": 4, "b": 4, "c": 4}
    before, turns = seen[:6], seen[6:]
    assert sorted(before) == ["a", "a", "b", "b", "c", "c"]
    # short calls come twice at each turn, and the second is timed
    assert len(turns) == 24 and turns[::2] == turns[1::2]
    assert all(sorted(turns[at : at + 6 : 2]) == ["a", "b", "c"] for at in range(0, 24, 6))
    found = scripts.clock.compare([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert found == {"speedup": 2.0, "low": 2.0, "high": 3.0}


def test_memory_is_what_a_call_needs_besides(scripts):
    if scripts.clock.peak_memory(lambda: None) is None:
        pytest.skip("only Linux tells the peak memory of a process, in /proc/self/clear_refs")
    held = torch.ones(2**24)
    assert 50 < scripts.clock.peak_memory(lambda: torch.ones(2**24)) < 90
    assert scripts.clock.peak_memory(lambda: held.sum()) < 30


def test_one_by_one_a_request_waits_for_those_before(scripts):
    finished = scripts.serve.stream([1.0, 1.5, 9.0], lambda batch: 2.0 * len(batch))
    assert finished == [3.0, 5.0, 11.0]


def test_requests_that_wait_are_one_batch(scripts):
    batches = []

    def serve(batch):
        batches.append([*batch])
        return 1.0

    arrivals = [0.0, 0.1, 0.2, 0.3, 5.0, 5.2, 9.0]
    finished = scripts.serve.stream(arrivals, serve, most=3, wait=0.25)
    assert batches == [[0, 1, 2], [3], [4, 5], [6]]
    assert finished == pytest.approx([1.2, 1.2, 1.2, 2.45, 6.25, 6.25, 10.25])


@pytest.mark.parametrize(("share", "wanted"), [(50, 5), (95, 10), (99, 10), (10, 1), (11, 2)])
def test_a_percentile_is_a_value(scripts, share, wanted):
    assert scripts.serve.percentile([10, 1, 9, 2, 8, 3, 7, 4, 6, 5], share) == wanted


def test_requests_arrive_at_their_rate(scripts):
    arrivals = scripts.serve.poisson(50.0, 4000, seed=1)
    assert arrivals == sorted(arrivals) and arrivals[-1] == pytest.approx(80, rel=0.05)
    assert arrivals == scripts.serve.poisson(50.0, 4000, seed=1) != scripts.serve.poisson(50.0, 4000, seed=2)


def test_images_of_a_stream_differ_in_what_is_blank(scripts):
    (images,) = scripts.serve.mixed(scripts.rows.subject("test_vit", 4)).inputs
    blank = (images == 0).all(1).all(-1).sum(-1)
    assert blank.tolist() == [0, 40, 80, 120]


def test_latencies_and_throughput_are_those_of_the_stream(scripts):
    options = argparse.Namespace(rounds=2, requests=20, wait=0.0)
    system = scripts.serve.System(lambda batch: 0.01, 1)
    (row,) = scripts.serve.streams({"a": system}, 2.0, 100.0, options)
    assert row["offered"] == 200 and row["served"] == pytest.approx(100, rel=0.1)
    assert 10 <= row["p50"] <= row["p95"] <= row["p99"] <= 200


def test_exported_counts_per_instance_are_served_one_by_one(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.serve, "start", lambda engine, model, inputs, folder, **options: lambda batch: None)
    options = argparse.Namespace(
        preset="attention", reduction=0.3, engines=["onnxruntime"], most=4, clock="wall", images=4
    )
    systems = scripts.serve.build_systems(scripts.rows.subject("test_vit", 4), options, tmp_path)
    assert {name: system.most for name, system in systems.items()} == {
        "dense eager": 4,
        "attention eager": 4,
        "attention frozen eager": 4,
        "dense onnxruntime": 4,
        "attention onnxruntime": 1,
        "attention frozen onnxruntime": 4,
    }


def test_cells_of_scaling_are_images_of_whole_patches(scripts):
    cells = scripts.scaling.cells([197, 785], [1, 8], [0.0, 0.25, 0.5])
    assert cells[:4] == [(197, 1, 0.25), (197, 8, 0.25), (785, 1, 0.25), (785, 8, 0.25)]
    assert cells[4:] == [(197, 8, 0.0), (197, 8, 0.5)]
    assert [scripts.scaling.image_side(tokens) for tokens in (197, 785, 4097)] == [224, 448, 1024]
    with pytest.raises(ValueError, match="square"):
        scripts.scaling.image_side(200)
    assert scripts.scaling.dense_macs("deit_small_patch16_224", 197) == pytest.approx(4.6e9, rel=0.01)


def test_scaling_leaves_out_what_counts_of_a_spread_do_not_reach(scripts, capsys, monkeypatch):
    def build(name, dense, reduction, spread, build=scripts.rows.build):
        if reduction < 0.5:
            raise scripts.rows.Skipped("out of reach")
        return build(name, dense, reduction, spread)

    monkeypatch.setattr(scripts.scaling, "build", build)
    options = argparse.Namespace(model="test_vit", engine="eager", reductions=[0.3, 0.6], seconds=0.1, clock="cpu")
    rows = scripts.scaling.measured(options, 37, 2, 0.5)
    assert [row["reduction"] for row in rows] == [0.6]
    assert "skipped: 37 tokens, batch 2, spread 0.5, 30% fewer MACs: out of reach" in capsys.readouterr().out


def test_the_chart_of_scaling_has_all_batches(scripts):
    usual = {"reduction": 0.5, "realized": 0.9, "spread": 0.25, "speedup": 2.0}
    rows = [usual | {"tokens": tokens, "batch": batch} for tokens in (197, 785) for batch in (1, 8)]
    rows += [usual | {"tokens": 197, "batch": 8, "spread": 0.5, "realized": 0.8}]
    drawn = scripts.scaling.chart(rows)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert drawn.count("batch 1<") == 1 and drawn.count("batch 8<") == 2


def test_the_page_has_the_tables_that_the_script_prints(scripts, capsys):
    scripts.results.main()
    page = (FOLDER.parent / "docs" / "speed.md").read_text()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert tables and all(f"\n\n{table}\n" in page for table in tables)


@pytest.mark.parametrize("engine", ["training", "training-soft", "training-recomputed"])
@pytest.mark.parametrize("preset", [None, "madtp"])
def test_a_training_step_leaves_the_model_as_it_was(scripts, tmp_path, engine, preset):
    dense = scripts.rows.subject("test_vit", 2, img_size=64)
    model = dense.model if preset is None else vp.prune(dense.model, preset, guide="codebook(anchors=8)")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scripts.engines.start(engine, model, dense.inputs, tmp_path)(*dense.inputs)
    assert not model.training and all(one.grad is None for one in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_soft_training_is_left_out_where_a_keeper_has_fixed_counts(scripts, tmp_path):
    dense = scripts.rows.subject("test_vit", 2, img_size=64)
    with pytest.raises(scripts.rows.Skipped, match="soft"):
        scripts.engines.start("training-soft", scripts.rows.build("evit", dense, 0.3).model, dense.inputs, tmp_path)


def test_steps_are_over_that_of_the_dense_model(scripts):
    cell = {"name": "bert, batch 32", "row": "dense", "reduction": 0.0, "milliseconds": 100.0, "memory_mib": None}
    cells = [
        cell | {"engine": "training"},
        cell | {"engine": "training-recomputed", "milliseconds": 125.0},
        cell | {"engine": "training", "row": "madtp", "reduction": 0.8, "milliseconds": 50.0},
        cell | {"engine": "eager", "milliseconds": 20.0},
    ]
    _, _, *rows = scripts.results.steps(cells).splitlines()
    assert rows == [
        "| BERT base, B32 | training | 1.00 | - / 2.00 |",
        "| BERT base, B32 | training, recomputed | 0.80 |  |",
    ]


def test_memory_is_tabled_where_it_was_measured(scripts):
    cell = {"name": "bert, batch 32", "engine": "eager", "reduction": 0.5, "speedup": 2.0, "memory_mib": None}
    cells = [
        cell | {"row": "dense", "reduction": 0.0, "memory_mib": 88.4},
        cell | {"row": "madtp", "memory_mib": 44.6},
        cell | {"row": "evit"},
        cell | {"row": "madtp", "name": "ViT-B-16, batch 8"},
    ]
    head, _, *rows = scripts.results.memory(cells).splitlines()
    assert "dense" in head and "class attention" not in head
    assert rows == ["| BERT base, B32 | eager | 88 | 45 / - |"]


def test_streams_of_one_by_one_and_of_batches_have_tables_of_their_own(scripts):
    row = {"system": "dense", "load": 0.5, "p50": 10.0, "p95": 20.0}
    tables = scripts.results.served([row | {"name": f"vit, batches up to {most}", "p50": most} for most in (1, 8)])
    one, several = tables.split("\n\n")
    assert "| p50 / p95, ms |" in one and "| dense | 1 / 20 |" in one
    assert "| p50 / p95, ms, batches up to 8 |" in several and "| dense | 8 / 20 |" in several


def test_what_readme_says_of_time_is_what_was_measured(scripts):
    cells = json.loads(scripts.results.CELLS.read_text())
    readme = (FOLDER.parent / "README.md").read_text().replace("\n", " ")
    for name in ("vit_base_patch16_224, batch 8", "vit_base_patch16_224, batch 1", "deit_small_patch16_224, batch 1"):
        for reduction in (0.5, 0.8):
            wanted = (name, "madtp", "eager", reduction)
            (cell,) = (c for c in cells if (c["name"], c["row"], c["engine"], c["reduction"]) == wanted)
            assert f"{cell['speedup']:.2f} x" in readme
