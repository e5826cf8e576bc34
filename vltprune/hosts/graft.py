"""Copies of models that share every parameter with the original: with one child exchanged, or with modules of their own."""

from __future__ import annotations

import copy
import functools
import inspect
from types import MethodType
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

# what torch and transformers keep of a module that was compiled in place: calls of that very module
_COMPILED = ("_compiled_call_impl", "_compiled_call", "_last_compile_config")


def own_forward(module: nn.Module) -> Any:
    """The forward that was set on a module itself in place of its class'. None without one.

    Libraries that take their wrapper off again leave the class' forward there, bound: that is none.
    """
    forward = vars(module).get("forward")
    return None if forward is None or _is_of_class(forward, module) else forward


def check_forward(module: nn.Module) -> None:
    """Check that a module runs the forward of its class, which is what a host or a copy of the module runs.

    Args:
        module: The module.

    Raises:
        TypeError: For a forward that was set on the module itself, with what to write.
    """
    if own_forward(module) is None:
        return
    name = type(module).__name__
    if "_hf_hook" in vars(module):
        raise TypeError(
            f"this {name} has hooks of accelerate (device_map=, dispatch_model), which run the dense model: prune first, then "
            "dispatch. Write accelerate.hooks.remove_hook_from_module(model, recurse=True), prune, and give what `prune` "
            "returns to accelerate.dispatch_model"
        )
    raise TypeError(
        f"the forward of this {name} was replaced on the object itself, bound to it, and pruning runs its parts or a copy of "
        "it: write `del module.forward`, prune, and wrap or compile the pruned model as a whole"
    )


def with_submodule(model: M, name: str, new: nn.Module) -> M:
    """Copy a model with one child exchanged. The copy shares every other parameter; `model` stays as it is.

    Args:
        model: The model to copy.
        name: Name of a direct child.
        new: The child in its place.

    Returns:
        The copy.
    """
    out = shallow_copy(model)
    out._modules[name] = new
    return out


def with_descendant(model: M, name: str, new: nn.Module) -> M:
    """Copy a model with one descendant exchanged. The copy shares every other parameter; `model` stays as it is.

    Args:
        model: The model to copy.
        name: Dotted name of a descendant, which need not be there.
        new: The module in its place.

    Returns:
        The copy, in which the modules on the way to the descendant are copies too.
    """
    child, _, rest = name.partition(".")
    return with_submodule(model, child, with_descendant(model.get_submodule(child), rest, new) if rest else new)


def copy_modules(model: M) -> M:
    """Copy a model's modules, not its parameters: hooks on the copy do not act on `model`."""
    out = shallow_copy(model)
    for name, child in model._modules.items():
        out._modules[name] = child if child is None else copy_modules(child)
    return out


def shallow_copy(model: M) -> M:
    """Copy one module; it shares its parameters, buffers and children with the original. Hooks on the copy act on it alone.

    Parameters and buffers stay in the same tables: one that is replaced (`to`, `load_state_dict(assign=True)`) is replaced in
    both. What was compiled in place, `compile()`, is not compiled in the copy.

    Args:
        model: The module; it stays as it is.

    Returns:
        The copy. Hooks of accelerate are bound to it, and so is a method that was set on the module itself.

    Raises:
        TypeError: For another forward that was set on the module itself: it would run the original.
    """
    out: Any = copy.copy(model)
    shared = ("_parameters", "_buffers")
    out.__dict__ = {
        key: value.copy() if isinstance(value, dict) and key not in shared else value
        for key, value in model.__dict__.items()
        if key not in (*_COMPILED, "forward")
    }
    forward = own_forward(model)
    if forward is None:
        return out
    if isinstance(forward, MethodType) and forward.__self__ is model:
        # a function that takes the module, as libraries of kernels set it on norms
        vars(out)["forward"] = MethodType(forward.__func__, out)
        return out
    is_hook = isinstance(forward, functools.partial) and forward.args == (model,) and not forward.keywords
    if not (is_hook and _is_of_class(vars(model).get("_old_forward"), model)):
        check_forward(model)
    # as accelerate's `add_hook_to_module` does, which would also place the weights anew
    inner = out.forward
    vars(out).update(_old_forward=inner, forward=functools.update_wrapper(functools.partial(forward.func, out), inner))
    return out


def _is_of_class(forward: Any, module: nn.Module) -> bool:
    """Whether a bound method is the forward of a module's class, or what a decorator of that one wraps."""
    plain = getattr(forward, "__func__", None)
    of_class = inspect.unwrap(type(module).forward, stop=lambda function: function is plain)
    return getattr(forward, "__self__", None) is module and of_class is plain
