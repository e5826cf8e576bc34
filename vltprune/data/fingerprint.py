"""Fingerprints: digests of models, files and images, by which a stopped run is resumed only on the same inputs."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import Record
from .images import EncodedImage

_BLOCK = 1 << 22  # bytes read at a time
_END = 1 << 12  # bytes of a file's beginning and end, which of an image hold the header and the last data


def hash_model(model: nn.Module) -> str:
    """The digest of a model, dense or pruned: its class, arguments, pruning, and every tensor of its state."""
    pruning: Any = getattr(model, "pruning", None)
    described = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "recipe": repr(getattr(model if pruning is None else pruning.host, "recipe", None)),
        "pruning": None if pruning is None else pruning.config.to_dict(),
    }
    digest = _digest(json.dumps(described, sort_keys=True, default=repr).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        _add(digest, value)
    return digest.hexdigest()


def hash_file(path: str | Path | None) -> str | None:
    """The digest of a file's bytes, or of all files of a folder; None where the path does not exist."""
    if path is None or not Path(path).exists():
        return None
    files = [Path(path)] if Path(path).is_file() else sorted(one for one in Path(path).rglob("*") if one.is_file())
    digest = _digest()
    for file in files:
        digest.update(b"" if file == Path(path) else str(file.relative_to(path)).encode("utf-8", "surrogatepass"))
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def hash_images(record: Record) -> str | None:
    """The digest of a record's image files, read whole; None for generated pixels, which the data set's name determines."""
    digest = _digest()
    for image in record.images:
        if isinstance(image, np.ndarray):
            return None
        digest.update((_of_bytes(image.data) if isinstance(image, EncodedImage) else _of_path(image)).encode())
    return digest.hexdigest()


def hash_file_ends(paths: Iterable[Path]) -> str:
    """The digest of files by name, size, and first and last bytes, for more of them than one would read twice."""
    digest = _digest()
    for path in paths:
        digest.update(f"{path} ".encode("utf-8", "surrogatepass"))
        try:
            with path.open("rb") as opened:
                digest.update(opened.read(_END))
                size = opened.seek(0, io.SEEK_END)
                opened.seek(max(size - _END, 0))
                digest.update(f" {size} ".encode() + opened.read(_END))
        except (OSError, ValueError):
            digest.update(b"missing")
    return digest.hexdigest()


def _of_path(path: str | Path) -> str:
    try:
        return hash_file(path) or "missing"
    except (OSError, ValueError) as error:  # such a name, or such rights
        return type(error).__name__


def _of_bytes(data: bytes) -> str:
    return _digest(data).hexdigest()


def _digest(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


def _add(digest: hashlib.blake2b, value: Any) -> None:
    """Add a value of a state dict: type, shape and bytes of a tensor; anything else as torch saves it."""
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        return
    saved = io.BytesIO()
    torch.save(value, saved)
    digest.update(saved.getvalue())
