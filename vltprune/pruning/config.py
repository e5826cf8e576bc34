"""PruneConfig: which parts prune which layers, as frozen data that JSON can hold."""

from __future__ import annotations

import ast
import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from ..registry import Registry, bind, guides, keepers, nearest, reducers, scorers
from ..utils.frozen import FrozenDict, frozen, thawed

Depths = Iterable[int | float] | int | float | None

# kind -> its registry, and the arguments that the library itself passes
KINDS: dict[str, tuple[Registry, tuple[str, ...]]] = {
    "guide": (guides, ("specs",)),
    "scorer": (scorers, ("spec",)),
    "keep": (keepers, ("spec",)),
    "reducer": (reducers, ("spec",)),
}


@dataclass(frozen=True)
class Part:
    """A part by registered name and arguments: Part("ratio", {"ratio": 0.5}); short form "ratio(ratio=0.5)".

    args: what JSON has a form for. They are copied and cannot be changed: lists, arrays and tensors are held as tuples,
    scalars of numpy and torch as numbers. Raises TypeError for other values, ValueError for numbers that are not finite.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"a part's name is text, such as 'ratio', not {self.name!r}")
        if not isinstance(self.args, Mapping):
            raise TypeError(f"{self.name}: args must be a dict of the part's arguments, not {self.args!r}")
        args = {key: frozen(value, f"{self.name}({key}=...)") for key, value in self.args.items()}
        object.__setattr__(self, "args", FrozenDict(args))

    @classmethod
    def from_spec(cls, spec: Part | str | Mapping[str, Any]) -> Part:
        """From a Part, from "name" or "name(key=value, ...)" with literal values, or from {"name": ..., key: value}.

        Raises ValueError for text of another shape, TypeError for another type.
        """
        if isinstance(spec, Part):
            return spec
        if isinstance(spec, Mapping):
            if "name" not in spec:
                raise ValueError(f"a part needs a 'name', got {dict(spec)}")
            return cls(spec["name"], {key: value for key, value in spec.items() if key != "name"})
        if not isinstance(spec, str):
            raise TypeError(f"a part is 'name', 'name(key=value)' or a Part, not {type(spec).__name__}: {spec!r}")
        return cls._parse(spec)

    @classmethod
    def _parse(cls, text: str) -> Part:
        wrong = ValueError(f"cannot read the part {text!r}: write name or name(key=value, ...) with literal values")
        try:
            expression = ast.parse(text, mode="eval").body
            if isinstance(expression, ast.Name):
                return cls(expression.id)
            if not isinstance(expression, ast.Call) or not isinstance(expression.func, ast.Name) or expression.args:
                raise wrong
            arguments = {k.arg: ast.literal_eval(k.value) for k in expression.keywords if k.arg is not None}
        except (SyntaxError, ValueError, TypeError):
            raise wrong from None
        if len(arguments) < len(expression.keywords):  # one given twice, or **mapping
            raise wrong
        return cls(expression.func.id, arguments)

    def replace(self, **args: Any) -> Part:
        """The same part with other arguments."""
        return Part(self.name, {**self.args, **args})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write."""
        return {"name": self.name, **thawed(self.args)}

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        return f"{self.name}({arguments})" if arguments else self.name


@dataclass(frozen=True)
class PruneConfig:
    """The four parts of a pruner and the depths it stands at.

    scorer, keep, reducer, guide: Part or its short form; guide may be None, and keep a mapping from tower name to a keeper,
    {"image": "ratio(ratio=0.5)", "text": "ratio(ratio=0.7)"}, which has one for every tower that is pruned. at: None,
    every block of every tower; depths, as one number or any collection of them (a list, range, set, array or tensor),
    counted from 0, from the end where they are negative (-1 is the last block), or fractions of the depth in [0, 1); or a
    mapping from tower name ("image", "text") to either, where towers it does not name are left alone. Empty depths prune
    nowhere.

    Configs are equal, and have the same hash, where their parts and depths are equal.

    Wrong names and arguments fail here, with the nearest right one: LookupError, TypeError or ValueError.
    """

    scorer: Part | str
    keep: Part | str | Mapping[str, Any]
    reducer: Part | str = "drop"
    guide: Part | str | None = None
    at: Depths | Mapping[str, Depths] = None

    def __post_init__(self) -> None:
        for kind, (registry, given) in KINDS.items():
            spec = getattr(self, kind)
            if spec is None:
                if kind == "guide":
                    continue
                raise TypeError(f"{kind}=None: a pruner needs a {kind}, such as {kind}={registry.names()[0]!r}")
            by_tower = kind == "keep" and isinstance(spec, Mapping) and "name" not in spec
            parts = (
                {tower: Part.from_spec(one) for tower, one in spec.items()} if by_tower else {"": Part.from_spec(spec)}
            )
            if not parts:
                raise ValueError(f"{kind}={{}}: name a {registry.kind} for each tower, such as {{'image': 'ratio'}}")
            for part in parts.values():
                bind(f"{registry.kind} {part.name!r}", registry[part.name], part.args, given)
            object.__setattr__(self, kind, FrozenDict(parts) if by_tower else parts[""])
        object.__setattr__(self, "at", _frozen_at(self.at))
        self._check_guide()

    def _check_guide(self) -> None:
        if self.guide is not None:
            return
        for kind in ("scorer", "keep"):
            for part in self.parts(kind):
                if getattr(KINDS[kind][0][part.name], "guided", False):
                    raise ValueError(
                        f"{kind}={str(part)!r} reads the alignment guide, and guide=None: write guide='codebook', "
                        f"or choose another {kind}"
                    )

    def part(self, kind: str, tower: str | None = None) -> Part:
        """The Part of "scorer", "keep", "reducer" or "guide" (which must not be None), as a tower has it.

        ValueError where the towers have keepers of their own, and none is asked for or this one has none.
        """
        part = getattr(self, kind)
        if isinstance(part, Mapping):
            if tower not in part:
                asked = (
                    f"say whose is meant, part({kind!r}, {next(iter(part))!r})"
                    if tower is None
                    else f"and the {tower} tower, which is pruned, has none: add it, or leave the tower out of at="
                )
                raise ValueError(f"{kind}= is given by tower, for {', '.join(part)}, {asked}")
            part = part[tower]
        assert isinstance(part, Part)
        return part

    def parts(self, kind: str) -> tuple[Part, ...]:
        """All Parts of a kind: one, none where there is no guide, or the keepers of the towers."""
        part = getattr(self, kind)
        return tuple(part.values()) if isinstance(part, Mapping) else () if part is None else (part,)

    def spelled(self, kind: str) -> str:
        """A kind's part, or "none", or the keepers of the towers, for people to read."""
        part = getattr(self, kind)
        if isinstance(part, Mapping):
            return ", ".join(f"{tower}: {one}" for tower, one in part.items())
        return str(part or "none")

    def replace(self, **changes: Any) -> PruneConfig:
        """The same config with other parts: config.replace(keep="ratio(ratio=0.5)", guide=None)."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"PruneConfig has no part {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    def depths(self, tower: str, depths: int) -> tuple[int, ...]:
        """The block indices to prune in a tower of `depths` blocks. ValueError for depths that it does not have."""
        at: Any = self.at
        if isinstance(at, Mapping):
            if tower not in at:
                return ()
            at = at[tower]
        if at is None:
            return tuple(range(depths))
        wrong = [d for d in at if not -depths <= d < depths]
        if wrong:
            raise ValueError(
                f"at={list(at)}: the {tower} tower has depths 0 .. {depths - 1}, or -{depths} .. -1 from the end, "
                f"not {wrong[0]}"
            )
        return tuple(sorted({_block(d, depths) for d in at}))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write."""
        parts = {kind: _plain(getattr(self, kind)) for kind in KINDS}
        return {**parts, "at": thawed(self.at)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruneConfig:
        """The inverse of `to_dict`. Unknown keys raise TypeError, missing parts too."""
        bind("a pruning config", cls, data)
        return cls(**data)


def _plain(part: Any) -> Any:
    """A Part, several by tower, or None, as plain data."""
    if isinstance(part, Mapping):
        return {tower: one.to_dict() for tower, one in part.items()}
    return None if part is None else part.to_dict()


def _block(depth: int | float, depths: int) -> int:
    """The block that a depth means in a tower of `depths` blocks."""
    if isinstance(depth, float):
        return math.floor(depth * depths + 1e-9)  # 15 / 26 * 26 rounds to below 15
    return depth % depths


def _frozen_at(at: Any) -> Any:
    """Depths as tuples of numbers, also those of a mapping. TypeError or ValueError for anything that is not depths."""
    if not isinstance(at, Mapping):
        return _frozen_depths(at)
    wrong = [tower for tower in at if not isinstance(tower, str)]
    if wrong:
        raise TypeError(f"at={dict(at)!r}: towers have names, such as 'image', {wrong[0]!r} is none")
    return FrozenDict({tower: _frozen_depths(depths) for tower, depths in at.items()})


def _frozen_depths(at: Any) -> tuple[int | float, ...] | None:
    """The depths as Python's numbers, each once."""
    if at is None:
        return None
    given = at.tolist() if hasattr(at, "tolist") else at  # arrays and scalars of numpy, tensors of torch
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        given = (given,)
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"at={at!r}: write depths, such as at=6 or at=(3, 6, 9), or a mapping from tower to depths")
    entries = list(given)
    depths = [_frozen_depth(depth, entries) for depth in entries]
    return tuple(dict.fromkeys(sorted(depths) if isinstance(given, Set) else depths))


def _frozen_depth(depth: Any, among: list[Any]) -> int | float:
    number = depth.tolist() if hasattr(depth, "tolist") else depth
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"at={among}: depths are numbers, {number!r} is not")
    if isinstance(number, numbers.Integral):
        return int(number)
    fraction = float(number)
    if not 0 <= fraction < 1:
        raise ValueError(f"at={among}: a fraction of the depth lies in [0, 1); {fraction} does not")
    return fraction
