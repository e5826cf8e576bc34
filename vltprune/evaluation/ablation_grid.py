"""Grid of an ablation: lists of presets, parts, reductions and seeds, whose cross product is the cells to compare."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..cost.budget_control import keepers_with_knob
from ..pruning.config import PruneConfig
from ..pruning.depths import freeze_depths
from ..pruning.part import KINDS, Part
from ..pruning.presets import preset as preset_config
from ..pruning.stage import PRUNER_KINDS, check_modality, check_place
from ..registry import nearest, parameters, presets
from ..utils.frozen import FrozenDict, thawed

PARTS = (*KINDS, "at", "place", "modality")
FIELDS = ("preset", *PARTS, "reduction", "seed")
_EXAMPLE = "preset=attention,evit; reduction=0.3,0.5"
_OPENING, _CLOSING = "([{", ")]}"
# a quoted text, or one character
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """One way to prune a model: a preset, parts in place of the preset's, a cost, and a seed.

    Attributes:
        preset: The name of a registered preset.
        parts: Parts and depths that replace the preset's, as `vltprune.prune` takes them.
        reduction: The fraction of the dense MACs to save, or one for each tower; None to prune as the preset says.
        seed: The seed of the guide's initialization and fit, and of parts that draw at random.
    """

    preset: str
    parts: Mapping[str, Any]
    reduction: float | Mapping[str, float] | None = None
    seed: int = 0

    @cached_property
    def config(self) -> PruneConfig:
        """The cell's pruning. A part that takes a seed gets the cell's, unless the grid gives one in its arguments."""
        config = preset_config(self.preset).replace(**self.parts)
        stages = [
            dataclasses.replace(
                stage, **{kind: _seeded(getattr(stage, kind), kind, self.seed) for kind in PRUNER_KINDS}
            )
            for stage in config.stages
        ]
        return config.replace(guide=_seeded(config.guide, "guide", self.seed)).with_stages(stages)

    def to_dict(self) -> dict[str, Any]:
        """The cell as plain data that JSON can hold, parts in their short form."""
        return {field: _plain(value) for field, value in self._values().items()}

    @property
    def labels(self) -> dict[str, str]:
        """The value of each field as the grid's text has it."""
        return {field: value_text(value) for field, value in self._values().items()}

    @property
    def key(self) -> str:
        """A text that equal cells share, also when they are read again from JSON."""
        return cell_key(self.to_dict())

    def _values(self) -> dict[str, Any]:
        return {"preset": self.preset, **self.parts, "reduction": self.reduction, "seed": self.seed}


def cell_key(cell: Mapping[str, Any] | None) -> str:
    """The key of a cell that `to_dict` wrote; that of the dense model for None."""
    return json.dumps(cell, sort_keys=True)


class Grid:
    """Lists of values, one for each field that varies: `preset`, parts, `at`, `reduction` and `seed`.

    Iterating yields the cells, the last field the fastest. `str` gives the text that `from_text` parses.

    Attributes:
        fields: The values of each field, in the order in which they were given.
    """

    def __init__(self, fields: Mapping[str, object]) -> None:
        """Check all values, and that each cell can be built.

        Args:
            fields: The values of each field, several as a list. A list for `at` holds one entry a cell: [(3, 6), (0, 1)].

        Raises:
            ValueError: For no preset, no values, a value given twice, a reduction outside (0, 1), and a combination that
                cannot be built.
            LookupError: For a preset or part that is not registered.
            TypeError: For an unknown field, and for arguments that a part does not take.
        """
        self.fields: dict[str, tuple[Any, ...]] = {}
        for field, given in fields.items():
            _check_field(field)
            self.fields[field] = tuple(_checked(field, value) for value in _several(given))
            _check_values(field, self.fields[field])
        if "preset" not in self.fields:
            raise ValueError(f"the grid names no preset, one or several of {', '.join(presets.names())}: {_EXAMPLE!r}")
        self.cells = tuple(self._cells())
        for cell in self.cells:
            _check_cell(cell)

    @classmethod
    def from_text(cls, text: str) -> Grid:
        """Parse "field=value, value; field=value". Commas within brackets and quotes belong to a value.

        Args:
            text: Such as "preset=evit,madtp; keep=ratio(ratio=0.5, decay=0.25),top_p; at=(3, 6),(0, 1); seed=0,1,2".

        Returns:
            The grid.

        Raises:
            ValueError, LookupError, TypeError: As of the class, and for text of another form.
        """
        fields: dict[str, object] = {}
        for assignment in _split(text, ";"):
            field, equals, values = (part.strip() for part in assignment.partition("="))
            if not equals or not field.isidentifier():
                raise ValueError(
                    f"cannot read {assignment!r} in the grid: write field=value, value, as in {_EXAMPLE!r}"
                )
            _check_field(field)
            if field in fields:
                raise ValueError(f"the grid has {field}= twice: write all its values once, as in {_EXAMPLE!r}")
            fields[field] = [_parse(field, value) for value in _split(values, ",")]
        return cls(fields)

    def __str__(self) -> str:
        return "; ".join(f"{field}={', '.join(map(value_text, values))}" for field, values in self.fields.items())

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def _cells(self) -> Iterator[Cell]:
        for values in itertools.product(*self.fields.values()):
            chosen = dict(zip(self.fields, values, strict=True))
            parts = {field: chosen.pop(field) for field in PARTS if field in chosen}
            yield Cell(parts=parts, **chosen)


def value_text(value: object) -> str:
    """A value of a field as a grid's text has it: "evit", "ratio(ratio=0.5)", "none", "0.3"."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else str(value) if isinstance(value, Part) else repr(_plain(value, tuple))


def _plain(value: object, sequence: type = list) -> Any:
    """A value as plain data; Parts in their short form."""
    if isinstance(value, Part):
        return str(value)
    if isinstance(value, Mapping):
        return {tower: _plain(one, sequence) for tower, one in value.items()}
    return sequence(value) if isinstance(value, tuple) else thawed(value)


def _several(given: object) -> list[object]:
    """The values of a field; a single one as a list of it."""
    single = given is None or isinstance(given, (str, Part, Mapping)) or not isinstance(given, Iterable)
    return [given] if single else list(given)


def _check_field(field: str) -> None:
    if field not in FIELDS:
        raise TypeError(f"a grid has no field {field!r}{nearest(field, FIELDS)}: write it as in {_EXAMPLE!r}")


def _checked(field: str, value: Any) -> Any:
    """A value of a field as frozen data. Errors as `Grid` has them."""
    if field == "preset":
        if not isinstance(value, str):
            raise TypeError(
                f"preset={value!r}: give the name of a preset; vltprune.presets.register names a config of yours"
            )
        return preset_config(value) and value
    if field == "at":
        return freeze_depths(value)
    if field == "place":
        check_place(value)
        return value
    if field == "modality":
        check_modality(value)
        return value
    if field in KINDS:
        return _part(field, value)
    if field == "seed":
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < 2**63:
            raise ValueError(f"seed={value!r} is no seed: write a whole number from 0 on")
        return int(value)
    return _reduction(value)


def _part(kind: str, value: Any) -> Part | FrozenDict | None:
    if kind == "guide" and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if kind == "keep" and isinstance(value, Mapping) and "name" not in value:
        return FrozenDict({tower: Part.from_spec(one, kind) for tower, one in value.items()})
    return Part.from_spec(value, kind)


def _reduction(value: Any) -> float | FrozenDict | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return FrozenDict({tower: _reduction(one) for tower, one in value.items()})
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < 1:
        raise ValueError(
            f"reduction={value!r} must lie between 0 and 1: the fraction of the dense MACs to save, such as 0.5"
        )
    return float(value)


def _check_values(field: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise ValueError(f"the grid has no value for {field}=: write one or more, or leave {field} out")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"the grid has {field}={value_text(value)} twice: write it once")


def _check_cell(cell: Cell) -> None:
    """Errors of a cell that can be known without a model, under the cell's name."""
    named = ", ".join(f"{field}={text}" for field, text in cell.labels.items())
    try:
        config = cell.config
    except (LookupError, TypeError, ValueError) as error:
        raise type(error)(f"the grid's cell {named} cannot be built: {error}") from error
    if cell.reduction is None:
        return
    known = keepers_with_knob(guided=config.guide is not None)
    for part in config.parts("keep"):
        if part.name not in known and part.name != "all":
            raise ValueError(
                f"the grid's cell {named} cannot be built: keep={str(part)!r} has no knob that a reduction can set: use "
                f"one of {', '.join(known)}, or leave reduction out"
            )


def _seeded(part: Any, kind: str, seed: int) -> Any:
    """A part that takes a seed and has none, with the seed; other parts as they are."""
    if isinstance(part, Mapping):
        return {tower: _seeded(one, kind, seed) for tower, one in part.items()}
    if part is None or "seed" in part.args:
        return part
    takes_seed = any(parameter.name == "seed" for parameter in parameters(KINDS[kind][0][part.name]))
    return part.replace(seed=seed) if takes_seed else part


def _parse(field: str, text: str) -> object:
    """A value of a field from its text."""
    if field == "preset" or (field in KINDS and not text.startswith("{")):
        return text
    if field in ("place", "modality") and text.isidentifier() and text.lower() != "none":
        return text
    try:
        return None if text.lower() == "none" else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(
            f"cannot read {field}={text} in the grid: write it as Python does, as in {_EXAMPLE!r}"
        ) from None


def _split(text: str, separator: str) -> list[str]:
    """The stripped pieces of a text between separators outside brackets and quotes. ValueError for an empty piece."""
    pieces, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if token == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += token
    pieces = [piece.strip() for piece in pieces]
    if separator == ";" and len(pieces) > 1 and not pieces[-1]:
        pieces.pop()
    if depth or not all(pieces):
        raise ValueError(f"cannot read {text!r} in the grid: brackets must close, and no value may be empty")
    return pieces
