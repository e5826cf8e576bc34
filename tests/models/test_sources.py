"""Published weights: from an address, from a hub cache, from where they were put by hand; and what is said without them."""

from __future__ import annotations

import hashlib

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

import vltprune as vp
from vltprune.models import sources, zoo
from vltprune.models.sources import SOURCES, Source
from vltprune.registry import backbones

ABSENT = "file:///there/is/nothing/weights.pth"


@pytest.fixture(autouse=True)
def _homes(tmp_path, monkeypatch):
    """Folders of their own for torch.hub and for the hub's cache, and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def published(tmp_path):
    """A file as others publish them, the model in it, and its hash."""
    model, path = vp.create_model("blip_nlvr_tiny"), tmp_path / "elsewhere" / "weights.pth"
    path.parent.mkdir()
    torch.save({"model": model.state_dict()}, path)
    return path, model, hashlib.sha256(path.read_bytes()).hexdigest()


def publish(monkeypatch, **tags: Source):
    monkeypatch.setattr(sources, "SOURCES", {"blip_nlvr_tiny": tags})
    monkeypatch.setattr(zoo, "WEIGHTS", zoo.WEIGHTS / "none")


def same(model, other):
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_from_an_address_and_then_from_disk(published, monkeypatch, capsys):
    path, model, sha256 = published
    publish(monkeypatch, nlvr2=Source(path.as_uri(), sha256))
    assert same(vp.create_model("blip_nlvr_tiny", pretrained=True), model)
    path.unlink()
    assert same(vp.create_model("blip_nlvr_tiny.nlvr2", pretrained=True), model)
    pruned = vp.create_model("blip_nlvr_tiny_madtp.nlvr2", pretrained=True)
    assert same(pruned.host, model)
    assert pruned.pruning.guide.is_untrained


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_from_a_populated_hub_cache(file, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--acme--blip"
    model = vp.create_model("blip_nlvr_tiny")
    folder = vp.save(model, repo / "snapshots" / commit)
    if file.endswith(".bin"):
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / file)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    publish(monkeypatch, nlvr2=Source(ABSENT, hub="acme/blip"))
    assert same(vp.create_model("blip_nlvr_tiny", pretrained=True), model)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """It retries for long, and would for the second name too."""
    asked = []

    def nobody(repo, file, **named):
        asked.append(file)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nobody)
    publish(monkeypatch, nlvr2=Source(ABSENT, hub="acme/blip"))
    with pytest.raises(vp.CheckpointError, match="no connection"):
        vp.create_model("blip_nlvr_tiny", pretrained=True)
    assert asked == ["model.safetensors"]


@pytest.mark.parametrize("hub", [None, "acme/blip"])
def test_offline_it_says_what_to_fetch_and_where_to_put_it(hub, tmp_path, monkeypatch):
    publish(monkeypatch, nlvr2=Source(ABSENT, hub=hub))
    with pytest.raises(vp.CheckpointError) as refusal:
        vp.create_model("blip_nlvr_tiny", pretrained=True)
    text = str(refusal.value)
    assert ABSENT in text
    assert str(tmp_path / "torch" / "checkpoints" / "weights.pth") in text
    assert "pretrained=PATH" in text


def test_a_file_that_is_not_what_was_published(published, tmp_path, monkeypatch):
    path, _, sha256 = published
    there = tmp_path / "torch" / "checkpoints" / "weights.pth"
    there.parent.mkdir(parents=True)
    there.write_bytes(path.read_bytes()[:-1])
    publish(monkeypatch, nlvr2=Source(path.as_uri(), sha256))
    with pytest.raises(vp.CheckpointError, match=r"is not the file published.*Remove it"):
        vp.create_model("blip_nlvr_tiny", pretrained=True)
    there.unlink()
    publish(monkeypatch, nlvr2=Source(path.as_uri(), "0" * 64))
    with pytest.raises(vp.CheckpointError, match="invalid hash value"):
        vp.create_model("blip_nlvr_tiny", pretrained=True)
    assert not there.exists()


def test_tags_that_are_not_there(monkeypatch):
    publish(monkeypatch, nlvr2=Source(ABSENT), other=Source(ABSENT))
    with pytest.raises(LookupError, match=r"'blip_nlvr_tiny_madtp\.p60': blip_nlvr_tiny_madtp has \.nlvr2, \.other"):
        vp.create_model("blip_nlvr_tiny_madtp.p60", pretrained=True)
    with pytest.raises(LookupError, match="'blip_tiny': nobody has published any"):
        vp.create_model("blip_tiny", pretrained=True)


def test_every_source_is_of_a_backbone():
    assert set(SOURCES) <= set(backbones.names())
    urls = [source.url for tags in SOURCES.values() for source in tags.values()]
    assert len(set(urls)) == len(urls)
    assert all(url.startswith("https://") and url.endswith(".pth") for url in urls)
