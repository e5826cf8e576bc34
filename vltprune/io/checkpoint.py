"""Checkpoints: a model as config.json and model.safetensors in a folder. Loading is all or nothing."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..pruning.model import find_pruning
from ..utils.files import Write, replace_together
from ..utils.wrappers import plain_name, unwrapped
from .model_files import BACKUP, CONFIG, DIGEST, WEIGHTS, CheckpointError, SavedConfig, find_weights, finish_interrupted
from .recipe import Recipe, check_whole, recipe_of
from .saved_pruning import check_same_pruning, config_to_save
from .state import HOST, PRUNING, check_fit, identity_maps, model_state, pruning_state, to_own_keys
from .tensor_files import check_plain, read_tensors, storable

__all__ = ["CONFIG", "WEIGHTS", "CheckpointError", "Recipe", "UnknownHostWarning", "load_into", "load_weights", "save"]


class UnknownHostWarning(UserWarning):
    """A model was saved that `create_model` did not build, so that `load` needs its dense model as host=."""


def save(
    model: nn.Module, folder: str | Path, only: Literal["pruning"] | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write a model, dense or pruned, as config.json and model.safetensors in a folder.

    Both files are written or none: after any failure, an earlier save in the folder is there as it was. What was exchanged in
    the model after it was built is saved too, where it is an argument of the model.

    Args:
        model: a dense or pruned model. `load` builds it again where `create_model` built the dense one; for another, such as a
            class of your own, an `UnknownHostWarning` says how to load it.
        folder: is made where it does not exist.
        only: "pruning" leaves the dense weights out: a small file, for load(folder, host=dense).
        dtype: of the floating-point tensors on disk; None is that of each tensor.

    Returns:
        The folder.

    Raises:
        ValueError: for a change of the model that is no argument of it, and for only="pruning" of a dense model. Also for
            weights that FSDP shards, and for adapters of peft.
        TypeError: for a quantized model, and for arguments of the model that JSON cannot hold.
        OSError: where the folder cannot be written.
    """
    check_whole(model, adapters=only is None)
    folder, model = Path(folder), unwrapped(model)
    record = find_pruning(model)
    if only == "pruning" and record is None:
        raise ValueError("only='pruning' needs a pruned model: this one is dense")
    host = model if record is None else record.host
    state = dict(pruning_state(model))
    if only is None:
        state |= {HOST + plain_name(key): value for key, value in host.state_dict().items()}
    check_plain(state if only else {**state, **model.state_dict()})

    recipe = recipe_of(host)
    saved = replace(config_to_save(model, recipe.model_args), backbone=recipe.backbone or None, contents=only or "all")
    saved.check()
    _write(folder, saved.signed(), storable(state, dtype))
    if saved.backbone is None and only is None:
        _warn_of_unknown_host(model, host, folder)
    return folder


def _warn_of_unknown_host(model: nn.Module, host: nn.Module, folder: Path) -> None:
    own = (
        " Or write model.save_pretrained(folder), from which load builds it."
        if hasattr(model, "save_pretrained")
        else ""
    )
    warnings.warn(
        f"saved, but create_model did not build this {type(host).__name__}, so that load cannot build it again: load it by "
        f"vltprune.load({str(folder)!r}, host=model), with a dense model of the same architecture.{own}",
        UnknownHostWarning,
        stacklevel=3,
    )


def _write(folder: Path, saved: SavedConfig, state: dict[str, Tensor]) -> None:
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
    """Load weights into a model, dense or pruned, from a folder of `save` or a single file.

    Args:
        model: its tensors are overwritten; where loading fails, it stays as it was.
        path: a folder that `save` wrote, or a .safetensors or .pth file: of this library, of BLIP as Salesforce, MADTP or
            transformers write it, or what a training script wrote of `model.state_dict()`. Its keys tell which.

    Raises:
        CheckpointError: as `load`, and for a folder that was saved with another pruning than this model has.
    """
    path, record = Path(path), find_pruning(model)
    if record is not None and (path / CONFIG).is_file():
        check_same_pruning(record, path)
    load_weights(model, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights as `load_into`, whatever pruning the folder was saved with.

    Args:
        model: its tensors are overwritten; where loading fails, it stays as it was.
        path: a folder or a single file.

    Raises:
        CheckpointError: for a file that is missing or cannot be read, and for tensors that do not fit. All are listed.
    """
    file = find_weights(path) if path.is_dir() else path
    state, partial = to_own_keys(read_tensors(file), model)
    wanted = model_state(model)
    state = identity_maps(state, wanted) | state
    if partial:
        wanted = {key: value for key, value in wanted.items() if key.startswith(PRUNING)}
    check_fit(state, wanted, file)
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(state[key])
