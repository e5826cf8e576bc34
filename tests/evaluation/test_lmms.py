"""The models that lmms-eval finds: held to the interface that it documents, and to itself where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
import types

import pytest
import timm
import torch

import vltprune as vp
from vltprune.evaluation import lmms


@dataclasses.dataclass(frozen=True)
class Manifest:
    """ModelManifest of lmms_eval.models.registry_v2."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Base:
    """A model of lmms-eval: it loads a model of transformers as `_model`, and gives it unwrapped as `model`."""

    is_simple = True

    def __init__(self, pretrained="", batch_size=1):
        self.pretrained, self.batch_size = pretrained, batch_size
        self._model = timm.create_model("test_vit").eval()

    @property
    def model(self):
        return self._model


@pytest.fixture
def installed(monkeypatch):
    """As if lmms-eval were installed, with a base model that needs no download."""
    names = ["", ".models", ".models.registry_v2", ".models.simple", ".models.simple.llava_hf"]
    modules = {f"lmms_eval{name}": types.ModuleType(f"lmms_eval{name}") for name in names}
    modules["lmms_eval.models.registry_v2"].ModelManifest = Manifest
    modules["lmms_eval.models.simple.llava_hf"].LlavaHf = Base
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_the_entry_point_gives_manifests(installed):
    (entry,) = (e for e in importlib.metadata.entry_points(group="lmms_eval.models") if e.name == "vltprune")
    found = {one.model_id: one for one in entry.load()()}
    assert list(found) == [f"vltprune_{name}" for name in lmms.BASES]
    llava = found["vltprune_llava"]
    assert llava.simple_class_path == "vltprune.evaluation.lmms.simple_llava"
    assert found["vltprune_internvl"].simple_class_path is None


def test_a_model_is_pruned_as_the_command_line_says(installed):
    path, name = ["vltprune.evaluation.lmms", "simple_llava"]
    cls = getattr(importlib.import_module(path), name)
    assert issubclass(cls, Base) and cls.is_simple
    one = cls(pretrained="x/y", batch_size=2, preset="evit", keep="ratio(ratio=0.5)", at=5)
    assert (one.pretrained, one.batch_size) == ("x/y", 2)
    assert vp.is_pruned(one.model) and not one.model.training
    stage = one.model.pruning.config.stages[0]
    assert (str(stage.keep), stage.at) == ("ratio(ratio=0.5)", (5,))
    with torch.no_grad():
        one.model(torch.randn(1, 3, 160, 160))


def test_without_a_preset_the_error_says_so(installed):
    with pytest.raises(TypeError, match="preset"):
        lmms.simple_llava(pretrained="x/y")


@pytest.mark.parametrize("name", ["simple_internvl", "chat_gemma3", "simple_other", "other"])
def test_what_lmms_eval_does_not_have_is_no_attribute(name):
    with pytest.raises(AttributeError, match=name):
        getattr(lmms, name)


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
@pytest.mark.parametrize("name", lmms.BASES)
def test_lmms_eval_finds_each_model(name):
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.get_model_class(f"vltprune_{name}")
