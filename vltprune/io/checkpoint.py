"""Models on disk: config.json and model.safetensors in a folder. Loading is all or nothing."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models import convert
from ..pruning.config import PruneConfig
from ..pruning.current_config import current_config
from ..pruning.model import dense_model, find_pruning
from ..registry import guides, keepers, reducers, scorers
from ..utils.files import Write, replace_together
from ..utils.wrappers import plain_name, unwrapped
from .model_files import BACKUP, CONFIG, DIGEST, WEIGHTS, CheckpointError, Saved, finish_interrupted, weights_of
from .recipe import Recipe, check_shared, check_whole, recipe_of

__all__ = ["CONFIG", "WEIGHTS", "CheckpointError", "Recipe", "Saved", "load_into", "save"]

_HOST, _PRUNING = "host.", "pruning."
_MAPS = f"{_PRUNING}guide.maps."
_WRAPPED = ("module.", "_orig_mod.")  # what wrappers put before each name of a state dict


def save(
    model: nn.Module, folder: str | Path, only: Literal["pruning"] | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write a model, dense or pruned, as config.json and model.safetensors, and return the folder.

    only="pruning" leaves the dense weights out: the small file to lay over a stock backbone. dtype: of the floating-point
    tensors on disk (None: as they are). Both files are written or none: after any failure, an earlier save in the folder is
    there as it was. What was exchanged in the model after it was built is saved too, where it is an argument of the model.
    Raises ValueError, naming it, where it is not, and for only="pruning" of a dense model; OSError, naming the folder, where
    it cannot be written, TypeError for a quantized model, and for arguments of the model that JSON cannot hold; ValueError
    for weights that FSDP shards, and for adapters of peft.
    """
    check_whole(model, adapters=only is None)
    folder, model = Path(folder), unwrapped(model)
    record = find_pruning(model)
    if only == "pruning" and record is None:
        raise ValueError("only='pruning' needs a pruned model: this one is dense")
    host = model if record is None else record.host
    state = dict(_pruning_state(model))
    if only is None:
        state |= {_HOST + plain_name(key): value for key, value in host.state_dict().items()}
    _check_plain(state if only else {**state, **model.state_dict()})

    recipe = recipe_of(host)
    saved = replace(saved_of(model, recipe.model_args), backbone=recipe.backbone or None, contents=only or "all")
    saved.check()
    _write(folder, saved.signed(), _storable(state, dtype))
    return folder


def saved_of(model: nn.Module, arguments: dict[str, Any]) -> Saved:
    """What is to be written of a model besides its tensors, of which `arguments` build the dense one.

    Knobs that were turned since the model was pruned are written as they stand. Raises ValueError for a pruned model that no
    longer shares a part with its dense one, and for pruners with parts that were exchanged.
    """
    record = find_pruning(model)
    if record is None:
        return Saved(None, arguments, None)
    check_shared(model, record)
    config = current_config(record.config, record.towers)
    return Saved(None, arguments, config.to_dict(), modules=_modules(config))


def _write(folder: Path, saved: Saved, state: dict[str, Tensor]) -> None:
    config = json.dumps(saved.to_dict(), indent=2) + "\n"
    labels = {"format": "pt", DIGEST: str(saved.digest)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        finish_interrupted(folder)
        writes: dict[Path, Write] = {
            folder / WEIGHTS: lambda path: save_file(state, path, labels),
            folder / CONFIG: lambda path: path.write_text(config, encoding="utf-8"),
        }
        replace_together(writes, {folder / WEIGHTS: folder / BACKUP})
    except (OSError, SafetensorError) as error:  # a full disk is either, by the writer
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write the model to {folder}: {why}; choose a folder you may write") from error


def load_into(model: nn.Module, path: str | Path) -> None:
    """Fill a model from a folder of ours, a .safetensors or a .pth: ours, or BLIP's of Salesforce, MADTP or transformers, or
    what a training script wrote of `model.state_dict()`.

    What a file is, its keys tell. Raises CheckpointError as `load` does, and for a folder that was saved with another pruning
    than this model has.
    """
    path, record = Path(path), find_pruning(model)
    if record is not None and (path / CONFIG).is_file():
        _check_pruning(record, path)
    fill(model, path)


def fill(model: nn.Module, path: Path) -> None:
    """As `load_into`, whatever pruning the folder was saved with: the model's was chosen."""
    file = weights_of(path) if path.is_dir() else path
    state, partial = _own_keys(_read(file), model)
    wanted = _wanted(model)
    state = _plain_maps(state, wanted) | state
    if partial:
        wanted = {key: value for key, value in wanted.items() if key.startswith(_PRUNING)}
    _check(state, wanted, file)
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(state[key])


def _check_pruning(record: Any, path: Path) -> None:
    """CheckpointError for a folder of ours that was saved with other parts, depths or values of knobs than a model has."""
    if "format" not in json.loads((path / CONFIG).read_text(encoding="utf-8")):
        return  # of another library
    saved = saved_pruning(path)
    if saved is None:
        return
    names = [[part.name for part in config.parts("guide")] for config in (saved, record.config)]
    try:
        same = names[0] == names[1] and current_config(saved, record.towers) == saved
    except ValueError:
        same = False
    if not same:
        raise CheckpointError(
            f"{path} was saved with another pruning than this model has, nothing was loaded. Saved: {saved}. The model: "
            f"{record.config}. Write load({str(path)!r}), or load({str(path)!r}, host=model.host), which prune as saved"
        )


def saved_pruning(path: Path) -> PruneConfig | None:
    """The pruning that a folder of ours was saved with; None for a dense model and for single files."""
    if not path.is_dir():
        return None
    saved = Saved.read(path)
    return None if saved.pruning is None else pruning_of(saved, path)


def pruning_of(saved: Saved, path: Path) -> PruneConfig:
    """The pruning of a config.json. CheckpointError, with what to import, for a part of somebody's that is not registered."""
    assert saved.pruning is not None
    try:
        return PruneConfig.from_dict(saved.pruning)
    except LookupError as error:
        for part, module in (saved.modules or {}).items():
            if f" {part.partition(' ')[2]!r}" in str(error):
                where = "the script that saved it" if module == "__main__" else f"the module {module!r}"
                how = "register it" if module == "__main__" else f"import {module}"
                raise CheckpointError(
                    f"{path} is pruned by the {part}, which is registered in {where}: {how} before loading"
                ) from error
        raise


def _modules(config: PruneConfig) -> dict[str, str] | None:
    """Per part that is not this library's, such as "scorer mine", the module that registers it; None where there is none."""
    kinds = {"guide": guides, "scorer": scorers, "keep": keepers, "reducer": reducers}
    found = {
        f"{registry.kind} {part.name}": registry[part.name].__module__
        for kind, registry in kinds.items()
        for part in config.parts(kind)
    }
    own = {part: module for part, module in found.items() if module.partition(".")[0] != "vltprune"}
    return own or None


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


def _pruning_state(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """Tensors of guide and pruners: "pruning.guide.*" and "pruning.<tower>.<depth>.*"; keep_vars: the model's own objects."""
    record = find_pruning(model)
    if record is None:
        return {}
    modules = {tower: encoder.pruners for tower, encoder in record.towers.items()}
    modules |= {"guide": record.guide} if record.guide is not None else {}
    return {
        f"{_PRUNING}{name}.{plain_name(key)}": value
        for name, module in modules.items()
        for key, value in module.state_dict(keep_vars=keep_vars).items()
    }


def _wanted(model: nn.Module) -> dict[str, Tensor]:
    host = {_HOST + plain_name(key): value for key, value in dense_model(model).state_dict().items()}
    return host | _pruning_state(model)


def _own_keys(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """A state dict in our keys, and whether it is only the pruning's."""
    pruned = _pruning_state(model)
    if not state and find_pruning(model) is not None:
        return {}, True  # the pruning alone, of parts that have no tensors
    if convert.is_blip(state):
        dense, anchors = convert.from_blip(state, dense_model(model).state_dict())
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
    return _from_state_dict(state, model, pruned), False


def _from_state_dict(state: dict[str, Tensor], model: nn.Module, pruned: dict[str, Tensor]) -> dict[str, Tensor]:
    """In our keys, a state dict of the model or of its dense one; a dense one leaves the pruning as it was made."""
    while state and (wrapper := next((w for w in _WRAPPED if all(key.startswith(w) for key in state)), None)):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    ours = {id(value): key for key, value in _pruning_state(model, keep_vars=True).items()}
    named = unwrapped(model).state_dict(keep_vars=True) if ours else {}
    names = {plain_name(name): ours[id(value)] for name, value in named.items() if id(value) in ours}
    own = {names.get(plain_name(key), _HOST + plain_name(key)): value for key, value in state.items()}
    return own if own.keys() & pruned.keys() else own | pruned


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
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore", UserWarning)  # of pickles it may not read; we say so ourselves
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
