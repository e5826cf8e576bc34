"""open_clip's CLIP from a configuration: builds the model and its tokenizer, and makes the configuration JSON."""

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


def build_clip(
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
    """Build a dense CLIP from the arguments that open_clip's configuration files hold.

    Weights are random, unless `hf_model_pretrained` in text_cfg or `timm_model_pretrained` in vision_cfg ask for a tower's own.

    Args:
        embed_dim: Width of the features that both towers share.
        vision_cfg: The image tower; with `timm_model_name` a trunk of timm, for images of the config's `image_size`.
        text_cfg: The text tower; with `hf_model_name` an encoder of transformers, from a folder or a hub name whose
            config.json is read.
        custom_text: Whether to build a CustomTextCLIP, as an encoder of transformers always does.
        quick_gelu: Whether the towers use QuickGELU.
        init_logit_scale: Initial log of the inverse temperature.
        init_logit_bias: Initial bias of the logits (SigLIP); None for none.
        nonscalar_logit_scale: Whether scale and bias have shape [1].
        output_dict: Whether the model returns a dict.
        preprocess_cfg: Pixel preprocessing (size, mean, std, interpolation, resize_mode); CLIP's where it says nothing.

    Returns:
        An open_clip CLIP or CustomTextCLIP.

    Raises:
        TypeError: For keys that no such configuration has.
        ValueError: For an encoder or a pooler that open_clip does not build.
        ImportError: For an encoder of transformers without that package.
    """
    vision, text = _check_keys("vision_cfg", CLIPVisionCfg, vision_cfg), _check_keys("text_cfg", CLIPTextCfg, text_cfg)
    pixels = _check_keys("preprocess_cfg", PreprocessCfg, preprocess_cfg or {})
    if text.get("hf_model_name"):
        _check_encoder(text)
    kind: Any = CustomTextCLIP if custom_text or text.get("hf_model_name") else CLIP
    scale = (init_logit_scale, init_logit_bias, nonscalar_logit_scale)
    text = {"hf_model_pretrained": False, **text}
    model = kind(embed_dim, vision, text, quick_gelu, *scale, output_dict=output_dict)

    size = model.visual.image_size
    if type(model.visual) is TimmModel:
        # its trunk still has the size that timm knows it by
        model.visual.set_input_size(size)
    set_model_preprocess_cfg(model, asdict(PreprocessCfg(**{"size": size, **pixels})))
    return model


def recordable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Make the arguments of `build_clip` what a checkpoint keeps: plain JSON, without requests for pretrained towers.

    Raises:
        TypeError: For an argument that JSON cannot hold.
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


def build_tokenizer(text_cfg: Config) -> Callable[[list[str]], Tensor]:
    """Build open_clip's tokenizer for a text tower.

    Args:
        text_cfg: The text tower, as in `build_clip`.

    Returns:
        A function of sentences that returns token ids [sentences, context_length].

    Raises:
        ValueError: For an encoder of transformers without `hf_tokenizer_name`, or a tokenizer that cannot be loaded.
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


def _check_keys(name: str, kind: type, cfg: Config) -> dict[str, Any]:
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
            f"text_cfg: hf_model_name={name!r} is no folder with a config.json of transformers, and cannot be loaded from "
            f"the hub: {error}"
        ) from error
    choices = {"hf_pooler_type": _POOLERS, "hf_proj_type": _PROJECTIONS}
    wrong = [key for key, known in choices.items() if text_cfg.get(key, known[0]) not in known]
    if wrong:
        choice = ", ".join(map(str, choices[wrong[0]]))
        raise ValueError(f"text_cfg: {wrong[0]}={text_cfg[wrong[0]]!r} is not supported: write one of {choice}")
    if config.model_type not in arch_dict:
        raise ValueError(
            f"text_cfg: hf_model_name={name!r} is of type {config.model_type!r}, and open_clip builds {', '.join(arch_dict)}"
        )
