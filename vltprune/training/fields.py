"""Types of the config's fields: values of files and of command lines are parsed alike."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..pruning.config import Part
from ..utils.frozen import frozen, thawed

_INTEGERS = {
    "val_limit": 1000,
    "k_test": 128,
    "steps": 2000,
    "batch_size": 32,
    "accumulate": 2,
    "seed": 0,
    "workers": 2,
}
_INTEGERS |= {"checkpoint_every": 500, "log_every": 50, "max_bad": 10}
_NUMBERS = {"ramp": 0.5, "epochs": 2, "lr": 1e-4, "weight_decay": 0.05, "warmup": 0.1, "align": 0.1}
_NUMBERS |= {"distill": 1.0, "distill_summaries": 1.0, "distill_tokens": 0.5, "saliency": 0.5, "max_grad_norm": 1.0}
_TEXTS = {"task": "nlvr", "model": "blip_nlvr_base", "data": "train.json", "val": "dev.json", "images": "images/"}
_TEXTS |= {"val_images": "images/", "vocabulary": "vocab.txt", "answers": "answer_list.json", "start": "run/model"}
_TEXTS |= {"preset": "madtp", "budget": "controller", "dtype": "bfloat16"}
_MAY_BE_NONE = (
    "images",
    "val_images",
    "val_limit",
    "answers",
    "start",
    "epochs",
    "steps",
    "batch_size",
    "lr",
    "weight_decay",
)


def parse_fields(config: object) -> dict[str, Any]:
    """The fields of a config as plain values of their types.

    Raises:
        TypeError: a value has another type; the text names the field, and what to write.
    """
    fields = {name: value for name, value in vars(config).items() if value is not None or name not in _MAY_BE_NONE}
    return {name: _parse(name, value) for name, value in fields.items()}


def _parse(name: str, value: Any) -> Any:
    plain = _scalar(value)
    if name in _INTEGERS:
        return _integer(name, plain)
    if name == "reduction":
        return _reduction(plain)
    if name in _NUMBERS:
        return _number(name, plain, _NUMBERS[name])
    if name in _TEXTS:
        return _text(name, plain, _TEXTS[name])
    if name == "augment" and not isinstance(plain, bool):
        raise TypeError(f"augment={value!r} must be True or False")
    if name == "pretrained" and plain is not None and not isinstance(plain, bool):
        return _text(name, plain, "weights.safetensors")
    if name == "serve":
        return tuple(_number(name, share, 0.5) for share in _items(value))
    if name == "freeze":
        return tuple(_text(name, pattern, "text.*") for pattern in _items(value))
    if name == "losses":
        return _losses(value)
    if name in ("model_args", "parts"):
        return _mapping(name, value)
    return plain


def _scalar(value: Any) -> Any:
    """Python's number for a scalar of numpy or torch; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _integer(name: str, value: Any) -> int:
    if not _is_finite(value) or int(value) != value:
        raise TypeError(f"{name}={value!r} must be a whole number, such as {name}={_INTEGERS[name]}")
    return int(value)


def _number(name: str, value: Any, example: float) -> float:
    if not _is_finite(value):
        raise TypeError(f"{name}={value!r} must be a number, such as {name}={example:g}")
    return value if isinstance(value, int) else float(value)


def _reduction(value: Any) -> Any:
    """Share of the dense MACs, or one for each tower."""
    shares = value.values() if isinstance(value, Mapping) else (value,)
    if not shares or not all(map(_is_finite, map(_scalar, shares))):
        raise TypeError(
            f"reduction={thawed(value)!r} must be a number, such as reduction=0.5, or one for each tower, such as "
            "reduction={'image': 0.5, 'text': 0.3}"
        )
    return frozen(value, "reduction") if isinstance(value, Mapping) else _number("reduction", value, 0.5)


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _text(name: str, value: object, example: str) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={value!r} must be text, such as {name}={example}")
    return os.fspath(value)


def _items(value: object) -> Iterable[object]:
    """A collection, or one value that stands for itself."""
    return value if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else (value,)


def _losses(value: Any) -> Any:
    """Weights by name."""
    weights = list(map(_scalar, value.values())) if isinstance(value, Mapping) else None
    if weights is None or not all(_is_finite(one) and one >= 0 for one in weights):
        raise TypeError(
            f"losses={thawed(value)!r} must be a mapping from loss to a weight of 0 or more, such as "
            "losses={'keep_ratio': 2.0}"
        )
    return frozen(dict(zip(value, weights, strict=True)), "losses")


def _mapping(name: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}={given!r} must be a mapping, such as {name}={{'name': value}}")
    return frozen(_plain(given), name)


def _plain(value: Any) -> Any:
    """Parts as dicts, also those that a mapping from tower to part holds."""
    if isinstance(value, Part):
        return value.to_dict()
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value
