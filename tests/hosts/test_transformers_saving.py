"""Pruned models of transformers in the library's own hands: save_pretrained, from_pretrained, and the Trainer's checkpoints."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers as hf
from cases_transformers import NAMES, make
from checks import same

import vltprune as vp
from vltprune.cost.calibration import BudgetControl
from vltprune.io.checkpoint import load_into

LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
# one of each class, and what a configuration does not say
BUILT = [name for name in NAMES if name.endswith((": plain", "no pooler", "mask token")) or "headed" in name]
BUILT += [name for name in NAMES if ":" not in name and "masked" not in name]
KINDS = [(name, "madtp") for name in BUILT] + [(name, "evit") for name in ("clip", "blip captions", "vit: plain")]
KINDS += [("headed: BertForSequenceClassification", "evit"), ("headed: CLIPVisionModelWithProjection", "evit")]


def clip():
    text = {**LAYERS, "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**LAYERS, "image_size": 32, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=40, max_position_embeddings=16, **LAYERS)).eval()


def small(preset="evit"):
    return vp.prune(bert(), preset)


def same_model(again, model):
    state = again.state_dict()
    assert type(again) is type(model)
    assert again.pruning.config == model.pruning.config
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("make", [clip, bert])
@pytest.mark.parametrize("parts", [{"preset": "madtp", "guide": "codebook(anchors=6)"}, {"preset": "evit"}], ids=str)
def test_from_pretrained_finds_the_dense_weights(tmp_path, make, parts):
    dense = make()
    vp.prune(dense, **parts).save_pretrained(tmp_path)
    again = type(dense).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize(("name", "preset"), KINDS, ids=[" by ".join(kind) for kind in KINDS])
@torch.no_grad()
def test_load_reads_what_save_pretrained_wrote(tmp_path, name, preset):
    case = make(name)
    model = case.pruned(preset).eval()
    control = BudgetControl(model)
    control.commit(0.9 * control.value)
    model.save_pretrained(tmp_path)
    again = vp.load(tmp_path)
    same_model(again, model)
    assert BudgetControl(again).values == control.values
    same(again(*case.inputs), model(*case.inputs))


@pytest.mark.parametrize("make", [clip, bert, lambda: bert().bert], ids=["two towers", "head", "tower"])
def test_a_copy_saves_itself_and_what_it_wrote_is_saved_again(tmp_path, make):
    model = vp.prune(make(), "madtp", guide="codebook(anchors=6)")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    again = vp.from_pretrained(tmp_path / "a")
    same_model(again, other)
    again.half().save_pretrained(tmp_path / "b")
    third = vp.load(tmp_path / "b", keep="threshold(temperature=2.0)")
    assert third.dtype == torch.float16
    assert third.pruning.config == other.pruning.config.replace(keep="threshold(temperature=2.0)")


def test_the_last_save_in_a_folder_is_the_one_that_is_read(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    with pytest.warns(vp.UnknownHostWarning):
        vp.save(model, tmp_path)
    with pytest.raises(vp.CheckpointError, match="host="):
        vp.load(tmp_path)
    vp.load(tmp_path, host=bert())
    model.save_pretrained(tmp_path)
    same_model(vp.load(tmp_path), model)


def test_a_failed_save_leaves_no_pruning_with_other_weights(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)

    def full(*args, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    with pytest.raises(vp.CheckpointError):
        vp.load(tmp_path)


DAMAGE = {
    "architecture": ("config.json", {"architectures": ["Path"]}, "names the architectures"),
    "no model": ("config.json", {"architectures": ["BertConfig"]}, "names the architectures"),
    "several": ("config.json", {"architectures": ["BertModel", "BertModel"]}, "names the architectures"),
    "none": ("config.json", {"architectures": None}, "names the architectures"),
    "another class": (
        "config.json",
        {"architectures": ["BertForTokenClassification"]},
        "cannot prune a .*TokenClass",
    ),
    "deeper": ("config.json", {"num_hidden_layers": 3}, r"missing: bert\.encoder"),
    "format": ("vltprune.json", {"format": 7}, "has format 7"),
    "guide": ("vltprune.json", {"pruning": vp.preset("madtp").to_dict()}, "pruning adds: guide.anchors"),
}


@pytest.mark.parametrize(("file", "change", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path, file, change, says):
    small().save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    with pytest.raises((vp.CheckpointError, TypeError), match=says):
        vp.load(tmp_path)


def test_lost_weights_are_missed(tmp_path):
    small().save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(vp.CheckpointError, match="does not hold the weights of a BertForSequenceClassification"):
        vp.load(tmp_path)


class Hub:
    """A hub that keeps the last commit in memory."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        self.files = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}

    def upload_folder(self, repo_id, folder_path):
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


@pytest.mark.parametrize("make", [bert, lambda: bert().bert], ids=["head", "tower"])
@pytest.mark.parametrize(
    "push", [lambda m: m.push_to_hub("o/m"), lambda m: vp.push_to_hub(m, "o/m")], ids=["its", "ours"]
)
def test_pushing_to_the_hub_takes_the_pruning_along(tmp_path, monkeypatch, make, push):
    hub = Hub()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *_, **__: hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: huggingface_hub.ModelCard("")
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: hub)
    model = vp.prune(make(), "evit")
    push(model)

    def download(name, allow_patterns, **_):
        for file in huggingface_hub.utils.filter_repo_objects(hub.files, allow_patterns=allow_patterns):
            (tmp_path / file).write_bytes(hub.files[file])
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    same_model(vp.from_pretrained("hf-hub:o/m"), model)


def test_saving_and_pushing_at_once_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"call model.push_to_hub\('org/name'\)"):
        small().save_pretrained(tmp_path / "m", push_to_hub=True)
    assert not (tmp_path / "m").exists()


class Examples(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return 8

    def __getitem__(self, place):
        drawn = torch.Generator().manual_seed(place)
        ids = torch.randint(4, 40, (8,), generator=drawn)
        ids[-1] = 3
        more = (
            {"pixel_values": torch.randn(3, 32, 32, generator=drawn)}
            if self.pairs
            else {"labels": torch.tensor(place % 2)}
        )
        return {"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), **more}


@pytest.mark.parametrize(("make", "preset"), [(clip, "madtp"), (clip, "evit"), (bert, "evit")])
def test_a_trainer_resumes_from_its_checkpoint(tmp_path, make, preset):
    parts = {"guide": "codebook(anchors=6)"} if preset == "madtp" else {}
    pairs = make is clip
    dense = make()

    def collate(examples):
        batch = torch.utils.data.default_collate(examples)
        return {**batch, "return_loss": True} if pairs else batch

    def trainer():
        settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
        arguments = hf.TrainingArguments(str(tmp_path), **settings, **quiet)
        model = vp.prune(copy.deepcopy(dense), preset, **parts)
        return hf.Trainer(model, arguments, data_collator=collate, train_dataset=Examples(pairs))

    whole, cut = trainer(), trainer()
    whole.train()
    same_model(vp.load(tmp_path / "checkpoint-4"), whole.model)
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    right, found = whole.model.state_dict(), cut.model.state_dict()
    assert all(torch.allclose(value, found[key], atol=1e-6) for key, value in right.items())


class Squares(hf.Trainer):
    """Trains an encoder that has no loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        out = model(inputs["input_ids"], inputs["attention_mask"])
        loss = out.pooler_output.square().mean()
        return (loss, out) if return_outputs else loss


def test_a_trainer_of_an_encoder_saves_its_weights_alone_and_load_says_what_to_write(tmp_path):
    """Trainer calls save_pretrained of transformers' own classes only, and writes the state dict of all others."""
    settings = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4, "remove_unused_columns": False}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    dense = bert().bert
    model = vp.prune(copy.deepcopy(dense), "madtp", guide="codebook(anchors=6)")
    Squares(model, hf.TrainingArguments(str(tmp_path), **settings, **quiet), train_dataset=Examples(False)).train()
    folder = tmp_path / "checkpoint-1"
    for host in (None, dense):
        with pytest.raises(vp.CheckpointError, match=r"load_into\(pruned, '.*checkpoint-1.model\.safetensors'\)"):
            vp.load(folder, host=host)
    again = vp.prune(dense, "madtp", guide="codebook(anchors=6)")
    load_into(again, folder / "model.safetensors")
    same_model(again, model)


def test_several_devices_in_one_process_are_refused_with_what_to_write():
    """As Trainer runs a model where it sees several GPUs: `DataParallel` copies it."""
    model = vp.prune(clip(), "madtp", guide="codebook(anchors=6)")
    with pytest.raises(RuntimeError, match=r"accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        [module._replicate_for_data_parallel() for module in model.modules()]
