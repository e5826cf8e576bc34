"""Invariant: a property that holds of every part of a kind on every batch; and the part that is held to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.statistics import Stat
from ..layers import BlockSpec
from ..registry import Registry
from .cases import DIM, HEADS, Case

CLOSE = {"rtol": 2e-5, "atol": 1e-6}  # sums in another order, single precision
Results = list[dict[str, Tensor]]  # what a part decides for each instance, by name


class Broken(AssertionError):
    """An invariant does not hold.

    Args:
        expected: what holds of every part.
        found: what this part did instead.
    """

    def __init__(self, expected: str, found: str):
        super().__init__(f"expected {expected}; found {found}")
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Invariant:
    """A property of every part of a kind.

    Attributes:
        name: what a report calls it.
        advice: what to change in a part that breaks it.
        check: raises Broken where it does not hold of a part on a batch.
        first: whether the other invariants mean nothing where this one is broken.
    """

    name: str
    advice: str
    check: Callable[[CheckedPart, Case], None]
    first: bool = False


def invariant(
    name: str, advice: str, first: bool = False
) -> Callable[[Callable[[CheckedPart, Case], None]], Invariant]:
    """Makes a function an Invariant, as a decorator.

    Args:
        name: what a report calls it.
        advice: what to change in a part that breaks it.
        first: whether the other invariants mean nothing where this one is broken.
    """
    return lambda check: Invariant(name, advice, check, first)


class Kind(ABC):
    """A kind of part: how it is called, and what its results are for each instance.

    Attributes:
        base: the base class of its parts.
        registry: where its parts are registered.
        passed: the argument that the library passes to a maker, "spec" or "specs".
        own: the invariants that no other kind has.
    """

    base: type[nn.Module]
    registry: Registry
    passed: str = "spec"
    own: tuple[Invariant, ...]

    @abstractmethod
    def call(self, part: Any, case: Case, everything: bool = False) -> Any:
        """Calls a part as a pruned layer does.

        Args:
            part: the part, built for the block of the case.
            case: the batch.
            everything: whether it gets statistics and guidance that it does not declare.

        Returns:
            What the part returns.
        """

    @abstractmethod
    def results(self, returned: Any, case: Case) -> Results:
        """What the part decides for each instance, so that instances can be compared.

        Args:
            returned: what `call` returned.
            case: the batch that it was called with.
        """

    @abstractmethod
    def loss(self, part: Any, case: Case) -> Tensor | None:
        """A scalar with gradients to every parameter that the part uses; None for parts whose results have no gradients.

        Args:
            part: the part, built for the block of the case.
            case: the batch.
        """

    def build(self, maker: Callable[..., Any], spec: BlockSpec, args: Mapping[str, Any]) -> Any:
        """Builds a part for a block.

        Args:
            maker: a class or function that makes it.
            spec: the block.
            args: the arguments besides the spec.
        """
        return maker(spec, **args)


class CheckedPart:
    """A maker and arguments that are held to the invariants of a kind.

    Args:
        kind: its kind.
        maker: a class or function that builds the part.
        args: the arguments besides the spec, by name.
        dtype: the floating-point dtype of its parameters and of contents.
    """

    def __init__(
        self, kind: Kind, maker: Callable[..., Any], args: Mapping[str, Any], dtype: torch.dtype = torch.float32
    ):
        self.kind, self.maker, self.args, self.dtype = kind, maker, args, dtype
        self._parts: dict[BlockSpec, Any] = {}
        self._casts: dict[torch.dtype, CheckedPart] = {dtype: self}
        self._returned: tuple[Case, Any] | None = None

    @property
    def needs_summary(self) -> bool:
        """Whether it is refused for towers without a summary token."""
        spec = BlockSpec("image", 0, 1, DIM, HEADS, has_summary=True)
        return bool(getattr(self.part(spec), "needs", Stat.NONE).of_summary)

    def part(self, spec: BlockSpec) -> Any:
        """The part for a block, in evaluation mode. It is built once, with the same parameters in every process."""
        if spec not in self._parts:
            self._parts[spec] = self.build(spec, self.args)
        return self._parts[spec]

    def build(self, spec: BlockSpec, args: Mapping[str, Any]) -> Any:
        """Builds another part of the same maker, in evaluation mode.

        Args:
            spec: the block.
            args: the arguments besides the spec.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return self.kind.build(self.maker, spec, args).to(self.dtype).eval()

    def call(self, case: Case) -> Any:
        """What the part returns for a batch. For the batch of the call before, it is not called again."""
        if self._returned is None or self._returned[0] is not case:
            self._returned = case, self.kind.call(self.part(case.spec), case.to(self.dtype))
        return self._returned[1]

    def results(self, case: Case) -> Results:
        """What the part decides for each instance of a batch."""
        return self.kind.results(self.call(case), case.to(self.dtype))

    def to(self, dtype: torch.dtype) -> CheckedPart:
        """The same part in another floating-point dtype."""
        if dtype not in self._casts:
            self._casts[dtype] = CheckedPart(self.kind, self.maker, self.args, dtype)
        return self._casts[dtype]


def expect(holds: object, expected: str, found: object) -> None:
    """Raises Broken unless a condition holds.

    Args:
        holds: the condition.
        expected: what holds of every part, in words.
        found: what the part did instead; a tensor is shortened.
    """
    if not holds:
        raise Broken(expected, shown(found))


def expect_same(expected: str, found: Results, wanted: Results) -> None:
    """Raises Broken where results differ by more than rounding, with the first values that do.

    Args:
        expected: what must be the same, in words.
        found: the results of each instance.
        wanted: what they must be.
    """
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for name, value in other.items():
            if not _same(one[name], value):
                raise Broken(f"{expected}: {name} {shown(value)} of instance {i}", shown(one[name]))


def shown(value: object) -> str:
    """A value in one short line."""
    if isinstance(value, Tensor):
        numbers = value.detach().flatten()[:8].tolist()
        text = ", ".join(f"{one:.6g}" if isinstance(one, float) else str(one) for one in numbers)
        more = ", ..." if value.numel() > 8 else ""
        return f"[{text}{more}]" if value.dim() == 1 else f"{list(value.shape)} of [{text}{more}]"
    return str(value)


def first_where(bad: Sequence[bool] | Tensor) -> int:
    """The index of the first true entry."""
    return [bool(one) for one in bad].index(True)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not other.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other.to(one.dtype), **CLOSE)
