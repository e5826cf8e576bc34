"""PrintedPart: base class of all parts; printing one shows its current arguments."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from ..registry import parameters


class PrintedPart(nn.Module):
    """A module that prints its arguments: as it was built, or as it was calibrated or trained since.

    Attributes:
        arguments: what the part was built with, besides the spec, by the names of its constructor.
    """

    arguments: Mapping[str, Any]

    def __new__(cls, *values: Any, **named: Any) -> Self:
        part = super().__new__(cls)
        takes = [one for one in parameters(cls) if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        given = dict(zip((one.name for one in takes), values, strict=False)) | named
        arguments = {one.name: given.get(one.name, one.default) for one in takes[1:]}
        # a copy is made without arguments, and gets those of the original afterwards
        vars(part)["arguments"] = {name: value for name, value in arguments.items() if value is not Parameter.empty}
        return part

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={self._current(name, value)!r}" for name, value in self.arguments.items())

    def _current(self, name: str, built: Any) -> Any:
        """The value of an attribute of the argument's name, where it is of the argument's kind; else what was built with."""
        value = getattr(self, name, built)
        if isinstance(value, Tensor):
            return round(float(value.detach()), 6) if value.dim() == 0 and not value.is_meta else built
        return value if isinstance(value, (bool, int, float, str)) else built
