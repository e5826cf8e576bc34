"""Preprocessing: the evaluation transform of a model of timm, open_clip or this library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..hosts.find import find_composite
from ..models import zoo
from ..pruning.model import dense_model
from ..registry import backbones
from .recipe import original_recipe

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """A transform from an RGB image to normalized pixels [3, height, width].

    Attributes:
        transform: from the image to the pixels.
        mean, std: [3], which pixels in 0 .. 1 are normalized by.
        config: the same as plain data, in the names of the library that "library" says: those of timm's data config
            (`timm.data.create_transform`), or of open_clip's `PreprocessCfg`, which this library's own models share.
    """

    transform: Transform
    mean: Tensor
    std: Tensor
    config: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def to_image(self, normalized: Tensor) -> Image.Image:
        """The inverse of the normalization: pixels [3, height, width] as an RGB image."""
        pixels = (normalized.cpu() * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1) * 255
        return Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy())


@dataclass(frozen=True)
class _Squeezed:
    """Transform of BLIP: the whole image at a model's width and height, by bicubic interpolation, normalized."""

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.asarray(image.resize(self.size, Image.Resampling.BICUBIC), np.float32) / 255
        normalized = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(normalized).permute(2, 0, 1).contiguous()


def transforms(model: nn.Module) -> Preprocessing:
    """The evaluation transform that a model was trained for.

    timm's and open_clip's models hold their own. BLIP and `llava_tiny` take the whole image, squeezed to their size by bicubic
    interpolation, normalized as CLIP's; a backbone of this library that was trained on other pixels is known by the name that
    `create_model` built it from.

    Args:
        model: a dense or pruned model of timm, open_clip or this library.

    Returns:
        The transform, from an RGB image to pixels [3, height, width].

    Raises:
        TypeError: for a model that takes no images.
    """
    host = dense_model(model)
    composite = find_composite(host)
    towers = {"image": host} if composite is None else {t: tower for t, (tower, _) in composite.towers(host).items()}
    tower: Any = towers.get("image")
    if hasattr(tower, "preprocess_cfg"):
        return _open_clip(tower)
    if type(tower).__module__.startswith("vltprune.") and hasattr(tower, "patch_embed"):
        return _own(tower, host)
    if hasattr(tower, "patch_embed"):
        return _timm(tower)
    if tower is not None and original_recipe(host).backbone in backbones:
        # a model of transformers in sizes of our own
        return _own(tower, host)
    raise TypeError(
        f"a {type(host).__name__} does not say how its images are preprocessed: give a model that takes images"
    )


def image_size(tower: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that a dense image tower takes."""
    tower = getattr(tower, "trunk", tower)  # open_clip's wrapper of timm's models
    if hasattr(tower, "patch_embed"):
        size = tower.patch_embed.img_size
    else:
        size = tower.image_size if hasattr(tower, "image_size") else tower.config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _timm(tower: Any) -> Preprocessing:
    data = importlib.import_module("timm.data")
    size = tower.patch_embed.img_size  # the model's, whatever its weights were trained on; None: any
    config = data.resolve_data_config({"input_size": (3, *size)} if size else {}, model=tower)
    return _preprocessing(data.create_transform(**config), {"library": "timm", **config})


def _open_clip(tower: Any) -> Preprocessing:
    transform = importlib.import_module("open_clip.transform")
    config = transform.PreprocessCfg(**tower.preprocess_cfg)
    return _preprocessing(
        transform.image_transform_v2(config, is_train=False), {"library": "open_clip", **asdict(config)}
    )


def _own(tower: Any, host: nn.Module) -> Preprocessing:
    height, width = image_size(tower)
    name = original_recipe(host).backbone
    maker: Any = backbones[name] if name in backbones else zoo.Backbone  # noqa: SIM401 (a Registry has no get)
    names = {"size": (height, width), "mode": "RGB", "mean": tuple(maker.mean), "std": tuple(maker.std)}
    names |= {"interpolation": "bicubic", "resize_mode": "squash"}
    return _preprocessing(_Squeezed((width, height), maker.mean, maker.std), {"library": "vltprune", **names})


def _preprocessing(transform: Transform, config: Mapping[str, Any]) -> Preprocessing:
    return Preprocessing(transform, torch.tensor(config["mean"]), torch.tensor(config["std"]), config)
