"""open_clip's models of two towers: what they offer besides `forward`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases_open_clip import TEXT_SIZE, make
from checks import same
from open_clip.transformer import TextTransformer

import vltprune as vp


@pytest.mark.parametrize("name", ["clip", "clip, eos", "custom clip"])
@pytest.mark.parametrize("normalize", [False, True])
@torch.no_grad()
def test_encoders_are_the_hosts(name, normalize):
    case = make(name)
    pruned, (images, text) = case.pruned(keep="ratio(ratio=1.0)"), case.inputs
    same(pruned.encode_image(images, normalize=normalize), case.model.encode_image(images, normalize=normalize))
    same(pruned.encode_text(text, normalize=normalize), case.model.encode_text(text, normalize=normalize))
    same(list(pruned.get_logits(images, text)), list(case.model.get_logits(images, text)))


@pytest.mark.parametrize("name", ["clip", "custom clip"])
@torch.no_grad()
def test_encoders_are_what_forward_runs(name):
    case = make(name)
    pruned, (images, text) = case.pruned(), case.inputs
    image, words, scale = pruned(images, text)
    assert torch.equal(image, pruned.encode_image(images, normalize=True))
    assert torch.equal(words, pruned.encode_text(text, normalize=True))
    assert torch.equal(words, F.normalize(pruned.encode_text(text), dim=-1))
    assert torch.equal(scale, case.model.logit_scale.exp())
    assert not torch.allclose(image, case.model(images, text)[0], atol=1e-3)


@pytest.mark.parametrize("name", ["clip, dict", "custom clip, dict"])
@torch.no_grad()
def test_dicts(name):
    case = make(name)
    out, expected = case.pruned()(*case.inputs), case.model(*case.inputs)
    assert list(out) == list(expected)
    assert all(out[key].shape == value.shape for key, value in expected.items())


@pytest.mark.parametrize("name", ["clip", "custom clip"])
@torch.no_grad()
def test_one_modality_alone(name):
    case = make(name)
    pruned, (images, text) = case.pruned(), case.inputs
    both = pruned(images, text)
    image, nothing, _ = pruned(image=images)
    assert nothing is None
    assert torch.equal(image, both[0])
    nothing, words, _ = pruned(text=text)
    assert nothing is None
    assert torch.equal(words, both[1])


@pytest.mark.parametrize("name", ["clip", "custom clip"])
@torch.no_grad()
def test_towers_left_alone(name):
    case = make(name)
    pruned, (images, text) = case.pruned(at={"image": (0,)}), case.inputs
    same(pruned.encode_text(text), case.model.encode_text(text))
    assert not torch.allclose(pruned.encode_image(images), case.model.encode_image(images), atol=1e-3)


@pytest.mark.parametrize("preset", ["evit", "random"])
@torch.no_grad()
def test_its_own_text_is_a_text_transformer(preset):
    case = make("clip")
    tower = TextTransformer(**{**TEXT_SIZE, "layers": 2}).eval()
    tower.load_state_dict({k: v for k, v in case.model.state_dict().items() if k in tower.state_dict()})
    text = case.inputs[1]
    assert torch.equal(case.pruned(preset).encode_text(text), vp.prune(tower, preset)(text))
