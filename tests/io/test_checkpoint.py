"""On disk and back: whole, partial, foreign, broken."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle

import huggingface_hub
import pytest
import timm
import torch
from registered import registered
from safetensors.torch import load_file, save_file
from small_models import PRESETS, asked

import vltprune as vp
from vltprune.cost.budget_control import BudgetControl
from vltprune.io.checkpoint import load_into

_DRAWN = torch.Generator().manual_seed(0)
INPUTS = torch.randn(2, 2, 3, 96, 96, generator=_DRAWN), torch.randint(4, 57, (2, 9), generator=_DRAWN)
TINY = {"vision_depth": 2, "text_depth": 2}


@pytest.fixture
def model():
    model = vp.create_model(
        "blip_nlvr_tiny_madtp", guide="codebook(anchors=6)", keep="threshold(temperature=0.3)", **TINY
    )
    with torch.no_grad():
        model.pruning.guide.anchors.mul_(3)
    return model


def same(a, b):
    def out(model):
        with asked(model, INPUTS[0]) if vp.is_pruned(model) else contextlib.nullcontext():
            return model(*INPUTS)

    with torch.no_grad():
        return torch.equal(out(a), out(b))


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_round_trip(tmp_path, preset):
    model = vp.create_model("blip_nlvr_tiny", preset=preset, **TINY)
    again = vp.load(vp.save(model, tmp_path / "m"))
    assert same(model, again)
    assert again.training is False
    if preset:
        assert again.pruning.config == model.pruning.config
        assert again.pruning.towers["image"].guide is again.pruning.towers["text"].guide


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224_madtp", "clip_vit_s_32_alt_evit"])
def test_round_trip_of_other_libraries(tmp_path, name):
    model = vp.create_model(name)
    again = vp.load(vp.save(model, tmp_path))
    assert again.pruning.config == model.pruning.config
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_what_was_calibrated_is_kept(tmp_path, model):
    vp.fit_guide(model, [INPUTS])
    found = vp.calibrate(model, [INPUTS], 0.6, tolerance=0.05)
    assert vp.load(vp.save(model, tmp_path)).pruning.config.keep.args == {"temperature": 0.3, "power": found.value}


def test_parts_can_be_replaced_while_loading(tmp_path, model):
    again = vp.load(vp.save(model, tmp_path), keep="ratio(ratio=0.5)")
    assert again.pruning.config.keep == vp.Part("ratio", {"ratio": 0.5})
    assert torch.equal(again.pruning.guide.anchors, model.pruning.guide.anchors)


def test_anchors_without_maps_meet_the_tokens_as_they_are(tmp_path, model):
    """Such are the reference's files. What maps the model had before are gone."""
    parts = {"guide": "codebook(anchors=6, project=False)", "keep": "threshold(temperature=0.3)"}
    plain = vp.create_model("blip_nlvr_tiny_madtp", **parts, **TINY)
    with torch.no_grad():
        for weight in model.pruning.guide.maps.parameters():
            weight.normal_()
    load_into(model, vp.save(plain, tmp_path))
    assert same(plain.eval(), model.eval())


def test_towers_of_two_widths_need_maps_of_their_own(tmp_path):
    model = vp.create_model("blip_nlvr_tiny_madtp", text_width=64, **TINY)
    file = vp.save(model, tmp_path) / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if ".maps." not in key}, file)
    with pytest.raises(vp.CheckpointError, match=r"4 missing: pruning\.guide\.maps\.image\.weight"):
        load_into(model, file)


def test_a_host_that_was_given_is_evaluated_where_loading_succeeds_and_stays_as_it_was_where_it_fails(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    build = vp.create_model("vit_tiny_patch16_224", **sizes)
    vp.save(vp.prune(build, "madtp", guide="codebook(anchors=6)"), tmp_path)
    for changed in ({"depth": 3}, {"embed_dim": 64}, {}):
        host = timm.create_model("vit_tiny_patch16_224", **{**sizes, **changed})
        host.blocks[0].eval()
        modes = [module.training for module in host.modules()]
        before = {key: value.clone() for key, value in host.state_dict().items()}
        if changed:
            with pytest.raises(vp.CheckpointError, match="nothing was loaded"):
                vp.load(tmp_path, host=host)
            assert [module.training for module in host.modules()] == modes
            assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
    again = vp.load(tmp_path, host=host)
    assert again.host is host
    assert not any(module.training for module in again.modules())
    assert all(torch.equal(value, build.state_dict()[key]) for key, value in host.state_dict().items())


def test_half_precision_on_disk(tmp_path, model):
    vp.save(model, tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {key: v.dtype for key, v in stored.items() if v.dtype != torch.float16} == {
        "pruning.guide.birth": torch.int64
    }
    again = vp.load(tmp_path)
    assert torch.equal(again.pruning.guide.anchors, model.pruning.guide.anchors.half().float())
    assert not again.pruning.guide.is_untrained


def test_only_pruning_over_a_stock_backbone(tmp_path, model):
    vp.save(model, tmp_path, only="pruning")
    assert all(key.startswith("pruning.") for key in load_file(tmp_path / "model.safetensors"))
    assert same(vp.load(tmp_path, host=model.host), model)
    with pytest.raises(vp.CheckpointError, match="only the pruning of a blip_nlvr_tiny: give load"):
        vp.load(tmp_path)
    with pytest.raises(ValueError, match="needs a pruned model"):
        vp.save(model.host, tmp_path, only="pruning")


def test_a_model_that_create_model_did_not_build(tmp_path):
    dense = timm.create_model("vit_tiny_patch16_224").eval()
    model = vp.prune(dense, "madtp")
    with pytest.warns(vp.UnknownHostWarning):
        vp.save(model, tmp_path)
    with pytest.raises(vp.CheckpointError, match="does not say how to build its model: give load"):
        vp.load(tmp_path)
    images = torch.randn(1, 3, 224, 224)
    again = vp.load(tmp_path, host=timm.create_model("vit_tiny_patch16_224"))
    assert torch.equal(again(images), model(images))


def test_a_dense_file_fills_the_host_of_a_pruned_model(tmp_path, model):
    dense = vp.create_model("blip_nlvr_tiny", **TINY)
    save_file(dense.state_dict(), tmp_path / "bare.safetensors")
    torch.save({"model": dense.state_dict()}, tmp_path / "bare.pth")
    for path in (vp.save(dense, tmp_path / "folder"), tmp_path / "bare.safetensors", tmp_path / "bare.pth"):
        again = vp.create_model("blip_nlvr_tiny_madtp", pretrained=path, **TINY)
        assert same(again.host, dense)


@pytest.mark.parametrize("module", ["my.parts", "__main__"])
@pytest.mark.parametrize("only", [None, "pruning"])
@pytest.mark.parametrize("where", ["first", "later"])
def test_somebody_s_own_part_says_what_to_import(tmp_path, module, only, where):
    class Mine(vp.keepers["ratio"]):
        """A keeper of one's own."""

    Mine.__module__ = module
    with registered(vp.keepers, mine=Mine):
        stages = vp.preset("evit").stages + (vp.Stage("random", "ratio", at=1),)
        first, later = (dataclasses.replace(stage, keep="mine(ratio=0.4)") for stage in stages)
        config = vp.preset("evit").with_stages((first, stages[1]) if where == "first" else (stages[0], later))
        model = vp.create_model("blip_nlvr_tiny", preset=config, **TINY)
        again = vp.load(vp.save(model, tmp_path, only=only), host=vp.create_model("blip_nlvr_tiny", **TINY))
        assert again.pruning.config == model.pruning.config
    says = "import my.parts before" if module == "my.parts" else "the script that saved it: register it before"
    for load in (
        lambda: vp.load(tmp_path, host=model.host),
        lambda: vp.from_pretrained(tmp_path, host=model.host),
        lambda: vp.create_model("blip_nlvr_tiny_evit", pretrained=tmp_path, **TINY),
    ):
        with pytest.raises(vp.CheckpointError, match=f"pruned by the keeper mine, which is registered in .*{says}"):
            load()


class TestBroken:
    def test_all_that_does_not_fit_is_listed_and_nothing_is_loaded(self, tmp_path, model):
        file = vp.save(model, tmp_path) / "model.safetensors"
        state = load_file(file)
        del state["host.text.word.weight"]
        state["host.head.0.bias"] = torch.zeros(3)
        state["host.surplus"] = torch.zeros(1)
        save_file(state, file)

        other = vp.load(
            vp.save(vp.create_model("blip_nlvr_tiny_madtp", guide="codebook(anchors=6)", **TINY), tmp_path / "o")
        )
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(vp.CheckpointError) as caught:
            load_into(other, file)
        text = str(caught.value)
        assert "nothing was loaded" in text
        assert "1 missing: host.text.word.weight" in text
        assert "1 not in the model: host.surplus" in text
        assert "1 of another shape: host.head.0.bias (file [3], model [128])" in text
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())

    def test_a_pickle_that_would_run_code_is_refused_unread(self, tmp_path, model):
        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"model": Trap()}, tmp_path / "trap.pth")
        (tmp_path / "raw.pth").write_bytes(pickle.dumps(Trap()))
        for name in ("trap.pth", "raw.pth"):
            with pytest.raises(vp.CheckpointError, match="is no plain tensor file"):
                load_into(model, tmp_path / name)
        assert not (tmp_path / "ran").exists()

    def test_truncated_missing_and_odd_files(self, tmp_path, model):
        file = vp.save(model, tmp_path / "m") / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(vp.CheckpointError, match="no readable safetensors file"):
            vp.load(tmp_path / "m")
        with pytest.raises(vp.CheckpointError, match="there is no file"):
            load_into(model, tmp_path / "absent.safetensors")
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(vp.CheckpointError, match="holds no state dict"):
            load_into(model, tmp_path / "list.pth")

    def test_odd_configs(self, tmp_path, model):
        with pytest.raises(vp.CheckpointError, match=r"has no config\.json"):
            vp.load(tmp_path)
        vp.save(model, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for change, error, says in (
            ({"format": 99}, vp.CheckpointError, "has format 99, this version reads 1"),
            ({"surprise": 1}, TypeError, "takes no argument 'surprise'"),
            ({"pruning": {**config["pruning"], "scorer": {"name": "madpt"}}}, LookupError, "did you mean madtp"),
        ):
            (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
            with pytest.raises(error, match=says):
                vp.load(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(vp.CheckpointError, match="is not JSON"):
            vp.load(tmp_path)

    def test_a_folder_that_cannot_be_written(self, tmp_path, model):
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(OSError, match=r"cannot write the model to .*taken.*choose a folder"):
            vp.save(model, tmp_path / "taken")

    def test_a_failed_save_leaves_the_old_files(self, tmp_path, model, monkeypatch):
        vp.save(model, tmp_path)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

        def full(state, path, metadata=None):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("vltprune.io.checkpoint.save_file", full)
        with pytest.raises(OSError, match="No space left on device"):
            vp.save(model, tmp_path)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


class TestHub:
    def test_a_local_folder(self, tmp_path, model):
        vp.save(model, tmp_path)
        assert same(vp.from_pretrained(tmp_path), model)

    def test_a_populated_cache_offline(self, tmp_path, model, monkeypatch):
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / "hub" / "models--acme--pruned"
        vp.save(model, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        again = vp.from_pretrained("hf-hub:acme/pruned", cache_dir=str(tmp_path / "hub"))
        assert same(again, model)
        with pytest.raises(
            vp.CheckpointError, match="cannot get 'acme/absent' from the hub, and it is no local folder"
        ):
            vp.from_pretrained("hf-hub:acme/absent", cache_dir=str(tmp_path / "hub"))

    def test_pushing_uploads_what_load_reads(self, tmp_path, model, monkeypatch):
        sent = {}

        class Api:
            def __init__(self, token=None):
                sent["token"] = token

            def create_repo(self, repo_id, private, exist_ok):
                sent["repo"] = repo_id, private, exist_ok

            def upload_folder(self, repo_id, folder_path):
                sent["model"] = vp.load(folder_path)
                return f"commit of {repo_id}"

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        assert vp.push_to_hub(model, "acme/pruned", private=True, token="secret") == "commit of acme/pruned"
        assert sent["token"] == "secret"
        assert sent["repo"] == ("acme/pruned", True, True)
        assert same(sent["model"], model)


KEPT = {
    "load": lambda folder, host: vp.load(folder),
    "load beside a host": lambda folder, host: vp.load(folder, host=host),
    "from_pretrained": lambda folder, host: vp.from_pretrained(str(folder)),
    "create_model": lambda folder, host: vp.create_model("blip_nlvr_tiny_evit", pretrained=folder, **TINY),
    "preset": lambda folder, host: vp.create_model("blip_nlvr_tiny", preset="evit", pretrained=folder, **TINY),
    "pruning alone": lambda folder, host: vp.load(vp.save(vp.load(folder), folder / "p", only="pruning"), host=host),
}


@pytest.mark.parametrize("way", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("method", ["commit", "set"])
def test_a_calibration_is_kept_on_every_way_in(tmp_path, way, method):
    host = vp.create_model("blip_nlvr_tiny", **TINY)
    model = vp.prune(host, "evit")
    getattr(BudgetControl(model), method)(0.37)
    again = way(vp.save(model, tmp_path), vp.create_model("blip_nlvr_tiny", **TINY))
    assert again.pruning.config.part("keep").args["ratio"] == 0.37
    assert set(BudgetControl(again).values) == {0.37}


OTHER = {
    "knob": {"keep": "ratio(ratio=0.71)"},
    "keeper": {"keep": "count(count=3)"},
    "reducer": {"reducer": "drop"},
    "scorer": {"scorer": "self_attention"},
    "depths": {"at": (0,)},
    "guide": {"guide": "codebook(anchors=3)"},
}


@pytest.mark.parametrize("parts", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("only", [None, "pruning"])
def test_a_folder_of_another_pruning_is_not_loaded_into_a_model(tmp_path, parts, only):
    model = vp.create_model("blip_nlvr_tiny_evit", **TINY)
    vp.save(vp.prune(model.host, "evit", **parts), tmp_path, only=only)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(vp.CheckpointError, match=r"was saved with another pruning.*nothing was loaded.*Write load\("):
        load_into(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_folder_of_the_same_pruning_in_other_words_is_loaded(tmp_path):
    model = vp.create_model("blip_nlvr_tiny_evit", keep="ratio", **TINY)
    load_into(model, vp.save(vp.prune(model.host, "evit", keep="ratio(ratio=0.7)", at=(0, 1)), tmp_path))
