"""Stage: the parts of one pruning decision, and where in a tower it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

from ..core.modality import Modality
from ..registry import nearest
from ..utils.frozen import FrozenDict, thawed
from .depths import Depths, block_indices, freeze_depths
from .part import KINDS, Part

Place = Literal["before", "attention", "block", "output"]

# the tower that is pruned only where a stage names it: depths and parts for encoders do not fit a language model
NAMED_ALONE = "language"

PRUNER_KINDS = ("scorer", "keep", "selector", "reducer")


@dataclass(frozen=True)
class Stage:
    """The parts of one pruning decision, and where in a tower it is made. Stages with equal parts and depths are equal.

    A part is a Part, as `vltprune.keep.ratio(0.5)` returns it, or its short form, "ratio(0.5)".

    Args:
        scorer: how much each token matters.
        keep: how many tokens stay: one keeper, or a mapping from tower to keeper, {"image": "ratio(0.5)", "text":
            "ratio(0.7)"}. A mapping has a keeper for every tower that is pruned.
        reducer: what becomes of the others.
        at: the depths to prune: one number or any collection of them (a list, range, set, array or tensor). Whole numbers count
            blocks from 0, negative ones from the end (-1 is the last block). Floats are fractions of the depth in [0, 1). None
            is every block; empty depths prune nowhere. A mapping from tower ("image", "text") gives each tower its own depths.
            Towers that it does not name are not pruned. A language model ("language") is pruned only where it is named.
        selector: which ones stay; by default those of largest score.
        place: "before", before a block, by the block's own queries and keys; "attention", between its attention and its MLP;
            "block", behind it; "output", behind the last block of every tower, before its head, where `at` must be None or
            name towers alone, {"image": None}.
        modality: "text" or "image": the tokens to prune where a text and an image are one sequence, as in ViLT; all others
            stay. A keeper then counts these tokens alone. None prunes tokens of any modality.

    Raises:
        LookupError, TypeError, ValueError: for wrong names and arguments, with the nearest right one.
    """

    scorer: Part | str
    keep: Part | str | Mapping[str, Part | str]
    reducer: Part | str = "drop"
    _: KW_ONLY
    at: Depths | Mapping[str, Depths] = None
    selector: Part | str = "top"
    place: Place = "attention"
    modality: Modality | None = None

    def __post_init__(self) -> None:
        for kind in PRUNER_KINDS:
            object.__setattr__(self, kind, self._frozen_part(kind))
        object.__setattr__(self, "at", freeze_depths(self.at))
        check_place(self.place)
        check_modality(self.modality)
        depths = self.at.values() if isinstance(self.at, Mapping) else (self.at,)
        if self.place == "output" and any(one is not None for one in depths):
            raise ValueError(
                f"place='output' is behind the last block, and at={thawed(self.at)!r} names others: leave `at` out, or write "
                "place='block' to prune behind these blocks"
            )

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

    def part(self, kind: str, tower: str | None = None) -> Part:
        """The Part of one kind.

        Args:
            kind: "scorer", "keep", "selector" or "reducer"; "guide" of a PruneConfig.
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
            kind: "scorer", "keep", "selector" or "reducer"; "guide" of a PruneConfig.

        Returns:
            One Part; several where `keep` is given by tower; none for "guide" where the config has no guide.
        """
        part = getattr(self, kind)
        return tuple(part.values()) if isinstance(part, Mapping) else () if part is None else (part,)

    def describe(self, kind: str) -> str:
        """The part of one kind as text.

        Args:
            kind: "scorer", "keep", "selector" or "reducer"; "guide" of a PruneConfig.

        Returns:
            Its short form, such as "ratio(0.5)"; one for each tower where `keep` is given by tower; "none" without a guide.
        """
        part = getattr(self, kind)
        if isinstance(part, Mapping):
            return ", ".join(f"{tower}: {one}" for tower, one in part.items())
        return str(part or "none")

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
        if not self.names(tower):
            return ()
        if self.place == "output":
            return (depths - 1,)
        at: Any = self.at
        return block_indices(at[tower] if isinstance(at, Mapping) else at, tower, depths)

    def names(self, tower: str) -> bool:
        """Whether it prunes a tower, inside or behind it."""
        return tower in self.at if isinstance(self.at, Mapping) else tower != NAMED_ALONE

    def to_dict(self) -> dict[str, Any]:
        """Converts the stage to plain data that json can write.

        Returns:
            A dict with the keys "scorer", "keep", "selector", "reducer", "at" and "place"; "modality" where there is one.
        """
        return {
            **{kind: _plain(getattr(self, kind)) for kind in PRUNER_KINDS},
            "at": thawed(self.at),
            "place": self.place,
            **({} if self.modality is None else {"modality": self.modality}),
        }


def check_place(place: object) -> None:
    """ValueError for what is no place of a stage, with the nearest one."""
    if place not in get_args(Place):
        raise ValueError(f"place={place!r} is no place{nearest(str(place), get_args(Place))}")


def check_modality(modality: object) -> None:
    """ValueError for what is no modality of a stage, with the nearest one."""
    if modality is not None and modality not in get_args(Modality):
        raise ValueError(f"modality={modality!r} is no modality{nearest(str(modality), get_args(Modality))}")


def _plain(part: Part | Mapping[str, Part] | None) -> dict[str, object] | None:
    """A Part, several by tower, or None, as plain data."""
    if isinstance(part, Mapping):
        return {tower: one.to_dict() for tower, one in part.items()}
    return None if part is None else part.to_dict()
