"""Part: a guide, scorer, keeper, selector or reducer by registered name and arguments, as frozen data that JSON can hold."""

from __future__ import annotations

import ast
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..registry import Registry, bind, guides, keepers, name_arguments, parameters, reducers, scorers, selectors
from ..utils.frozen import FrozenDict, frozen, thawed

# kind -> its registry, and the argument that the library itself passes
KINDS: dict[str, tuple[Registry, str]] = {
    "guide": (guides, "specs"),
    "scorer": (scorers, "spec"),
    "keep": (keepers, "spec"),
    "selector": (selectors, "spec"),
    "reducer": (reducers, "spec"),
}

# annotation of a maker's argument -> what values of it are, for a program and for a reader
_PLAIN: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"),
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "str": (str, "text"),
}


@dataclass(frozen=True)
class Part:
    """A part by registered name and arguments: Part("ratio", {"ratio": 0.5}), or "ratio(0.5)" in short.

    Args:
        name: the registered name.
        args: the arguments by name, of what JSON has a form for. They are copied and cannot be changed: lists, arrays and
            tensors are held as tuples, scalars of numpy and torch as numbers.

    Raises:
        TypeError: for values that JSON has no form for.
        ValueError: for numbers that are not finite.
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
    def from_spec(cls, spec: Part | str | Mapping[str, Any], kind: str | None = None) -> Part:
        """The Part that a spec says.

        Args:
            spec: a Part, its short form with literal values, "name", "name(value)" or "name(key=value, ...)", or a mapping
                {"name": ..., key: value}.
            kind: "guide", "scorer", "keep", "selector" or "reducer". With it the part must be registered and take these
                arguments, and arguments by position get their names from its signature.

        Returns:
            The Part.

        Raises:
            LookupError: for a name that is not registered as this kind.
            TypeError: for a spec of another type, and for arguments that the part does not take.
            ValueError: for text of another shape.
        """
        values: Sequence[object] = ()
        if isinstance(spec, Part):
            name, args = spec.name, spec.args
        elif isinstance(spec, Mapping):
            if "name" not in spec:
                raise ValueError(f"a part needs a 'name', got {dict(spec)}")
            name, args = spec["name"], {key: value for key, value in spec.items() if key != "name"}
        elif isinstance(spec, str):
            name, values, args = parse_short_form(spec, positional=kind is not None)
        else:
            raise TypeError(f"a part is 'name', 'name(key=value)' or a Part, not {type(spec).__name__}: {spec!r}")
        return cls(name, args) if kind is None else registered_part(kind, name, values, args)

    def replace(self, **args: object) -> Part:
        """The same part with other arguments."""
        return Part(self.name, {**self.args, **args})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write."""
        return {"name": self.name, **thawed(self.args)}

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        return f"{self.name}({arguments})" if arguments else self.name


def registered_part(kind: str, name: str, values: Sequence[object], args: Mapping[str, object]) -> Part:
    """The Part of a registered name, whose arguments are checked against the maker's signature.

    Args:
        kind: "guide", "scorer", "keep" or "reducer".
        name: the registered name.
        values: the arguments by position.
        args: the arguments by name.

    Returns:
        The Part, with all arguments by name.

    Raises:
        LookupError: for a name that is not registered as this kind.
        TypeError: for arguments that the maker does not take, and for values of another type than its signature has.
        ValueError: for numbers that are not finite.
    """
    registry, passed = KINDS[kind]
    what = f"{registry.kind} {name!r}"
    maker = registry[Part(name).name]
    part = Part(name, name_arguments(what, maker, values, args, (passed,)))
    bind(what, maker, part.args, (passed,))
    for parameter in parameters(maker):
        annotation = getattr(parameter.annotation, "__name__", parameter.annotation)
        if annotation not in _PLAIN or parameter.name not in part.args:
            continue
        plain, words = _PLAIN[annotation]
        value = part.args[parameter.name]
        if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
            raise TypeError(f"{what}: {parameter.name}={value!r} must be {words}")
    return part


def parse_short_form(text: str, positional: bool) -> tuple[str, tuple[object, ...], dict[str, object]]:
    """Parses the short form of a part, "name", "name(value)" or "name(key=value)".

    Args:
        text: the short form, with literal values.
        positional: whether it may have arguments by position.

    Returns:
        The name, the arguments by position and those by name.

    Raises:
        ValueError: for text of another form.
    """
    wrong = ValueError(f"cannot read the part {text!r}: write name or name(key=value, ...) with literal values")
    try:
        expression = ast.parse(text, mode="eval").body
        if isinstance(expression, ast.Name):
            return expression.id, (), {}
        if not isinstance(expression, ast.Call) or not isinstance(expression.func, ast.Name):
            raise wrong
        values = tuple(map(ast.literal_eval, expression.args))
        named = {k.arg: ast.literal_eval(k.value) for k in expression.keywords if k.arg is not None}
    except (SyntaxError, ValueError, TypeError):
        raise wrong from None
    # an argument that is given twice, **mapping, or positions that no signature can name
    if len(named) < len(expression.keywords) or (values and not positional):
        raise wrong
    return expression.func.id, values, named
