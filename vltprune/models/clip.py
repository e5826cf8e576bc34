"""open_clip's CLIP built from a configuration, and its tokenizer."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from open_clip.hf_configs import arch_dict
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from ..registry import bind

Config = Mapping[str, Any]
_POOLERS = ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
_PROJECTIONS = ("linear", "mlp", None)


def clip(
    embed_dim: int,
    vision_cfg: Config,
    text_cfg: Config,
    custom_text: bool = False,
    quick_gelu: bool = False,
    init_logit_scale: float = math.log(1 / 0.07),
    init_logit_bias: float | None = None,
    nonscalar_logit_scale: bool = False,
    output_dict: bool = False,
    preprocess_cfg: Config | None = None,
) -> nn.Module:
    """A dense CLIP, or CustomTextCLIP where open_clip would build one. The arguments are what open_clip's files of
    architectures hold, and preprocess_cfg (size, mean, std, interpolation, resize_mode), CLIP's where it says nothing.

    A text tower of transformers has `hf_model_name` in text_cfg, a folder or a name of the hub of which config.json is
    read; a trunk of timm has `timm_model_name` in vision_cfg, and takes images of the config's `image_size`. Weights are
    random, unless hf_model_pretrained or timm_model_pretrained ask for the towers' own. Raises TypeError and ValueError
    for what no such file may hold.
    """
    vision, text = _checked("vision_cfg", CLIPVisionCfg, vision_cfg), _checked("text_cfg", CLIPTextCfg, text_cfg)
    pixels = _checked("preprocess_cfg", PreprocessCfg, preprocess_cfg or {})
    if text.get("hf_model_name"):
        _check_encoder(text)
    kind: Any = CustomTextCLIP if custom_text or text.get("hf_model_name") else CLIP
    scale = (init_logit_scale, init_logit_bias, nonscalar_logit_scale)
    text = {"hf_model_pretrained": False, **text}
    model = kind(embed_dim, vision, text, quick_gelu, *scale, output_dict=output_dict)

    size = model.visual.image_size
    if type(model.visual) is TimmModel:
        model.visual.set_input_size(size)  # its trunk still has the size that timm knows it by
    set_model_preprocess_cfg(model, asdict(PreprocessCfg(**{"size": size, **pixels})))
    return model


def recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `clip` as a checkpoint keeps them: plain JSON, and towers that wait for the checkpoint's weights.

    TypeError for an argument that JSON has no form for.
    """
    out = {}
    for name, value in arguments.items():
        try:
            out[name] = json.loads(json.dumps(value, default=os.fspath))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} cannot be saved ({error}): give numbers, text, lists and dicts of them") from None
    for cfg, own in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        out[cfg].pop(own, None)
    return out


def tokenizer(text_cfg: Config) -> Callable[[list[str]], Tensor]:
    """Sentences to ids [sentences, context_length], as open_clip makes them for such a text tower.

    ValueError for a tower of transformers without `hf_tokenizer_name`, and for one that cannot be read.
    """
    cfg = CLIPTextCfg(**text_cfg)
    options: dict[str, Any] = {"context_length": cfg.context_length, **(cfg.tokenizer_kwargs or {})}
    if cfg.hf_tokenizer_name:
        try:
            return HFTokenizer(cfg.hf_tokenizer_name, tokenizer_mode=cfg.tokenizer_mode, **options)
        except OSError as error:
            raise ValueError(
                f"text_cfg: no tokenizer of transformers at hf_tokenizer_name={cfg.hf_tokenizer_name!r}: {error}"
            ) from error
    if cfg.hf_model_name:
        raise ValueError(
            f"text_cfg has hf_model_name={cfg.hf_model_name!r} and does not say how sentences become its ids: build the model "
            "with hf_tokenizer_name, a folder of transformers or a name of the hub"
        )
    return SimpleTokenizer(**options)


def _checked(name: str, kind: type, cfg: Config) -> dict[str, Any]:
    """The config with text for paths and a tuple for an image's two sides. TypeError for a key that `kind` lacks."""
    if not isinstance(cfg, Mapping):
        raise TypeError(f"{name} must be a dict, as in open_clip's files of architectures; got {cfg!r}")
    bind(name, kind, cfg)
    plain = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in cfg.items()}
    return {key: tuple(v) if key == "image_size" and isinstance(v, list) else v for key, v in plain.items()}


def _check_encoder(text_cfg: Config) -> None:
    """ValueError for a text tower of transformers that open_clip does not build."""
    name = text_cfg["hf_model_name"]
    try:
        config: Any = importlib.import_module("transformers").AutoConfig.from_pretrained(name)
    except ImportError as error:
        raise ImportError(f"hf_model_name={name!r} needs transformers: pip install 'vltprune[hf]'") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text_cfg: hf_model_name={name!r} is no folder with a config.json of transformers, nor is it had from the "
            f"hub: {error}"
        ) from error
    choices = {"hf_pooler_type": _POOLERS, "hf_proj_type": _PROJECTIONS}
    wrong = [key for key, known in choices.items() if text_cfg.get(key, known[0]) not in known]
    if wrong:
        there = ", ".join(map(str, choices[wrong[0]]))
        raise ValueError(f"text_cfg: {wrong[0]}={text_cfg[wrong[0]]!r}: there is {there}")
    if config.model_type not in arch_dict:
        raise ValueError(
            f"text_cfg: hf_model_name={name!r} is of type {config.model_type!r}, and open_clip builds {', '.join(arch_dict)}"
        )
