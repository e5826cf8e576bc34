"""Devices of this machine: which there are, and whether torch can use one."""

from __future__ import annotations

import torch


def devices() -> list[str]:
    """The devices that torch can use here, such as ["cpu", "cuda:0"]."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def check_device(device: str) -> None:
    """Checks that torch can use a device here. ValueError, with the devices that there are, otherwise."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError, ImportError):
        usable = False
    else:
        usable = torch.device(device).type != "meta"  # which computes nothing
    if not usable:
        raise ValueError(f"{device!r} is no device of this machine: it has {', '.join(devices())}")
