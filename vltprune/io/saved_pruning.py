"""The pruning in a saved model's config.json: written from a model, parsed, and compared with another model's."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from ..pruning.config import PruneConfig
from ..pruning.current_config import current_config
from ..pruning.encoder import Pruning
from ..pruning.model import find_pruning
from ..pruning.part import KINDS
from .model_files import CONFIG, CheckpointError, SavedConfig
from .recipe import check_shared


def config_to_save(model: nn.Module, arguments: dict[str, object]) -> SavedConfig:
    """Build the config.json of a model, without the name of its backbone.

    Knobs are written with the values that they have now.

    Args:
        model: a dense or pruned model.
        arguments: what `create_model` builds the dense model from.

    Returns:
        The config; of a dense model, one without a pruning.

    Raises:
        ValueError: for a pruned model that no longer shares a part with its dense one, and for pruners with parts that were
            exchanged.
    """
    record = find_pruning(model)
    if record is None:
        return SavedConfig(None, arguments, None)
    check_shared(model, record.host, record.towers)
    config = current_config(record.config, record.towers)
    return SavedConfig(None, arguments, config.to_dict(), modules=_modules(config))


def load_pruning(path: Path) -> PruneConfig | None:
    """The pruning that a folder of ours was saved with; None for a dense model and for single files."""
    if not path.is_dir():
        return None
    saved = SavedConfig.load(path)
    return None if saved.pruning is None else parse_pruning(saved, path)


def parse_pruning(saved: SavedConfig, path: Path) -> PruneConfig:
    """Build the PruneConfig of a saved pruned model.

    Args:
        saved: its config.json, with a pruning in it.
        path: its folder, for the message.

    Returns:
        The PruneConfig.

    Raises:
        CheckpointError: for a part of another package that is not registered, with what to import.
        LookupError: for another part that does not exist.
    """
    assert saved.pruning is not None
    try:
        return PruneConfig.from_dict(saved.pruning)
    except LookupError as error:
        for part, module in (saved.modules or {}).items():
            if f" {part.partition(' ')[2]!r}" in str(error):
                where = "the script that saved it" if module == "__main__" else f"the module {module!r}"
                how = "register it" if module == "__main__" else f"import {module}"
                command = "" if module == "__main__" else f", or give a command --import {module}"
                raise CheckpointError(
                    f"{path} is pruned by the {part}, which is registered in {where}: {how} before loading{command}"
                ) from error
        raise LookupError(
            f"{path}: {error}. Import the module that registers it before loading, or give a command --import MODULE"
        ) from error


def check_same_pruning(record: Pruning, path: Path) -> None:
    """Check that a folder was saved with the parts, depths and values of knobs that a model has.

    Args:
        record: how the model is pruned.
        path: the folder; one of another library, or of a dense model, passes.

    Raises:
        CheckpointError: for another pruning; with both.
    """
    if "format" not in json.loads((path / CONFIG).read_text(encoding="utf-8")):
        return  # of another library
    saved = load_pruning(path)
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


def _modules(config: PruneConfig) -> dict[str, str] | None:
    """Per part that is not this library's, such as "scorer mine", the module that registers it; None where there is none."""
    found = {
        f"{registry.kind} {part.name}": registry[part.name].__module__
        for kind, (registry, _) in KINDS.items()
        for part in config.parts(kind)
    }
    foreign = {part: module for part, module in found.items() if module.partition(".")[0] != "vltprune"}
    return foreign or None
