"""What a pruner is made of, as plain frozen data: parts by name and arguments, JSON both ways."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .registry import Registry, bind, guides, keepers, nearest, reducers, scorers

Depths = Sequence[int | float] | None

_KINDS: dict[str, tuple[Registry, tuple[str, ...]]] = {
    "guide": (guides, ("sites",)),
    "scorer": (scorers, ("site",)),
    "keep": (keepers, ("site",)),
    "reducer": (reducers, ("site",)),
}


@dataclass(frozen=True)
class Part:
    """A part by registered name and arguments: Part("ratio", {"ratio": 0.5}); short form "ratio(ratio=0.5)"."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", dict(self.args))  # our own: the caller may go on with theirs

    @classmethod
    def of(cls, spec: Part | str | Mapping[str, Any]) -> Part:
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
        return {"name": self.name, **self.args}

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        return f"{self.name}({arguments})" if arguments else self.name


@dataclass(frozen=True)
class PruneConfig:
    """The four parts of a pruner and the depths it stands at.

    scorer, keep, reducer, guide: Part or its short form; guide may be None. at: None, every block of every tower; a
    sequence of depths, counted from 0, or of fractions of the depth in [0, 1); or a mapping from tower name ("image",
    "text") to either, where towers it does not name are left alone.

    Wrong names and arguments fail here, with the nearest right one: LookupError, TypeError or ValueError.
    """

    scorer: Part | str
    keep: Part | str
    reducer: Part | str = "drop"
    guide: Part | str | None = None
    at: Depths | Mapping[str, Depths] = None

    def __post_init__(self) -> None:
        for kind, (registry, given) in _KINDS.items():
            spec = getattr(self, kind)
            if spec is None:
                if kind == "guide":
                    continue
                raise TypeError(f"{kind}=None: a pruner needs a {kind}, such as {kind}={registry.names()[0]!r}")
            part = Part.of(spec)
            bind(f"{registry.kind} {part.name!r}", registry[part.name], part.args, given)
            object.__setattr__(self, kind, part)
        object.__setattr__(self, "at", _frozen(self.at))
        self._check_guide()

    def _check_guide(self) -> None:
        if self.guide is not None:
            return
        for kind in ("scorer", "keep"):
            part = self.part(kind)
            if getattr(_KINDS[kind][0][part.name], "guided", False):
                raise ValueError(
                    f"{kind}={str(part)!r} reads the alignment guide, and guide=None: write guide='codebook', "
                    f"or choose another {kind}"
                )

    def part(self, kind: str) -> Part:
        """The Part of "scorer", "keep", "reducer" or "guide" (which must not be None)."""
        part = getattr(self, kind)
        assert isinstance(part, Part)
        return part

    def replace(self, **changes: Any) -> PruneConfig:
        """The same config with other parts: config.replace(keep="ratio(ratio=0.5)", guide=None)."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"PruneConfig has no part {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    def depths(self, tower: str, depths: int) -> tuple[int, ...]:
        """The block indices to prune in a tower of `depths` blocks. ValueError for depths that it does not have."""
        at = self.at
        if isinstance(at, Mapping):
            if tower not in at:
                return ()
            at = at[tower]
        if at is None:
            return tuple(range(depths))
        chosen = [int(d * depths) if isinstance(d, float) else d for d in at]
        wrong = [d for d in chosen if not 0 <= d < depths]
        if wrong:
            raise ValueError(f"at={list(at)}: the {tower} tower has depths 0 .. {depths - 1}, not {wrong[0]}")
        return tuple(sorted(set(chosen)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write."""
        parts = {kind: getattr(self, kind) and self.part(kind).to_dict() for kind in _KINDS}
        at = self.at
        if isinstance(at, Mapping):
            return {**parts, "at": {t: None if d is None else list(d) for t, d in at.items()}}
        return {**parts, "at": None if at is None else list(at)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruneConfig:
        """The inverse of `to_dict`. Unknown keys raise TypeError, missing parts too."""
        bind("a pruning config", cls, data)
        return cls(**data)


def _frozen(at: Any) -> Any:
    """Depths as tuples, also those of a mapping. TypeError or ValueError for anything that is not depths."""
    if isinstance(at, Mapping):
        return {tower: _frozen_depths(depths) for tower, depths in at.items()}
    return _frozen_depths(at)


def _frozen_depths(at: Any) -> tuple[int | float, ...] | None:
    if at is None:
        return None
    if not isinstance(at, Sequence) or isinstance(at, str):
        raise TypeError(f"at={at!r} must be a sequence of depths, such as at=(3, 6, 9), or a mapping from tower to one")
    for depth in at:
        if isinstance(depth, bool) or not isinstance(depth, (int, float)):
            raise TypeError(f"at={list(at)}: depths are numbers, {depth!r} is not")
        if isinstance(depth, float) and not 0 <= depth < 1:
            raise ValueError(f"at={list(at)}: a fraction of the depth lies in [0, 1); {depth} does not")
    return tuple(at)
