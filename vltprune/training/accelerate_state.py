"""Accelerate's state of a process: the device, the processes and the mixed precision of one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import parse_flag_from_env

from ..utils.devices import check_device

# of a config's dtype: Accelerate's name
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}

_DEVICE = "ACCELERATE_TORCH_DEVICE"
_APART = "compress before that is made, or in a process of its own"


@contextmanager
def accelerate_state(dtype: str, device: str | torch.device | None = None) -> Iterator[PartialState]:
    """Sets up Accelerate in this process for one run, and clears its state after the run.

    Accelerate keeps one device and one mixed precision a process. A state that the caller had before is used, and stays.

    Args:
        dtype: type in which products are computed, of `MIXED_PRECISION`.
        device: where the run trains; None leaves it to Accelerate.

    Yields:
        Accelerate's state of this process: its device, and its place among the processes.

    Raises:
        ValueError: this machine lacks the device, or the processes or the caller's own state have another; or the device
            cannot train in the dtype.
    """
    if device is not None:
        _check_device(str(device))
    had_processes, had_precision = PartialState._shared_state != {}, is_initialized()
    try:
        state = _start(None if device is None else torch.device(device))
        _check_state(state, dtype, device)
        yield state
    finally:
        if not had_precision:
            AcceleratorState._reset_state(reset_partial_state=not had_processes)


def _check_device(device: str) -> None:
    try:
        check_device(device)
    except ValueError as error:
        raise ValueError(f"device={error}") from None
    kind, _, index = device.partition(":")
    if index and _is_launched():
        raise ValueError(
            f"device={device!r} is one device, and a launcher such as torchrun gives each process its own: write "
            f"device={kind!r}, and choose among devices with CUDA_VISIBLE_DEVICES"
        )


def _is_launched() -> bool:
    """Whether a launcher, such as torchrun, started this process as one of several."""
    return int(os.environ.get("LOCAL_RANK", -1)) != -1


def _start(device: torch.device | None) -> PartialState:
    """Accelerate's state of this process: the one that is there, or a new one on the device."""
    if device is None:
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    before = os.environ.pop(_DEVICE, None)
    # a launched process gets its device by its rank
    if not _is_launched():
        os.environ[_DEVICE] = device.type if device.type == "cpu" else str(device)
    try:
        return PartialState(cpu=device.type == "cpu")
    finally:
        os.environ.pop(_DEVICE, None)
        if before is not None:
            os.environ[_DEVICE] = before


def _check_state(state: PartialState, dtype: str, device: str | torch.device | None) -> None:
    there = state.device
    assert there is not None  # it is set by PartialState's constructor
    if device is not None:
        asked = torch.device(device)
        if asked.type != there.type or (asked.index is not None and asked.index != (there.index or 0)):
            raise ValueError(f"device={str(device)!r}: Accelerate runs on {there} in this process already: {_APART}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if _is_launched() and processes > 1 and state.num_processes == 1:
        raise ValueError(
            f"{processes} processes were launched, and without GPUs Accelerate runs each alone: write device='cpu'"
        )
    if dtype == "float16" and there.type == "cpu":
        raise ValueError("dtype='float16' trains on a GPU, and this run is on the CPU: write dtype='bfloat16'")
    if is_initialized() and AcceleratorState().mixed_precision != MIXED_PRECISION[dtype]:
        precision = AcceleratorState().mixed_precision
        raise ValueError(f"dtype={dtype!r}: this process has an Accelerator of mixed_precision={precision!r}: {_APART}")
