"""C++ kernels for CPUs: attention with statistics of its map, and the small steps of one pruning decision.

They are compiled on demand, by `build_kernels`. Without them the same is computed by plain torch, which every one of them is
tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import is_recorded

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_built: Any = None


def build_kernels(verbose: bool = False) -> None:
    """Compiles the library's C++ kernels for this machine's processor, and uses them from now on in this process.

    The first call on a machine takes about a minute; later ones load the result from the folder of
    `torch.utils.cpp_extension` (TORCH_EXTENSIONS_DIR). The kernels compute in float32 on CPUs, without gradients, what plain
    torch computes there, within rounding: attention with the statistics of its map at the price of attention alone, and
    rank, normalization, threshold, plan and sums of a pruned layer in a call each. They matter most where the batch or the
    model is small. Counters and profilers of torch's operations do not see what they compute.

    Args:
        verbose: whether the compiler's commands and messages are printed.

    Raises:
        RuntimeError: where there is no C++ compiler or no ninja, where the compiler fails, and where PyTorch has no BLAS that
            others can call.
    """
    global _built
    if _built is not None:
        return
    from torch.utils import cpp_extension

    try:
        _built = cpp_extension.load(
            "vltprune_native", [str(_SOURCE)], extra_cflags=_FLAGS, extra_ldflags=["-fopenmp"], verbose=verbose
        )
    except (RuntimeError, ImportError, OSError) as error:
        raise RuntimeError(
            f"could not compile the kernels of vltprune: {error}\nInstall a C++ compiler and ninja (apt install g++ "
            "ninja-build), call build_kernels(verbose=True) for its messages, or go on without them: plain torch computes the "
            "same"
        ) from error


@contextmanager
def paused() -> Iterator[None]:
    """A context in which plain torch computes, as if nothing were compiled; for comparisons."""
    global _built
    built, _built = _built, None
    try:
        yield
    finally:
        _built = built


def kernels(*tensors: Tensor) -> Any:
    """The compiled kernels, where they take these tensors.

    Args:
        *tensors: the floating-point operands.

    Returns:
        The module. None where nothing is built, where gradients are recorded or a graph is, and for tensors that are not plain,
        not in float32 or not on a CPU.
    """
    if _built is None or torch.is_grad_enabled() or is_recorded():
        return None
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return None
    return _built


def attention_kernel(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The compiled attention of packed tokens, where it takes these: queries, keys and values [total, heads, head_dim].

    Args:
        q: queries.
        k: keys.
        v: values.

    Returns:
        The function of the tensors, the lengths of the instances and the scale. None where `kernels` says so, and for
        tensors of other shapes or not stored head by head.
    """
    built = kernels(q, k, v)
    if built is None or q.shape != k.shape or q.shape != v.shape:
        return None
    return built.attend if q.stride(2) == k.stride(2) == v.stride(2) == 1 else None
