"""State dicts of saved models: "host." before the dense model's keys, "pruning." before those of guide and pruners."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import convert
from ..pruning.model import dense_model, find_pruning
from ..utils.wrappers import plain_name, unwrapped
from .model_files import CheckpointError

HOST, PRUNING = "host.", "pruning."
_MAPS = f"{PRUNING}guide.maps."
_WRAPPERS = ("module.", "_orig_mod.")  # what wrappers put before each name of a state dict


def pruning_state(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """Tensors of a model's guide and pruners: "pruning.guide.*" and "pruning.<tower>.<depth>.*"; none of a dense model.

    Args:
        model: a dense or pruned model.
        keep_vars: whether to return the model's own parameters, as in `torch.nn.Module.state_dict`.

    Returns:
        The tensors by key.
    """
    record = find_pruning(model)
    if record is None:
        return {}
    modules = {tower: encoder.pruners for tower, encoder in record.towers.items()}
    modules |= {"guide": record.guide} if record.guide is not None else {}
    return {
        f"{PRUNING}{name}.{plain_name(key)}": value
        for name, module in modules.items()
        for key, value in module.state_dict(keep_vars=keep_vars).items()
    }


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model: those of the dense one, "host.*", and those of its guide and pruners."""
    host = {HOST + plain_name(key): value for key, value in dense_model(model).state_dict().items()}
    return host | pruning_state(model)


def to_own_keys(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """Rename a state dict's keys to those of this library.

    Tensors of the pruning that a file of a dense model lacks are taken from the model.

    Args:
        state: of this library, of BLIP (Salesforce's, MADTP's, transformers'), or of a training script; its keys tell.
        model: the model that it is to be loaded into.

    Returns:
        The tensors by key, and whether the file holds the pruning alone.
    """
    pruned = pruning_state(model)
    if not state and find_pruning(model) is not None:
        return {}, True  # the pruning alone, of parts that have no tensors
    if convert.is_blip(state):
        dense, anchors = convert.from_blip(state, dense_model(model).state_dict())
        own = {HOST + key: value for key, value in dense.items()}
        if anchors is not None and pruned:
            own[f"{PRUNING}guide.anchors"] = anchors
            own |= {key: value for key, value in pruned.items() if key not in own and key.endswith(".birth")}
        elif anchors is None:
            own |= pruned  # a dense checkpoint says nothing of the pruning: it stays as it was made
        return own, False
    if any(key.startswith((HOST, PRUNING)) for key in state):
        if not pruned:
            state = {key: value for key, value in state.items() if not key.startswith(PRUNING)}
        elif not any(key.startswith(PRUNING) for key in state):
            state = state | pruned
        return state, not any(key.startswith(HOST) for key in state)
    return _from_state_dict(state, model, pruned), False


def _from_state_dict(state: dict[str, Tensor], model: nn.Module, pruned: dict[str, Tensor]) -> dict[str, Tensor]:
    """In our keys, a state dict of the model or of its dense one; a dense one leaves the pruning as it was made."""
    while state and (wrapper := next((w for w in _WRAPPERS if all(key.startswith(w) for key in state)), None)):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    ours = {id(value): key for key, value in pruning_state(model, keep_vars=True).items()}
    named = unwrapped(model).state_dict(keep_vars=True) if ours else {}
    names = {plain_name(name): ours[id(value)] for name, value in named.items() if id(value) in ours}
    own = {names.get(plain_name(key), HOST + plain_name(key)): value for key, value in state.items()}
    return own if own.keys() & pruned.keys() else own | pruned


def identity_maps(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear maps for the anchors of a file that has none, as the MADTP reference: the identity, which changes no token.

    Args:
        state: the file's tensors under this library's keys.
        wanted: the model's tensors.

    Returns:
        The maps by key; none where the file has maps or no anchors, or where a map is not square.
    """
    maps = {key: value for key, value in wanted.items() if key.startswith(_MAPS)}
    weights = [value for value in maps.values() if value.ndim == 2]
    lacking = f"{PRUNING}guide.anchors" in state and not any(key.startswith(_MAPS) for key in state)
    if not lacking or any(rows != columns for rows, columns in (weight.shape for weight in weights)):
        return {}
    return {key: torch.eye(len(value)) if value.ndim == 2 else torch.zeros(len(value)) for key, value in maps.items()}


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> None:
    """Check that a file's tensors are those of a model, by key and shape.

    Args:
        state: the file's tensors.
        wanted: the tensors to be loaded.
        file: the file, for the message.

    Raises:
        CheckpointError: for tensors that are missing, left over or of another shape; with their keys.
    """
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
