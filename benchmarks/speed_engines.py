"""Engines that run a model: PyTorch, finished or not, with compiled kernels or not; ONNX Runtime; OpenVINO; a training step."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from speed_rows import Inputs, Skipped
from torch import nn

import vltprune as vp
from vltprune.core.kernels import native
from vltprune.pruning.pruner import Pruner

Run = Callable[..., object]


def start(engine: str, model: nn.Module, inputs: Inputs, folder: Path, **options: bool) -> Run:
    """What runs a model in an engine.

    Args:
        engine: a key of ENGINES.
        model: the model.
        inputs: a batch, whose shapes a compiled engine is made for.
        folder: where files are written that the engine reads.
        **options: of the engines in EXPORTED: any_batch=True where batches of other sizes come too.

    Returns:
        A function of the inputs that runs the model once.

    Raises:
        Skipped: where the engine is not installed, or does not take the model.
    """
    return ENGINES[engine](model, inputs, folder, **options)


def _eager(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    run = torch.inference_mode()(model.__call__)

    def without_kernels(*given: torch.Tensor) -> object:
        with native.paused():
            return run(*given)

    return without_kernels


def _kernels(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    try:
        vp.build_kernels()
    except RuntimeError as error:
        raise Skipped(str(error)) from None
    return torch.inference_mode()(model.__call__)


def _finished_kernels(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    return _kernels(vp.finish(model), inputs, folder)


def _finished(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    return _eager(vp.finish(model), inputs, folder)


def _onnxruntime(model: nn.Module, inputs: Inputs, folder: Path, any_batch: bool = False) -> Run:
    _need("onnxruntime", "onnxscript")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # threads that wait for the next call would slow what takes turns with this one
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = _exported(model, inputs, folder, any_batch)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *given: session.run(None, {name: one.numpy() for name, one in zip(names, given, strict=True)})


def _openvino(model: nn.Module, inputs: Inputs, folder: Path, any_batch: bool = False) -> Run:
    _need("openvino", "onnxscript")
    import openvino

    options: dict[str, object] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    # by itself OpenVINO computes in bfloat16 where the processor can
    options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(_exported(model, inputs, folder, any_batch, "xml"), "CPU", options)
    request = compiled.create_infer_request()
    return lambda *given: request.infer([one.numpy() for one in given])


# standard deviations of the scores: where `compress` is in the middle of its soft half, from 0.5 down to 0.01
_SOFT_TEMPERATURE = 0.07


def _training(model: nn.Module, inputs: Inputs, folder: Path, soft: float = 0.0, recomputed: bool = False) -> Run:
    """Forward and backward of a mean square; tokens stay or go as in evaluation, or softly at a temperature."""
    model = copy.deepcopy(model).train().requires_grad_(True)
    pruners = [module for module in model.modules() if isinstance(module, Pruner)]
    for pruner in pruners:
        pruner.soft_temperature = soft
    if recomputed:
        recompute = getattr(model, "set_grad_checkpointing", None)
        if recompute is None:
            raise Skipped("this model cannot compute blocks again")
        recompute()

    def step(*given: torch.Tensor) -> torch.Tensor:
        out = model(*given)
        out.square().mean().backward()
        model.zero_grad()
        return out.detach()

    try:
        step(*inputs)
    except (RuntimeError, ValueError) as error:
        raise Skipped(str(error)) from None
    return step


ENGINES: dict[str, Callable[..., Run]] = {
    "eager": _eager,
    "finished": _finished,
    "kernels": _kernels,
    "finished-kernels": _finished_kernels,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "training": _training,
    "training-soft": partial(_training, soft=_SOFT_TEMPERATURE),
    "training-recomputed": partial(_training, recomputed=True),
}
EXPORTED = ("onnxruntime", "openvino")


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} is not installed")


def _exported(model: nn.Module, inputs: Inputs, folder: Path, any_batch: bool, suffix: str = "onnx") -> Path:
    """The model as a file for this batch, or for any, which the engine was found to compute as PyTorch does."""
    path = folder / f"{id(model)}{'-any' * any_batch}.{suffix}"
    if not path.exists():
        try:
            vp.export(model, path, inputs, batch=None if any_batch else len(inputs[0]))
        except (vp.ExportError, ValueError) as error:
            raise Skipped(str(error)) from None
    return path
