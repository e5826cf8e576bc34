"""Files of tensors: reads .safetensors and .pth files, and prepares tensors to be written."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .model_files import WEIGHTS, CheckpointError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, on the CPU.

    Raises:
        CheckpointError: for a file that is missing, that is no state dict, or that would run code.
    """
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


def saved_temperature(path: Path) -> float | None:
    """The temperature that the MADTP reference stores in a .pth with its weights; None where there is none above 0."""
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # whatever is wrong with the file, loading it says so
        return None
    found = data.get("temperature") if isinstance(data, Mapping) else None
    return float(found) if isinstance(found, (int, float)) and found > 0 else None


def check_plain(state: Mapping[str, object]) -> None:
    """Check that no tensor is of a quantized layer, which `load` would build unquantized.

    Raises:
        TypeError: for such a tensor, which it names.
    """
    strange = [key for key, value in state.items() if type(value) not in (Tensor, nn.Parameter)]
    if strange:
        raise TypeError(
            f"cannot save this model: {strange[0]} is a {type(state[strange[0]]).__name__}, quantized, and not a plain tensor. "
            "Save the model before it is quantized, and quantize it again after loading"
        )


def storable(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copy tensors to the CPU, contiguous and none sharing memory with another, as safetensors needs them.

    Args:
        state: tensors by name.
        dtype: of the copies of floating-point tensors; None is that of each tensor.

    Returns:
        The copies by name.
    """
    return {
        key: value.detach()
        .to("cpu", dtype if dtype and value.is_floating_point() else value.dtype)
        .clone()
        .contiguous()
        for key, value in state.items()
    }
