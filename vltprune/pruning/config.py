"""PruneConfig: which parts prune which layers, as frozen data that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, TypedDict

from typing_extensions import Unpack

from ..core.modality import Modality
from ..registry import bind, nearest
from .depths import Depths
from .part import KINDS, Part
from .stage import PRUNER_KINDS, Place, Stage

# arguments of public functions that a config does not have, for whom its own names would be a wrong suggestion
_ELSEWHERE = {
    "reduction": "vltprune.prune and vltprune.calibrate",
    "visual_tokens": "vltprune.prune and vltprune.calibrate",
    "decode": "vltprune.calibrate",
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
    place: Place
    modality: Modality | None
    then: Iterable[Stage | Mapping[str, Any]]


@dataclass(frozen=True)
class PruneConfig(Stage):
    """The guide of a model and the stages that prune it. Configs with equal parts and depths are equal.

    Most configs have one stage. Its parts and its place are arguments of the config itself. Of several stages, attributes and
    `part` are those of the first one; `parts`, `describe` and `depths` are of all.

    Args:
        scorer, keep, reducer, at, selector, place, modality: the first stage, as `Stage` describes them.
        guide: what relates the tokens of all towers to shared anchors; None for none.
        then: further stages. At the same depth and place, each one prunes what the one before left.

    Raises:
        LookupError, TypeError, ValueError: for wrong names and arguments, with the nearest right one.
    """

    guide: Part | str | None = None
    _: KW_ONLY
    then: Iterable[Stage | Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "guide", None if self.guide is None else Part.from_spec(self.guide, "guide"))
        object.__setattr__(self, "then", tuple(map(_stage, self.then)))
        for stage in self.stages:
            _check_guide(stage, self.guide is not None)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, the first one included."""
        first = Stage(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Stage)})
        return (first, *(stage for stage in self.then if isinstance(stage, Stage)))

    def parts(self, kind: str) -> tuple[Part, ...]:
        """All Parts of one kind, of all stages and towers, each once.

        Args:
            kind: "scorer", "keep", "selector", "reducer" or "guide".

        Returns:
            The Parts; none for "guide" where the config has no guide.
        """
        if kind == "guide":
            return super().parts(kind)
        return tuple(dict.fromkeys(part for stage in self.stages for part in stage.parts(kind)))

    def describe(self, kind: str) -> str:
        """The parts of one kind as text.

        Args:
            kind: "scorer", "keep", "selector", "reducer" or "guide".

        Returns:
            What `Stage.describe` says of each stage, once where all are alike; "none" without a guide.
        """
        if kind == "guide":
            return super().describe(kind)
        return ", then ".join(dict.fromkeys(stage.describe(kind) for stage in self.stages))

    def depths(self, tower: str, depths: int) -> tuple[int, ...]:
        """The blocks of a tower that any stage prunes.

        Args:
            tower: the tower's name.
            depths: its number of blocks.

        Returns:
            Their indices, ascending.

        Raises:
            ValueError: for depths that the tower does not have.
        """
        return tuple(sorted({depth for stage in self.stages for depth in stage.depths(tower, depths)}))

    def replace(self, **changes: Unpack[Parts]) -> PruneConfig:
        """Makes a config with other parts or depths: config.replace(keep="ratio(0.5)", guide=None).

        Args:
            **changes: scorer=, keep=, selector=, reducer=, at=, place=, modality=, guide= and then=, as PruneConfig takes
                them. All but the last two replace what every stage has, except in stages of `then` with keep="all".

        Returns:
            The new config; this one is unchanged.

        Raises:
            TypeError: for another name.
        """
        _check_names(changes)
        own: dict[str, Any] = {name: value for name, value in changes.items() if name not in ("guide", "then")}
        then = changes.get("then", tuple(_replaced(stage, own) for stage in self.stages[1:]))
        return dataclasses.replace(self, **{**changes, "then": then})

    def in_tower(self, tower: str) -> PruneConfig:
        """Makes a config that prunes one tower alone, where this one prunes it.

        Args:
            tower: the tower's name.

        Returns:
            The new config; this one is unchanged.
        """

        def alone(at: Any) -> dict[str, Any]:
            return {tower: at} if not isinstance(at, Mapping) else {name: at[name] for name in at if name == tower}

        return self.with_stages(dataclasses.replace(stage, at=alone(stage.at)) for stage in self.stages)

    def with_stages(self, stages: Iterable[Stage]) -> PruneConfig:
        """Makes a config with the same guide and other stages.

        Args:
            stages: the stages, at least one.

        Returns:
            The new config; this one is unchanged.
        """
        first, *then = stages
        own = {f.name: getattr(first, f.name) for f in dataclasses.fields(Stage)}
        return PruneConfig(**own, guide=self.guide, then=then)

    def to_dict(self) -> dict[str, Any]:
        """Converts the config to plain data that json can write.

        Returns:
            A dict of the arguments by name, as `from_dict` takes it; "then" where there are several stages.
        """
        guide = self.part("guide").to_dict() if self.guide is not None else None
        then = {"then": [stage.to_dict() for stage in self.stages[1:]]} if self.then else {}
        return {**super().to_dict(), "guide": guide, **then}

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


def _stage(stage: Stage | Mapping[str, Any]) -> Stage:
    """A stage of `then`, of which plain data have the arguments. TypeError for anything else."""
    if isinstance(stage, Mapping):
        bind("a stage", Stage, stage)
        return Stage(**stage)
    if not isinstance(stage, Stage) or isinstance(stage, PruneConfig):
        raise TypeError(f"then=: a stage is a vltprune.Stage or a mapping of its arguments, not {stage!r}")
    return stage


def _replaced(stage: Stage, changes: dict[str, Any]) -> Stage:
    """A stage with other parts; one that keeps all tokens, and only leaves scores for others, as it is."""
    return stage if stage.keep == Part("all") else dataclasses.replace(stage, **changes)


def _check_guide(stage: Stage, guided: bool) -> None:
    """ValueError for parts that read the guide where there is none."""
    for kind in () if guided else PRUNER_KINDS:
        for part in stage.parts(kind):
            if getattr(KINDS[kind][0][part.name], "guided", False):
                raise ValueError(
                    f"{kind}={str(part)!r} reads the alignment guide, and guide=None: write guide='codebook', "
                    f"or choose another {kind}"
                )


def _check_names(names: Iterable[str]) -> None:
    """TypeError for a name that is no part, with whose argument it is or with the nearest part."""
    known = [f.name for f in dataclasses.fields(PruneConfig)]
    for name in names:
        if name in _ELSEWHERE:
            raise TypeError(f"{name}= is an argument of {_ELSEWHERE[name]}, and no part: parts are {', '.join(known)}")
        if name not in known:
            raise TypeError(f"PruneConfig has no part {name!r}{nearest(name, known)}")
