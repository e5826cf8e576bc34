"""Models on disk: config.json and model.safetensors in a folder. Loading is all or nothing."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import convert
from .config import PruneConfig
from .registry import bind

_FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_HOST, _PRUNING = "host.", "pruning."
_MAPS = f"{_PRUNING}guide.maps."


class CheckpointError(ValueError):
    """A file that cannot be read, or whose tensors do not fit the model. Nothing of it was loaded."""


@dataclass(frozen=True)
class Recipe:
    """How `create_model` built a dense model: what a checkpoint needs to build it again."""

    backbone: str
    model_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """The contents of config.json."""

    backbone: str | None
    model_args: dict[str, Any]
    pruning: dict[str, Any] | None
    contents: Literal["all", "pruning"] = "all"
    format: int = _FORMAT

    @classmethod
    def read(cls, folder: Path) -> Saved:
        try:
            data = json.loads((folder / CONFIG).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no {CONFIG}: give a folder that vltprune.save wrote") from None
        except ValueError as error:
            raise CheckpointError(f"{folder / CONFIG} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise CheckpointError(f"{folder / CONFIG} has format {found!r}, this version reads {_FORMAT}")
        bind(f"{folder / CONFIG}", cls, data)
        return cls(**data)


def save(
    model: nn.Module, folder: str | Path, only: Literal["pruning"] | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write a model, dense or pruned, as config.json and model.safetensors, and return the folder.

    only="pruning" leaves the dense weights out: the small file to lay over a stock backbone. dtype: of the floating-point
    tensors on disk (None: as they are). Files appear whole or not at all. Raises OSError, naming the folder, where it
    cannot be written, ValueError for only="pruning" of a dense model, TypeError for a quantized one, before anything is
    written.
    """
    folder, record = Path(folder), getattr(model, "pruning", None)
    if only == "pruning" and record is None:
        raise ValueError("only='pruning' needs a pruned model: this one is dense")
    host = model if record is None else record.host
    recipe = getattr(host, "recipe", None) or Recipe("", {})
    pruning = None if record is None else record.config.to_dict()
    saved = Saved(recipe.backbone or None, recipe.model_args, pruning, only or "all")

    state = dict(_pruning_state(model))
    if only is None:
        state |= {_HOST + key: value for key, value in host.state_dict().items()}
    _check_plain(state if only else {**state, **model.state_dict()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / WEIGHTS, lambda path: save_file(_storable(state, dtype), path, {"format": "pt"}))
        _replace(folder / CONFIG, lambda path: Path(path).write_text(json.dumps(asdict(saved), indent=2) + "\n"))
    except OSError as error:
        raise OSError(
            f"cannot write the model to {folder}: {error.strerror or error}; choose a folder you may write"
        ) from error
    return folder


def load_into(model: nn.Module, path: str | Path) -> None:
    """Fill a model from a folder of ours, a .safetensors or a .pth: ours, or BLIP's of Salesforce, MADTP or transformers.

    What a file is, its keys tell. Raises CheckpointError as `load` does.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    state, partial = _own_keys(_read(file), model)
    wanted = _wanted(model)
    state = _plain_maps(state, wanted) | state
    if partial:
        wanted = {key: value for key, value in wanted.items() if key.startswith(_PRUNING)}
    _check(state, wanted, file)
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(state[key])


def saved_pruning(path: Path) -> PruneConfig | None:
    """The pruning that a folder of ours was saved with; None for a dense model and for single files."""
    if not path.is_dir():
        return None
    saved = Saved.read(path)
    return None if saved.pruning is None else PruneConfig.from_dict(saved.pruning)


def saved_temperature(path: Path) -> float | None:
    """The temperature that the MADTP reference keeps beside its weights in a .pth; None where there is none above 0."""
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # whatever is wrong with the file, loading it says so
        return None
    found = data.get("temperature") if isinstance(data, Mapping) else None
    return float(found) if isinstance(found, (int, float)) and found > 0 else None


def _pruning_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of guide and pruners: "pruning.guide.*" and "pruning.<tower>.<depth>.*"."""
    record = getattr(model, "pruning", None)
    if record is None:
        return {}
    modules = {tower: encoder.pruners for tower, encoder in record.towers.items()}
    modules |= {"guide": record.guide} if record.guide is not None else {}
    return {f"{_PRUNING}{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}


def _wanted(model: nn.Module) -> dict[str, Tensor]:
    return {_HOST + key: value for key, value in _host(model).state_dict().items()} | _pruning_state(model)


def _host(model: nn.Module) -> nn.Module:
    record = getattr(model, "pruning", None)
    return model if record is None else record.host


def _own_keys(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """A state dict in our keys, and whether it is only the pruning's."""
    pruned = _pruning_state(model)
    if convert.is_blip(state):
        dense, anchors = convert.from_blip(state, _host(model).state_dict())
        own = {_HOST + key: value for key, value in dense.items()}
        if anchors is not None and pruned:
            own[f"{_PRUNING}guide.anchors"] = anchors
            own |= {key: value for key, value in pruned.items() if key not in own and key.endswith(".birth")}
        elif anchors is None:
            own |= pruned  # a dense checkpoint says nothing of the pruning: it stays as it was made
        return own, False
    if any(key.startswith((_HOST, _PRUNING)) for key in state):
        if not pruned:
            state = {key: value for key, value in state.items() if not key.startswith(_PRUNING)}
        elif not any(key.startswith(_PRUNING) for key in state):
            state = state | pruned
        return state, not any(key.startswith(_HOST) for key in state)
    return {_HOST + key: value for key, value in state.items()} | pruned, False


def _plain_maps(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps for anchors that a file has without any, as the MADTP reference: they met the tokens as they are."""
    maps = {key: value for key, value in wanted.items() if key.startswith(_MAPS)}
    weights = [value for value in maps.values() if value.ndim == 2]
    lacking = f"{_PRUNING}guide.anchors" in state and not any(key.startswith(_MAPS) for key in state)
    if not lacking or any(rows != columns for rows, columns in (weight.shape for weight in weights)):
        return {}
    return {key: torch.eye(len(value)) if value.ndim == 2 else torch.zeros(len(value)) for key, value in maps.items()}


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU."""
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}: give a folder with {WEIGHTS}, a .safetensors or a .pth file")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except Exception as error:
            raise CheckpointError(f"{file} is no readable safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():  # torch warns of pickles it may not read; we say so ourselves
            warnings.simplefilter("ignore", UserWarning)
            data = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{file} is no plain tensor file: loading it would run code or fail ({str(error).splitlines()[0]}). Convert it "
            "to .safetensors where you trust it"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(data, Mapping) and isinstance(data.get(wrapper), Mapping):
            data = data[wrapper]
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{file} holds no state dict: a mapping from names to tensors, alone or under 'model'")
    return dict(data)


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> None:
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    shapes = [
        f"{key} (file {list(state[key].shape)}, model {list(value.shape)})"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    found = {"missing": missing, "not in the model": extra, "of another shape": shapes}
    problems = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in found.items() if keys]
    if problems:
        raise CheckpointError(f"{file} does not fit this model, nothing was loaded. " + "; ".join(problems))


def _listed(keys: list[str], most: int = 12) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _check_plain(state: Mapping[str, Any]) -> None:
    """TypeError for what is no plain tensor, as quantized layers have it: `load` would build them unquantized."""
    strange = [key for key, value in state.items() if type(value) not in (Tensor, nn.Parameter)]
    if strange:
        raise TypeError(
            f"cannot save this model: {strange[0]} is a {type(state[strange[0]]).__name__}, quantized, and not a plain tensor. "
            "Save the model before it is quantized, and quantize it again after loading"
        )


def _storable(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous copies, none sharing memory with another, as safetensors wants them."""
    return {
        key: value.detach()
        .to("cpu", dtype if dtype and value.is_floating_point() else value.dtype)
        .clone()
        .contiguous()
        for key, value in state.items()
    }


def _replace(target: Path, write: Any) -> None:
    """Write beside the target, then take its place in one step."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    os.close(handle)
    try:
        write(name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
