"""The two files of a saved model: SavedConfig, the contents of config.json, and the check that the weights belong to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from ..registry import bind

_FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PRUNING_FILE = "vltprune.json"  # how a model is pruned, in a folder that another library wrote
IN_ARGUMENTS = "vltprune"  # how a model is pruned, among the arguments that timm writes for a model
BACKUP = f".old.{WEIGHTS}"  # the weights before, while both files are replaced
DIGEST = "config"  # where the weights say which config they were saved with


class CheckpointError(ValueError):
    """A file that cannot be read, or whose tensors do not fit the model. Nothing of it was loaded."""


@dataclass(frozen=True)
class SavedConfig:
    """The contents of config.json, or of vltprune.json in a folder that another library wrote.

    Attributes:
        backbone: the dense model's name in `create_model`; None for a model that it did not build.
        model_args: arguments of `create_model` besides.
        pruning: the PruneConfig as plain data; None for a dense model.
        contents: which tensors the file of weights has.
        format: version of this file.
        digest: of all other fields; the file of weights repeats it.
        modules: per part of another package, such as "scorer mine", the module that registers it.
    """

    backbone: str | None
    model_args: dict[str, Any]
    pruning: dict[str, Any] | None
    contents: Literal["all", "pruning"] = "all"
    format: int = _FORMAT
    digest: str | None = None
    modules: dict[str, str] | None = None

    @classmethod
    def load(cls, folder: Path, name: str = CONFIG) -> SavedConfig:
        """Load the config of a folder.

        Args:
            folder: the folder of a saved model.
            name: the config's file there; `PRUNING_FILE` in a folder that another library wrote.

        Returns:
            The config.

        Raises:
            CheckpointError: for a file that is missing, is not JSON, or is of another format.
            TypeError: for fields that are missing, or that this version does not have.
        """
        file = folder / name
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no {name}: {_instead(folder)}") from None
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from None
        return cls.from_dict(data, file)

    @classmethod
    def from_dict(cls, data: object, file: Path) -> SavedConfig:
        """Build the config from a file's parsed JSON.

        Args:
            data: the parsed JSON.
            file: where it is from, for the messages.

        Returns:
            The config.

        Raises:
            CheckpointError: for another format.
            TypeError: for fields that are missing, or that this version does not have.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise CheckpointError(f"{file} has format {found!r}, this version reads {_FORMAT}")
        bind(f"{file}", cls, data)
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write."""
        return asdict(self)

    def signed(self) -> SavedConfig:
        """This config with its digest, which the file of weights repeats, so that both are known to belong together."""
        plain = json.dumps(replace(self, digest=None).to_dict(), sort_keys=True)
        return replace(self, digest=hashlib.sha256(plain.encode()).hexdigest()[:16])

    def check(self) -> None:
        """Check that JSON can hold the config.

        Raises:
            TypeError: for an argument of the model or of a part that it cannot hold, by name.
        """
        for name, value in self.model_args.items():
            if not _is_plain(value):
                raise TypeError(
                    f"cannot save this {self.backbone}: its model argument {name}={value!r} has no JSON form, so that it "
                    "could not be built again. Nothing was written. Give create_model a string, number, list or dict of "
                    "these (timm takes act_layer='relu'), or keep model.state_dict() by torch.save"
                )
        for kind, part in (self.pruning or {}).items():
            if not _is_plain(part):
                raise TypeError(
                    f"cannot save this model: {kind}={part!r} of its pruning has no JSON form. Nothing was written. Give parts "
                    "arguments that are strings, numbers, lists or dicts of these"
                )


def _instead(folder: Path) -> str:
    """What to write for a folder that does not say how its model is pruned, such as one of a Trainer or of open_clip."""
    weights = sorted(file.name for file in folder.glob("*") if file.name.endswith(("model.safetensors", "model.bin")))
    if not weights:
        return "give a folder that vltprune.save wrote"
    return (
        f"it has weights, {weights[0]}, and does not say how their model is built and pruned. Prune its dense model as before, "
        f"and fill it by vltprune.io.checkpoint.load_into(pruned, {str(folder / weights[0])!r}); vltprune.save(pruned, folder) "
        "writes what vltprune.load reads"
    )


def find_weights(folder: Path) -> Path:
    """The file of weights that belongs to a folder's config: the backup where a save was killed between its two files.

    Raises:
        CheckpointError: for weights of another save.
    """
    file, backup = folder / WEIGHTS, folder / BACKUP
    wanted = _digest(folder)
    found = _label(file)
    if wanted is None or found == wanted or (found is None and file.is_file()):
        return file
    if _label(backup) == wanted:
        return backup
    if found is None:
        return file  # which is not there: reading it says so
    raise CheckpointError(
        f"{folder}: {CONFIG} and {WEIGHTS} are of two different saves, and do not belong together: save the model again"
    )


def finish_interrupted(folder: Path) -> None:
    """Put back the weights that a killed save moved away, where the config is still theirs."""
    with contextlib.suppress(CheckpointError):
        if find_weights(folder) == folder / BACKUP:
            os.replace(folder / BACKUP, folder / WEIGHTS)


def _digest(folder: Path) -> str | None:
    """What the config says of itself; None in files from before it did."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("digest") if isinstance(data, dict) else None


def _label(file: Path) -> str | None:
    """The digest of the config that weights were saved with; None where they do not say it, or are not readable."""
    try:
        with safe_open(file, "pt") as tensors:
            return (tensors.metadata() or {}).get(DIGEST)
    except (OSError, SafetensorError):
        return None


def _is_plain(value: object) -> bool:
    """Whether JSON holds a value (a tuple as a list)."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
