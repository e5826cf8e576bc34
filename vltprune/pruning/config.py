"""PruneConfig: which parts prune which layers, as frozen data that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from typing_extensions import Unpack

from ..registry import bind, nearest
from ..utils.frozen import FrozenDict, thawed
from .depths import Depths, block_indices, freeze_depths
from .part import KINDS, Part

# arguments of public functions that a config does not have, for whom its own names would be a wrong suggestion
_ELSEWHERE = {
    "reduction": "vltprune.prune and vltprune.calibrate",
    "data": "vltprune.prune",
    "batches": "vltprune.calibrate",
    "tolerance": "vltprune.calibrate",
    "preset": "vltprune.prune and vltprune.create_model",
    "pretrained": "vltprune.create_model",
}


class Parts(TypedDict, total=False):
    """The keyword arguments that replace parts of a config, as in `vltprune.prune(model, preset, keep="ratio(0.5)")`.

    `PruneConfig` describes them.
    """

    scorer: Part | str
    keep: Part | str | Mapping[str, Part | str]
    selector: Part | str
    reducer: Part | str
    guide: Part | str | None
    at: Depths | Mapping[str, Depths]


@dataclass(frozen=True)
class PruneConfig:
    """The parts of a pruner and the depths that it prunes at. Configs with equal parts and depths are equal.

    A part is a Part, as `vltprune.keep.ratio(0.5)` returns it, or its short form, "ratio(0.5)".

    Args:
        scorer: how much each token matters.
        keep: how many tokens stay: one keeper, or a mapping from tower to keeper, {"image": "ratio(0.5)", "text":
            "ratio(0.7)"}. A mapping has a keeper for every tower that is pruned.
        selector: which ones stay; by default those of largest score.
        reducer: what becomes of the others.
        guide: what relates the tokens of all towers to shared anchors; None for none.
        at: the depths to prune: one number or any collection of them (a list, range, set, array or tensor). Whole numbers count
            blocks from 0, negative ones from the end (-1 is the last block). Floats are fractions of the depth in [0, 1). None
            is every block; empty depths prune nowhere. A mapping from tower ("image", "text") gives each tower its own depths.
            Towers that it does not name are not pruned.

    Raises:
        LookupError, TypeError, ValueError: for wrong names and arguments, with the nearest right one.
    """

    scorer: Part | str
    keep: Part | str | Mapping[str, Part | str]
    reducer: Part | str = "drop"
    guide: Part | str | None = None
    at: Depths | Mapping[str, Depths] = None
    selector: Part | str = "top"

    def __post_init__(self) -> None:
        for kind in KINDS:
            object.__setattr__(self, kind, self._frozen_part(kind))
        object.__setattr__(self, "at", freeze_depths(self.at))
        self._check_guide()

    def _frozen_part(self, kind: str) -> Part | FrozenDict | None:
        """The Part of a kind, or a mapping of several by tower. Errors as `Part.from_spec` has them."""
        spec, (registry, _) = getattr(self, kind), KINDS[kind]
        if spec is None:
            if kind == "guide":
                return None
            raise TypeError(f"{kind}=None: a pruner needs a {kind}, such as {kind}={registry.names()[0]!r}")
        if kind != "keep" or not isinstance(spec, Mapping) or "name" in spec:
            return Part.from_spec(spec, kind)
        if not spec:
            raise ValueError(f"{kind}={{}}: name a {registry.kind} for each tower, such as {{'image': 'ratio'}}")
        return FrozenDict({tower: Part.from_spec(one, kind) for tower, one in spec.items()})

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
        """The Part of one kind.

        Args:
            kind: "scorer", "keep", "selector", "reducer" or "guide".
            tower: the tower's name, where `keep` is given by tower.

        Returns:
            The Part.

        Raises:
            ValueError: where `keep` is given by tower, and no tower is named or this one has no keeper; for "guide" where
                the config has no guide.
        """
        part = getattr(self, kind)
        if isinstance(part, Mapping):
            if tower not in part:
                if tower is None:
                    advice = f"name the tower, part({kind!r}, {next(iter(part))!r})"
                else:
                    advice = f"and the {tower} tower, which is pruned, has none: add it, or leave the tower out of at="
                raise ValueError(f"{kind}= is given by tower, for {', '.join(part)}: {advice}")
            part = part[tower]
        if part is None:
            raise ValueError(f"{kind}=None: this config has no {kind}; config.parts({kind!r}) is empty then")
        return part

    def parts(self, kind: str) -> tuple[Part, ...]:
        """All Parts of one kind.

        Args:
            kind: "scorer", "keep", "selector", "reducer" or "guide".

        Returns:
            One Part; several where `keep` is given by tower; none for "guide" where the config has no guide.
        """
        part = getattr(self, kind)
        return tuple(part.values()) if isinstance(part, Mapping) else () if part is None else (part,)

    def describe(self, kind: str) -> str:
        """The part of one kind as text.

        Args:
            kind: "scorer", "keep", "selector", "reducer" or "guide".

        Returns:
            Its short form, such as "ratio(0.5)"; one for each tower where `keep` is given by tower; "none" without a guide.
        """
        part = getattr(self, kind)
        if isinstance(part, Mapping):
            return ", ".join(f"{tower}: {one}" for tower, one in part.items())
        return str(part or "none")

    def replace(self, **changes: Unpack[Parts]) -> PruneConfig:
        """Makes a config with other parts or depths: config.replace(keep="ratio(0.5)", guide=None).

        Args:
            **changes: scorer=, keep=, selector=, reducer=, guide= and at=, as PruneConfig takes them.

        Returns:
            The new config; this one is unchanged.

        Raises:
            TypeError: for another name.
        """
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    def depths(self, tower: str, depths: int) -> tuple[int, ...]:
        """The blocks of a tower to prune.

        Args:
            tower: the tower's name.
            depths: its number of blocks.

        Returns:
            Their indices, ascending.

        Raises:
            ValueError: for depths that the tower does not have.
        """
        at: Any = self.at
        if not isinstance(at, Mapping):
            return block_indices(at, tower, depths)
        return block_indices(at[tower], tower, depths) if tower in at else ()

    def to_dict(self) -> dict[str, Any]:
        """Converts the config to plain data that json can write.

        Returns:
            A dict with the keys "scorer", "keep", "selector", "reducer", "guide" and "at", as `from_dict` takes it.
        """
        return {**{kind: _plain(getattr(self, kind)) for kind in KINDS}, "at": thawed(self.at)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruneConfig:
        """Builds a config from what `to_dict` returned.

        Args:
            data: arguments of PruneConfig by name.

        Returns:
            The config.

        Raises:
            TypeError: for unknown keys and missing parts.
        """
        _check_names(data)
        bind("a pruning config", cls, data)
        return cls(**data)


def _check_names(names: Iterable[str]) -> None:
    """TypeError for a name that is no part, with whose argument it is or with the nearest part."""
    known = [f.name for f in dataclasses.fields(PruneConfig)]
    for name in names:
        if name in _ELSEWHERE:
            raise TypeError(f"{name}= is an argument of {_ELSEWHERE[name]}, and no part: parts are {', '.join(known)}")
        if name not in known:
            raise TypeError(f"PruneConfig has no part {name!r}{nearest(name, known)}")


def _plain(part: Part | Mapping[str, Part] | None) -> dict[str, object] | None:
    """A Part, several by tower, or None, as plain data."""
    if isinstance(part, Mapping):
        return {tower: one.to_dict() for tower, one in part.items()}
    return None if part is None else part.to_dict()
