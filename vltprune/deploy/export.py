"""export: writes a model, dense or pruned, for ONNX Runtime, OpenVINO or torch.export, and checks the file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cost.inputs import Batch
from ..layers import AlignmentGuide
from ..layers.guides.query import current_query
from ..pruning.model import dense_model, is_pruned
from ..pruning.prune import composite_of
from ..utils.modes import evaluating
from ..utils.wrappers import unwrapped
from .engines import ENGINES, Engine, find_format
from .finish import check_unfinished
from .graph import Call, ExportError, Value, cannot_export, runs_adaptive, trace
from .sidecar import describe

_TOLERANCE = 1e-4
_CHUNKS = 4  # at most so many of the example's instances are checked one after the other
_WORDS = 3  # distinct integers, from which on they are token ids and not a mask


@dataclass(frozen=True)
class ExportedModel:
    """What `export` wrote. `print` shows a few lines.

    Attributes:
        file: the file to load.
        files: all files, with weights and the description as JSON.
        format: "onnx", "openvino" or "pt2".
        inputs: the inputs of the graph, in order.
        outputs: its outputs, in order.
        difference: the largest difference between the file's outputs and the model's, relative to the largest entry of the
            output where that is above one.
        batches: on how many inputs they were compared.
    """

    file: Path
    files: tuple[Path, ...]
    format: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    difference: float
    batches: int

    def __str__(self) -> str:
        lines = [f"wrote {', '.join(map(str, self.files))}"]
        lines += [f"{kind} {_shown(value)}" for kind in ("inputs", "outputs") for value in getattr(self, kind)]
        runtime = ENGINES[self.format].runtime
        return "\n".join(
            [*lines, f"{runtime} is within {self.difference:.1e} of the model on {self.batches} batches of inputs"]
        )


def export(
    model: nn.Module,
    path: str | Path,
    inputs: Batch,
    format: str | None = None,
    *,
    batch: int | None = None,
    method: str | None = None,
) -> ExportedModel:
    """Writes a model, dense or pruned, for another engine, and checks that the file computes what the model does.

    The file takes the batch of any size where every layer keeps a fixed number of tokens, and one instance at a time where
    counts are per instance. It is run on `inputs` and on others of the same shapes, and put in its place only where it agrees.
    A JSON file beside it says how images are preprocessed and what the classes are called.

    Args:
        model: a dense or pruned model on the CPU, in single precision, wrapped or not.
        path: the file to write: .onnx, .xml (OpenVINO) or .pt2 (torch.export). A former file is replaced.
        inputs: what the model will get, as an example: a tensor, a tuple of positional inputs or a mapping of named ones. All
            sizes but the batch are those of the example.
        format: "onnx", "openvino" or "pt2". None for that of the suffix.
        batch: the number of instances of a call. None for any number, or for one where counts are per instance.
        method: the name of the method to export, such as "encode_image". None for the model's call.

    Returns:
        What was written.

    Raises:
        ExportError: for a model that torch.export or the engine's exporter cannot take, and for a file that does not agree with
            the model to 1e-4.
        ValueError: for a vision-language model that is pruned or is to take any batch, for a format that does not fit the
            suffix, and for inputs or a batch that the model cannot be exported with.
        TypeError: for inputs that the model does not take, and for a model of `finish`.
        ImportError: for packages that are missing.
        OSError: where the file cannot be written.
    """
    path = Path(path)
    form = find_format(path, format)
    engine = ENGINES[form]
    engine.check_installed()
    model = unwrapped(model)
    check_unfinished(model, "export the model that it was made from; the engine lays out weights by itself")
    _check_model(model, batch)
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch} must be 1 or more: the number of instances of a call, or None for any")
    call = Call(model, inputs, method)
    with evaluating(model), torch.no_grad():
        size = _batch_size(call, batch)
        batches = _batches(call.tensors, size)
        wanted = [call.outputs(*one) for one in batches]
        example = batches[0] if size is not None else _repeated(call.tensors, max(2, len(call.tensors[0])))
        program = trace(call, example, any_batch=size is None)
        names = [*wanted[0]]
        with _folder_beside(path) as folder:
            file = Path(folder) / path.name
            try:
                engine.write(program, file, call.names, names)
                found = engine.run(file, [dict(zip(call.names, one, strict=True)) for one in batches])
            except OSError:
                raise
            except Exception as error:  # of any class, where an operator is missing or fails
                raise cannot_export(model, error, engine.runtime) from error
            difference = _difference(engine, found, wanted)
            taken, given = _values(call.names, batches), _values(names, [[*one.values()] for one in wanted])
            facts = describe(model, form, taken, given, difference)
            file.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            files = _move(Path(folder), path)
    return ExportedModel(path, files, form, taken, given, difference, len(batches))


def _check_model(model: nn.Module, batch: int | None) -> None:
    """ValueError for a model on a device or in half precision, and for one that needs or is given the text of a query.

    And for a vision-language model, unless it is dense and takes one instance.
    """
    composite = composite_of(model)
    alone = None if composite is None else composite.exported_alone(dense_model(model))
    if alone is not None and (batch != 1 or is_pruned(model)):
        ways = [
            f"vltprune.export(model.{place}, path, images), on the command line --tower {tower}"
            for tower, place in alone.items()
        ]
        raise ValueError(
            f"a {type(model).__name__} has a language model that writes text, which is exported dense and with batch=1 alone: "
            f"write {' or '.join(ways) or 'vltprune.export(tower, path, images) for the image tower of the dense model'}"
        )
    for weight in model.parameters():
        if weight.device.type != "cpu" or (weight.is_floating_point() and weight.dtype != torch.float32):
            kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
            raise ValueError(f"this model is {kind}: export it on the CPU in single precision, model.cpu().float()")
    guides = [module for module in model.modules() if isinstance(module, AlignmentGuide) and module.queried]
    if any(getattr(guide, "required", True) for guide in guides):
        raise ValueError(
            "this model's guide reads the text of vltprune.query, which an exported file could not be given: prune with "
            "another guide and scorer"
        )
    if guides and current_query() is not None:
        raise ValueError(
            "this model's guide reads the text of vltprune.query, which an exported file could not be given: export outside "
            "of `with vltprune.query(...)`; the file computes what the model does without a text"
        )


def _batch_size(call: Call, batch: int | None) -> int | None:
    """The number of instances of a call, None for any. ValueError for several, with counts of each one's own."""
    if not runs_adaptive(call):
        return batch
    if batch not in (None, 1):
        raise ValueError(
            f"batch={batch}: this model keeps a number of tokens of each instance's own, and is exported at batch 1; for "
            "larger batches fix its counts, vltprune.freeze(model, batches).model"
        )
    return 1


def _batches(tensors: Sequence[Tensor], size: int | None) -> list[list[Tensor]]:
    """The inputs to compare the file with the model on: the example, and others of the same shapes."""
    generator = torch.Generator().manual_seed(0)
    others = [_like(one, generator) for one in tensors]
    number = len(tensors[0])
    if size is None:
        return [[*tensors], _repeated(others, 1), _repeated(others, number + 1)]
    starts = range(0, min(number, _CHUNKS * size), size)
    chunks = [_repeated([one[start : start + size] for one in tensors], size) for start in starts]
    return [*chunks, _repeated(others, size), _repeated([one.flip(0) for one in others], size)]


def _repeated(tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    """So many instances of each tensor, from the first on and again where there are fewer."""
    index = torch.arange(size) % len(tensors[0])
    return [one[index] for one in tensors]


def _like(example: Tensor, generator: torch.Generator) -> Tensor:
    """Another input of the same shape: noise of equal mean and deviation, or the same words in another order.

    Of token ids the first and every largest and smallest one of a row stay, for they may begin, end or pad a text.
    """
    if example.is_floating_point():
        noise = torch.randn(example.shape, generator=generator)
        return noise * example.std(correction=0) + example.mean()
    if example.dim() != 2 or len(example.unique()) < _WORDS:
        return example
    changed = example.clone()
    for row in changed:
        inner = ((row != row.min()) & (row != row.max())).nonzero().squeeze(1)
        inner = inner[inner > 0]
        row[inner] = row[inner[torch.randperm(len(inner), generator=generator)]]
    return changed


def _difference(engine: Engine, found: Sequence[Sequence[Tensor]], wanted: Sequence[Mapping[str, Tensor]]) -> float:
    """The largest difference of a file's outputs from the model's. ExportError above the tolerance."""
    differences = [torch.zeros((), dtype=torch.float64)]
    for outputs, expected in zip(found, wanted, strict=True):
        for output, (name, one) in zip(outputs, expected.items(), strict=True):
            if output.shape != one.shape:
                raise ExportError(
                    f"{engine.runtime} returns {name} {list(output.shape)}, and the model {list(one.shape)}: nothing was "
                    "written"
                )
            if one.numel():
                scale = one.double().abs().max().clamp(min=1)
                differences.append((output.double() - one.double()).abs().max() / scale)
    largest = float(torch.stack(differences).max())  # nan where any is
    if not largest <= _TOLERANCE:
        raise ExportError(
            f"{engine.runtime} differs from the model by {largest:.1e}, and {_TOLERANCE:.0e} is allowed: nothing was written"
        )
    return largest


def _values(names: Sequence[str], batches: Sequence[Sequence[Tensor]]) -> tuple[Value, ...]:
    """Names, types and sizes of inputs or outputs; None for a size that is not the same in all batches."""
    values = []
    for name, *tensors in zip(names, *batches, strict=True):
        sizes = [set(column) for column in zip(*(one.shape for one in tensors), strict=True)]
        shape = tuple(one.pop() if len(one) == 1 else None for one in sizes)
        values.append(Value(name, str(tensors[0].dtype).removeprefix("torch."), shape))
    return tuple(values)


def _folder_beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the same disk as a file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".", dir=path.parent)


def _move(folder: Path, path: Path) -> tuple[Path, ...]:
    """Moves what was written to where it belongs, the file to load last; its path is first in the result."""
    written = sorted(folder.iterdir(), key=lambda one: one.name == path.name)
    for one in written:
        os.replace(one, path.parent / one.name)
    return tuple(path.parent / one.name for one in reversed(written))


def _shown(value: Value) -> str:
    """ "images: float32 [any, 3, 224, 224]"."""
    return f"{value.name}: {value.dtype} [{', '.join('any' if one is None else str(one) for one in value.shape)}]"
