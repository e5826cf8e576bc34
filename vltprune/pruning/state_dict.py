"""State dicts of pruned towers: they have the dense tower's own names, and `pruners.*` and `guide.*`.

A `PrunedEncoder` holds the dense tower as its child `host`. Without these hooks every tensor of the tower would be called
`host.*`, and whatever reads the dense model's files would not find one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from torch import nn

HOST = "host"
_OWN = (HOST, "pruners", "guide")


def use_dense_names(encoder: nn.Module) -> None:
    """Registers hooks by which a pruned tower saves the dense tower's names, and loads them with or without "host."."""
    encoder.register_state_dict_post_hook(_remove_host)
    encoder.register_load_state_dict_pre_hook(_add_host)
    encoder.register_load_state_dict_post_hook(_report_dense_names)


def fqn_modifiers(encoder: nn.Module) -> dict[str, str]:
    """For torch.distributed.checkpoint: each of the host's names, mapped to the attribute of the encoder that has it.

    The attribute is "_dense", which is the host, and not "host". That would also rename the parameters in the optimizer's
    state, and these go by their place in the module tree.
    """
    host = encoder._modules.get(HOST)
    if host is None:
        return {}
    return {name: "_dense" for table in (host._modules, host._parameters, host._buffers) for name in table}


def _remove_host(encoder: nn.Module, state: MutableMapping[str, object], prefix: str, metadata: object) -> None:
    inner = f"{prefix}{HOST}."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _add_host(encoder: nn.Module, state: MutableMapping[str, object], prefix: str, *rest: object) -> None:
    if HOST not in encoder._modules:
        return
    own = tuple(f"{prefix}{name}." for name in _OWN)
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
        state[f"{prefix}{HOST}.{key.removeprefix(prefix)}"] = state.pop(key)


def _report_dense_names(encoder: nn.Module, incompatible: Iterable[list[str]]) -> None:
    """Keys that are missing or unexpected, in the names that a caller knows."""
    for keys in incompatible:
        keys[:] = [".".join(part for part in key.split(".") if part != HOST) for key in keys]
