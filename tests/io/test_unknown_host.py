"""Models that `create_model` did not build: saving them says how to load them, and that way loads them."""

from __future__ import annotations

import re
import warnings

import open_clip
import pytest
import timm
import torch
import transformers
from registered import registered
from timm.models.vision_transformer import VisionTransformer

import vltprune as vp
from vltprune.hosts.timm import VisionTransformerHost
from vltprune.models.blip import BlipNlvr

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


class Own(VisionTransformer):
    """Somebody's model, with a head of its own."""

    def __init__(self):
        super().__init__(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        self.head = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 3))


@pytest.fixture(autouse=True)
def pruned_as_timms():
    """A host for the class, as its owner registers it."""
    with registered(vp.hosts, **{f"{Own.__module__}.{Own.__qualname__}": VisionTransformerHost}):
        yield


def with_other_head():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    model.head = torch.nn.Sequential(torch.nn.Linear(192, 8), torch.nn.Linear(8, 3))
    return model


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=40), add_pooling_layer=False)


def blip():
    return BlipNlvr(
        image_size=32,
        patch_size=8,
        vision_width=32,
        vision_depth=2,
        vision_heads=2,
        text_width=32,
        text_depth=2,
        text_heads=2,
        vocab_size=40,
        max_positions=16,
    )


def images():
    return (torch.randn(2, 3, 32, 32),)


HOSTS = {
    "a class of one's own": (Own, images),
    "timm's, by hand": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), images),
    "timm's, with another head": (with_other_head, images),
    "open_clip's, by hand": (
        lambda: open_clip.create_model("ViT-S-32", force_image_size=64).visual,
        lambda: (torch.randn(2, 3, 64, 64),),
    ),
    "transformers'": (bert, lambda: (torch.randint(4, 40, (2, 9)),)),
    "BLIP, by hand": (blip, lambda: (torch.randn(2, 2, 3, 32, 32), torch.randint(4, 40, (2, 9)))),
}


def outputs(model, inputs):
    with torch.no_grad():
        out = model(*inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("preset", [None, "attention"])
@pytest.mark.parametrize("kind", HOSTS)
def test_saving_says_how_to_load_and_so_it_loads(tmp_path, kind, preset):
    build, draw = HOSTS[kind]
    model, inputs = build().eval(), draw()
    model = model if preset is None else vp.prune(model, preset)
    with pytest.warns(
        vp.UnknownHostWarning, match=re.escape(f"vltprune.load({str(tmp_path)!r}, host=model)")
    ) as caught:
        vp.save(model, tmp_path)
    assert caught[0].filename == __file__
    with pytest.raises(vp.CheckpointError, match="host="):
        vp.load(tmp_path)
    again = vp.load(tmp_path, host=build())
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    assert vp.is_pruned(again) == (preset is not None)


def test_a_pruned_model_of_transformers_is_told_of_its_own_way(tmp_path):
    model = vp.prune(bert().eval(), "attention")
    with pytest.warns(vp.UnknownHostWarning, match=r"write model\.save_pretrained\(folder\)"):
        vp.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    (ids,) = HOSTS["transformers'"][1]()
    assert torch.equal(outputs(vp.load(tmp_path / "theirs"), (ids,)), outputs(model, (ids,)))


def test_nothing_is_said_where_nothing_is_lacking(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vp.save(vp.create_model("vit_tiny_patch16_224_attention", img_size=32, depth=2), tmp_path / "known")
        # to be laid over a dense model that one has
        vp.save(vp.prune(Own(), "attention"), tmp_path / "pruning", only="pruning")
    vp.load(tmp_path / "known")
    vp.load(tmp_path / "pruning", host=Own())
