"""How parts print: each with its arguments, so that `print(model)` tells what a model was pruned by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ..registry import parameters


class PrintedPart(nn.Module):
    """A module that prints its arguments as they stand: as it was built, or as it was calibrated or trained since."""

    arguments: Mapping[str, Any] = MappingProxyType({})  # by `remember_arguments`

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={self._current(name, value)!r}" for name, value in self.arguments.items())

    def _current(self, name: str, built: Any) -> Any:
        """The value of an attribute of the argument's name, where it is of the argument's kind; else what was built with."""
        value = getattr(self, name, built)
        if isinstance(value, Tensor):
            return round(float(value.detach()), 6) if value.dim() == 0 and not value.is_meta else built
        return value if isinstance(value, (bool, int, float, str)) else built


def remember_arguments(part: nn.Module, maker: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Note what `maker` built a part with, besides where it stands: the given arguments, and the others at their defaults."""
    known = {one.name: one.default for one in parameters(maker)[1:] if one.default is not one.empty}
    vars(part)["arguments"] = {**known, **arguments}
