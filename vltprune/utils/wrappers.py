"""Model wrappers: torch.compile, data parallelism, sharding, averages of weights."""

from __future__ import annotations

from torch import nn

# libraries whose wrappers hold the model as `module`: DataParallel, DistributedDataParallel, FullyShardedDataParallel and
# AveragedModel of torch, DeepSpeedEngine, ModelEmaV2 and V3 of timm
_LIBRARIES = ("torch", "deepspeed", "accelerate", "timm")
_FSDP = "torch.distributed.fsdp."  # where the classes of sharded modules are
_COMPILED = "_orig_mod"  # what torch.compile calls the model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside its wrappers.

    Args:
        model: a model, or one inside any number of wrappers: torch.compile, DataParallel, DistributedDataParallel, FSDP,
            averages of weights.

    Returns:
        The innermost model; the model itself where nothing wraps it.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def plain_name(key: str) -> str:
    """The name of a tensor or module without what compiled submodules add to it."""
    return key.replace(f"{_COMPILED}.", "").removesuffix(f".{_COMPILED}")


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, 1 or 2, shards the weights of a module, and gathers them when it is called."""
    return type(module).__module__.startswith(_FSDP)


def _inner(model: nn.Module) -> nn.Module | None:
    children = getattr(model, "_modules", {})
    if _COMPILED in children:
        return children[_COMPILED]
    library = type(model).__module__.partition(".")[0]
    if library in _LIBRARIES and not type(model).__module__.startswith("timm.models"):
        name = "_fsdp_wrapped_module" if "_fsdp_wrapped_module" in children else "module"
        return children.get(name)
    return None
