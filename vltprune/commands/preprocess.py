"""How a model wants its pictures: each library's own preprocessing, behind one face."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..factory import Name
from .inspect import image_size

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # as BLIP's


@dataclass(frozen=True)
class Preprocessing:
    """A picture to a normalised image [3, height, width]. mean, std [3]: what it was normalised by, for looking back."""

    transform: Callable[[Image.Image], Tensor]
    mean: Tensor
    std: Tensor

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.transform(picture)

    @classmethod
    def of(cls, tower: Any, name: Name) -> Preprocessing:
        """The preprocessing of the dense image tower of a model of that name."""
        makers = {"timm": _timm, "open_clip": _open_clip, "vltprune": _own}
        transform, mean, std = makers[name.library](tower, name.backbone)
        return cls(transform, torch.tensor(mean), torch.tensor(std))


Made = tuple[Callable[[Image.Image], Tensor], Sequence[float], Sequence[float]]


def _timm(tower: Any, backbone: str) -> Made:
    data: Any = importlib.import_module("timm.data")
    config = data.resolve_data_config({}, model=tower)
    return data.create_transform(**config), config["mean"], config["std"]


def _open_clip(tower: Any, backbone: str) -> Made:
    transform: Any = importlib.import_module("open_clip.transform")
    config = transform.PreprocessCfg(**tower.preprocess_cfg)
    return transform.image_transform_v2(config, is_train=False), config.mean, config.std


def _own(tower: Any, backbone: str) -> Made:
    """The whole picture, squeezed to the model's size: BLIP's evaluation transform."""
    height, width = image_size(tower)
    tiny = backbone.endswith("_tiny")  # trained on pixels between -1 and 1
    mean, std = ((0.5,) * 3, (0.5,) * 3) if tiny else (_CLIP_MEAN, _CLIP_STD)

    def transform(picture: Image.Image) -> Tensor:
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
        normal = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
        return torch.from_numpy(normal).permute(2, 0, 1).contiguous()

    return transform, mean, std
