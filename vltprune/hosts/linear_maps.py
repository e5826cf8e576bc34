"""Linear maps of a model, plain, quantized or with adapters, and the MACs that they cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, where that is installed


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix [out_features, in_features] of its own.

    A module that holds another such one, as an adapter does, leaves the product to that.
    """
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) for size in sizes):
        return False
    _, *children = module.modules()
    return not any(map(is_linear_map, children))


def linear_macs(module: nn.Module) -> float:
    """MACs of all linear maps in a module, per token."""
    maps: list[Any] = list(filter(is_linear_map, module.modules()))
    return float(sum(linear.in_features * linear.out_features for linear in maps))


def measure_macs(run: Callable[..., object], *inputs: object) -> float:
    """MACs of run(*inputs), by torch's counter.

    The math backend of attention runs, because the counter counts fused kernels as nothing.

    Args:
        run: the function to count.
        *inputs: its arguments. The caller makes them, because the counter slows down each operation.

    Returns:
        The MACs, half of the counter's FLOPs.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports triton where that is installed

    counter = FlopCounterMode(display=False)
    # the counter fails on views made without gradients
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter, uncounted_macs(counter) as uncounted:
        run(*inputs)
    return counter.get_total_flops() / 2 + sum(uncounted)


@contextlib.contextmanager
def uncounted_macs(counter: FlopCounterMode) -> Iterator[list[int]]:
    """Within the `with` block, collect MACs of linear maps whose kernels a counter does not know, such as quantized ones.

    They count as an unquantized map of the same size.

    Args:
        counter: torch's counter, which is running.

    Yields:
        The MACs of each such call.
    """
    uncounted: list[int] = []
    before: list[int] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_linear_map(module):
            before.append(counter.get_total_flops())

    def leave(module: Any, args: tuple[Any, ...], out: Tensor) -> None:
        if is_linear_map(module) and counter.get_total_flops() == before.pop():
            uncounted.append(out.numel() * module.in_features)

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
    try:
        yield uncounted
    finally:
        for hook in hooks:
            hook.remove()
