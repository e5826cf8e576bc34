"""Saving pruned models by transformers' own `save_pretrained`, with the pruning in a file more, and loading them.

In such a folder transformers finds the dense model, whose weights have their own names there; `vltprune.load` builds the
pruned one.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ...io.model_files import CONFIG, PRUNING_FILE, CheckpointError
from ...io.recipe import check_whole
from ...io.saved_pruning import config_to_save
from ...pruning.model import get_pruning
from ...utils.files import write_text

M = TypeVar("M", bound=nn.Module)


def with_pruning_saved(model: M) -> M:
    """Have a pruned model's `save_pretrained`, which `Trainer` and `push_to_hub` call too, also write the pruning."""
    object.__setattr__(model, "save_pretrained", partial(save_pretrained, model))
    return model


def save_pretrained(
    model: nn.Module, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **named: Any
) -> None:
    """Save as transformers' method, and the pruning as vltprune.json, for `vltprune.load`.

    Args:
        model: The pruned model or tower.
        save_directory: The folder to write.
        is_main_process: Whether this process writes.
        push_to_hub: Not supported: it would leave out vltprune.json.
        **named: Arguments of transformers' method.

    Raises:
        ValueError: For `push_to_hub=True`, for parts that were exchanged by hand, and for adapters of peft.
    """
    if push_to_hub:
        raise ValueError(
            "save_pretrained(push_to_hub=True) would leave out how the model is pruned: call model.push_to_hub('org/name') or "
            "vltprune.push_to_hub(model, 'org/name')"
        )
    check_whole(model)
    host: Any = get_pruning(model).host
    file = Path(save_directory) / PRUNING_FILE
    text = json.dumps(config_to_save(model, _constructor_arguments(host)).to_dict(), indent=2) + "\n"
    if is_main_process:
        # it would not belong to the weights, should writing these fail
        file.unlink(missing_ok=True)
    if isinstance(model, transformers.PreTrainedModel):
        writes: Any = partial(type(model).save_pretrained, model)
    else:
        writes = host.save_pretrained
        if named.get("state_dict") is None:
            named["state_dict"] = model.state_dict()
    writes(save_directory, is_main_process=is_main_process, **named)
    if is_main_process:
        write_text(file, text)


def _constructor_arguments(host: Any) -> dict[str, Any]:
    """Arguments of a tower's constructor that its configuration lacks: whether it has a pooler, and a mask token."""
    takes = inspect.signature(type(host).__init__).parameters
    found = {}
    if "add_pooling_layer" in takes:
        found["add_pooling_layer"] = host.pooler is not None
    if "use_mask_token" in takes:
        found["use_mask_token"] = host.embeddings.mask_token is not None
    return found


def dense_model(folder: Path, arguments: dict[str, Any]) -> tuple[nn.Module, set[str]]:
    """Load the dense model of a folder. Its class is one of transformers' own; code in the folder is not run.

    Args:
        folder: A folder that `save_pretrained` wrote.
        arguments: Further arguments of the constructor.

    Returns:
        The model, and the names of the tensors in the folder that it does not have.

    Raises:
        CheckpointError: For a class that transformers does not have, and for tensors that are missing or of another shape.
    """
    cls = _architecture(folder)
    try:
        with _without_reports():
            model, found = cls.from_pretrained(
                folder, **arguments, output_loading_info=True, use_safetensors=True, local_files_only=True
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold the weights of a {cls.__name__}: {error}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{folder} does not fit a {cls.__name__}, nothing was loaded: {len(missing)} missing: {', '.join(missing[:12])}"
        )
    return model, set(found["unexpected_keys"])


def _architecture(folder: Path) -> Any:
    """The class that config.json names. CheckpointError unless it is a model of transformers' own."""
    try:
        names = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model or cls.__module__.partition(".")[0] != "transformers":
        raise CheckpointError(
            f"{folder / CONFIG} names the architectures {names!r}: one model class of transformers {transformers.__version__} "
            "can be built from it, and nothing else"
        )
    return cls


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Suppress transformers' report that the dense model lacks the tensors of the pruning."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def fill_pruning(model: nn.Module, saved: set[str], folder: Path) -> None:
    """Load the tensors that pruning added to a model.

    Args:
        model: The pruned model.
        saved: Names of those tensors in the folder.
        folder: The folder.

    Raises:
        CheckpointError: For tensors that are missing, left over or of another shape.
    """
    dense = get_pruning(model).host.state_dict().keys()
    added = {key: value for key, value in model.state_dict().items() if key not in dense}
    mismatched = sorted(saved ^ added.keys())
    if mismatched:
        raise CheckpointError(
            f"{folder} does not fit this model, nothing was loaded. In the folder or in the model alone, of the tensors that "
            f"pruning adds: {', '.join(mismatched[:12])}"
        )
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else dict.fromkeys(added, SAFE_WEIGHTS_NAME)
    loaded = {}
    for file in sorted({files[key] for key in added}):
        with safe_open(folder / file, "pt") as tensors:
            loaded |= {key: tensors.get_tensor(key) for key in added if files[key] == file}
    wrong = [
        f"{key} (folder {list(loaded[key].shape)}, model {list(added[key].shape)})"
        for key in added
        if loaded[key].shape != added[key].shape
    ]
    if wrong:
        raise CheckpointError(f"{folder} does not fit this model: of another shape: {', '.join(wrong[:12])}")
    with torch.no_grad():
        for key, value in added.items():
            value.copy_(loaded[key])
