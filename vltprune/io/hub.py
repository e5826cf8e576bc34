"""load, from_pretrained and push_to_hub: whole models from folders and from the Hugging Face hub, and uploads to the hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast

from torch import nn
from typing_extensions import Unpack

from ..models.factory import create_model
from ..pruning.config import Parts
from ..pruning.model import PrunedModel, find_pruning
from ..pruning.prune import prune_towers
from ..utils.wrappers import unwrapped
from .checkpoint import load_weights, save
from .model_files import CONFIG, IN_ARGUMENTS, PRUNING_FILE, WEIGHTS, CheckpointError, SavedConfig
from .saved_pruning import parse_pruning

_HUB = "hf-hub:"
_FILES = ["*.json", "*.safetensors"]  # ours, or those of transformers, which may split weights over several


def load(folder: str | Path, host: nn.Module | None = None, **overrides: Unpack[Parts]) -> PrunedModel:
    """Load a model that `save` wrote, or `save_pretrained` of a pruned transformers model, or timm's `save_for_hf`.

    Args:
        folder: the folder that it was saved to.
        host: the dense model to prune and fill, for one that `save` wrote and `create_model` did not build. Its own tensors
            are overwritten, and it is put into evaluation mode; where loading fails, it stays as it was.
        **overrides: parts of the pruning (scorer=, keep=, reducer=, guide=, at=), as in `create_model`.

    Returns:
        The model, in evaluation mode. A folder that holds a dense model gives that one: `is_pruned` tells them apart.

    Raises:
        CheckpointError: for a folder that is none, and for tensors that are missing, left over or of another shape. All are
            listed, and nothing is loaded.
        TypeError: for overrides of a dense model.
    """
    folder = Path(folder)
    if host is None and is_pretrained(folder):
        return _load_pretrained(folder, overrides)
    if host is None and (description := _of_timm(folder)) is not None:
        return _load_of_timm(folder, description, overrides)
    saved = SavedConfig.load(folder)
    if host is None:
        if saved.backbone is None:
            raise CheckpointError(f"{folder} does not say how to build its model: give load(..., host=the dense model)")
        if saved.contents == "pruning":
            raise CheckpointError(
                f"{folder} holds only the pruning of a {saved.backbone}: give load(..., host=that model)"
            )
        host = create_model(saved.backbone, pretrained=False, **saved.model_args)
    if saved.pruning is not None:
        config = parse_pruning(saved, folder)
        host = prune_towers(host, config.replace(**overrides) if overrides else config)
    elif overrides:
        raise TypeError(f"{', '.join(overrides)} given, but {folder} holds a dense model")
    load_weights(host, folder)
    return cast(PrunedModel, host.eval())


def is_pretrained(folder: Path) -> bool:
    """Whether transformers' `save_pretrained` wrote a folder, of a pruned model: `save` writes all into its config.json."""
    if not (folder / PRUNING_FILE).is_file():
        return False
    try:
        return "format" not in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True


def _load_pretrained(folder: Path, overrides: Parts) -> PrunedModel:
    try:
        from ..hosts.transformers import saving
    except ImportError as error:
        raise CheckpointError(f"{folder} holds a model of transformers, which cannot be imported: {error}") from error
    saved = SavedConfig.load(folder, PRUNING_FILE)
    config = parse_pruning(saved, folder)
    dense, extra = saving.dense_model(folder, saved.model_args)
    model = prune_towers(dense, config.replace(**overrides) if overrides else config)
    saving.fill_pruning(model, extra, folder)
    return model.eval()


def _of_timm(folder: Path) -> dict[str, Any] | None:
    """The config.json that timm's `save_for_hf` wrote, None where there is none."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and "architecture" in data and "format" not in data else None


def _load_of_timm(folder: Path, description: dict[str, Any], overrides: Parts) -> PrunedModel:
    """CheckpointError where timm did not write how the model is pruned, and where the weights do not fit."""
    name, arguments = description["architecture"], dict(description.get("model_args") or {})
    record = arguments.pop(IN_ARGUMENTS, None)
    if record is None:
        raise CheckpointError(
            f"{folder} holds a {name} of timm and does not say how it is pruned: read a dense one by "
            f"timm.create_model('local-dir:{folder}', pretrained=True). Save a pruned one by vltprune.save(model, folder)"
        )
    config = parse_pruning(SavedConfig.from_dict(record, folder / CONFIG), folder)
    facts = {key: _as_written(value) for key, value in (description.get("pretrained_cfg") or {}).items()}
    dense = create_model(name, pretrained=False, pretrained_cfg_overlay=facts, **arguments)
    model = prune_towers(dense, config.replace(**overrides) if overrides else config)
    weights = folder / WEIGHTS
    load_weights(model, weights if weights.is_file() else folder / "pytorch_model.bin")
    return model.eval()


def _as_written(value: object) -> object:
    """A tuple of timm's, which is a list in JSON."""
    return tuple(map(_as_written, value)) if isinstance(value, list) else value


def from_pretrained(
    name: str | Path, *, revision: str | None = None, cache_dir: str | None = None, **overrides: Unpack[Parts]
) -> PrunedModel:
    """Load a model from a local folder or from the Hugging Face hub.

    Args:
        name: a folder, or "hf-hub:org/name" (the prefix may be left out).
        revision: branch, tag or commit of the repository.
        cache_dir: of huggingface_hub; offline, what it holds is used.
        **overrides: parts of the pruning, as `load` takes them.

    Returns:
        The model, in evaluation mode, as `load` returns it.

    Raises:
        CheckpointError: as `load`, and for a repository that is neither on the hub nor cached.
    """
    text = str(name).removeprefix(_HUB)
    if Path(text).is_dir():
        return load(text, **overrides)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            text, revision=revision, cache_dir=cache_dir, allow_patterns=_FILES, library_name="vltprune"
        )
    except Exception as error:
        raise CheckpointError(
            f"cannot get {text!r} from the hub, and it is no local folder: {error}. Offline, download {CONFIG} and "
            f"{WEIGHTS} elsewhere and give the path of their folder"
        ) from error
    return load(folder, **overrides)


def push_to_hub(model: nn.Module, repo_id: str, *, private: bool = False, token: str | None = None, **how: Any) -> str:
    """Save a model and upload it to the Hugging Face hub.

    Args:
        model: a dense or pruned model.
        repo_id: "org/name"; is made where it does not exist.
        private: whether a new repository is private.
        token: of huggingface_hub; None is the one that is logged in.
        **how: arguments of `save`, or of `save_pretrained`, which writes a pruned model of transformers.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained = (
            getattr(unwrapped(model), "save_pretrained", None) if find_pruning(model) is not None else None
        )
        save_pretrained(folder, **how) if callable(save_pretrained) else save(model, folder, **how)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
