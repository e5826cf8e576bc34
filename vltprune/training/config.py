"""CompressConfig: the settings of one compression, as frozen data, in files and beside the weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..data import shards
from ..evaluation.results_log import write_json
from ..evaluation.tasks.matching import MOST
from ..models.wordpiece import BERT
from ..pruning.config import PruneConfig
from ..pruning.presets import preset
from ..registry import bind, tasks
from ..utils.frozen import FrozenDict, thawed
from .fields import fields_in_form


@dataclass(frozen=True)
class Recipe:
    """What MADTP trains a task with (arXiv 2403.02991, experiments; batch sizes of all its GPUs together)."""

    lr: float
    weight_decay: float
    epochs: float
    batch_size: int


RECIPES: Mapping[str, Recipe] = {
    "nlvr": Recipe(3e-6, 0.05, 15, 128),
    "caption": Recipe(1e-5, 0.05, 5, 256),
    "vqa": Recipe(2e-5, 0.05, 3, 128),
    "retrieval": Recipe(1e-5, 0.2, 5, 128),  # CLIP's; BLIP's has lr 1e-7 and weight_decay 0.05
}


_FROM_ONE = ("val_limit", "steps", "batch_size", "accumulate", "checkpoint_every", "log_every", "max_bad")


@dataclass(frozen=True)
class CompressConfig:
    """From a dense model to a pruned one. Every field can stand in a YAML or JSON file.

    task, model     a registered task; the dense model, by name or folder
    data, images    annotations to train on, and the folder that their pictures' paths begin in (None: the file's own); or
                    shards, such as train-{000..009}.tar (see `vltprune.data.shards`), which need `steps`
    val, val_images annotations that everything is chosen on; never the test split. val_limit: only the first so many
    model_args, pretrained, vocabulary, answers   as `create_model` and `vltprune eval` take them
    k_test          for retrieval by BLIP: how many nearest its matching head judges again in evaluation (0: it is not asked)
    start           a folder, or packaged name, of weights to begin from instead of `model`'s: of a model that was pruned alike
                    to a milder cost. `model` still teaches, and is what the results are compared with
    preset, parts   how to prune: a preset's name, and parts that replace its own, such as {"reducer": "drop"}
    freeze          shell patterns of the dense model's parameters that stay as they are
    reduction       share to save of the dense MACs on the tokens that are there, padding left out; 0 trains the dense model,
                    for want of one to begin with. Or a mapping from tower to a share of its own dense MACs, such as
                    {"image": 0.5, "text": 0.3}: each of these towers has a knob and a controller of its own, and a tower that
                    is left out stays as `parts` say. Needs budget="controller", and no `serve`
    serve           other shares, that every second step trains for, by turns; the model is calibrated to them and examined
                    there as well
    budget          "controller": measured MACs turn the keeper's knob; "learned": for the first half of the steps tokens are
                    kept softly, and a loss on the expected MACs moves scores and thresholds; then as "controller"
    ramp            the target rises from 0 to `reduction` over this share of the steps (0: it is there at once, as suits a
                    `start` that is pruned)
    epochs, steps   how long (steps wins; None: the recipe's epochs); batch_size: records a step, of all processes
    accumulate      a step's records go through the model in so many pieces
    lr, weight_decay   of AdamW (None: the recipe's); lr falls by a cosine to 0, after `warmup`, a share of the steps
    align           weight of L_align
    distill, distill_summaries   weights of distillation: of the dense model's logits, of its towers' summary tokens (0: none)
    saliency        weight of teaching the scores what the dense model's answers depend on (0: they are not taught, as in MADTP)
    max_grad_norm   largest norm of the gradients
    augment         random crops and flips of the pictures
    precision       "no", "bf16" or "fp16"
    workers         processes that open pictures ahead of their use (0: the run's own does)
    checkpoint_every, log_every   in steps; max_bad: so many losses in a row that are no number end the run
    """

    task: str
    model: str
    data: str
    val: str
    images: str | None = None
    val_images: str | None = None
    val_limit: int | None = None
    model_args: Mapping[str, Any] = field(default_factory=FrozenDict)
    pretrained: str | bool | None = None
    vocabulary: str = BERT
    answers: str | None = None
    k_test: int = MOST
    start: str | None = None
    preset: str = "madtp"
    parts: Mapping[str, Any] = field(default_factory=FrozenDict)
    freeze: tuple[str, ...] = ()
    reduction: float | Mapping[str, float] = 0.5
    serve: tuple[float, ...] = ()
    budget: Literal["controller", "learned"] = "controller"
    ramp: float = 0.5
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float = 0.0
    align: float = 0.1
    distill: float = 0.0
    distill_summaries: float = 0.0
    saliency: float = 0.5
    max_grad_norm: float = 1.0
    augment: bool = False
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    workers: int = 2
    checkpoint_every: int = 500
    log_every: int = 50
    max_bad: int = 10

    def __post_init__(self) -> None:
        for name, value in fields_in_form(self).items():
            object.__setattr__(self, name, value)
        tasks[self.task]
        if self.task not in RECIPES:
            raise ValueError(f"task={self.task!r} cannot be trained yet: one of {', '.join(RECIPES)} can")
        self._check_ranges()
        if self.steps is None and shards.is_shard_address(self.data):
            raise ValueError(
                f"data={self.data!r}: samples in shards are not counted beforehand, give steps, not epochs"
            )
        for name in ("lr", "weight_decay", "epochs", "batch_size"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(RECIPES[self.task], name))
        try:
            self.pruning  # noqa: B018  (wrong parts fail here)
        except (LookupError, TypeError, ValueError) as error:
            raise type(error)(f"parts={thawed(self.parts)}: {error}" if self.parts else str(error)) from None

    def _check_ranges(self) -> None:
        self._check_target()
        if self.start is not None and not self.reduction:
            raise ValueError(
                f"start={self.start!r} begins a pruned model, and reduction=0 prunes nothing: give it as model"
            )
        wrong = [share for share in self.serve if not 0 < share < 1]
        if wrong or (self.serve and not self.reduction):
            raise ValueError(
                f"serve={self.serve}: shares of the dense MACs, between 0 and 1, of a model that is pruned"
            )
        for name in ("ramp", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0 .. 1: a share of the steps")
        for name in _FROM_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        for name in ("lr", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        for name in ("k_test", "seed", "workers", "align", "distill", "distill_summaries", "saliency", "weight_decay"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.budget not in ("controller", "learned"):
            raise ValueError(f"budget={self.budget!r}: write budget='controller' or budget='learned'")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision={self.precision!r}: write precision='no', 'bf16' or 'fp16'")

    def _check_target(self) -> None:
        if not isinstance(self.reduction, Mapping):
            if not 0 <= self.reduction < 1:
                raise ValueError(f"reduction={self.reduction} must lie in 0 .. 1: the share of the dense MACs to save")
            return
        asked = f"reduction={thawed(self.reduction)}"
        if not all(0 < share < 1 for share in self.reduction.values()):
            raise ValueError(
                f"{asked} must lie between 0 and 1 for each tower: the share of its own dense MACs to save; leave a "
                "tower out to leave it as the parts say"
            )
        if self.serve:
            raise ValueError(
                f"serve={self.serve}: several costs are served by one knob for all towers: leave serve out, or write one "
                f"number, such as reduction=0.5, instead of {asked}"
            )
        if self.budget == "learned":
            raise ValueError(
                f"budget='learned' has one price for the cost of all towers: write budget='controller' with {asked}, or "
                "one number, such as reduction=0.5"
            )

    @property
    def pruning(self) -> PruneConfig:
        """The parts to prune with, nowhere where nothing is to be saved. Raises what PruneConfig does."""
        config = preset(self.preset).replace(**self.parts)
        return config if self.reduction else preset("random").replace(at=())

    @property
    def scores_taught(self) -> float:
        """`saliency`, where something is pruned, and so scored."""
        return self.saliency if self.reduction else 0.0

    def replace(self, **changes: Any) -> CompressConfig:
        """The same with other fields. TypeError for one that there is not."""
        return CompressConfig.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write."""
        return thawed(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressConfig:
        """TypeError for fields that there are not, with the nearest, and for missing ones; ValueError for wrong values."""
        bind("a compression config", cls, data)
        return cls(**data)

    @classmethod
    def read(cls, file: str | Path, **changes: Any) -> CompressConfig:
        """From a YAML or JSON file, with some fields changed. OSError for no such file; what `fields_of`, `from_dict` raise."""
        return cls.from_dict({**fields_of(file), **changes})

    def write(self, file: str | Path) -> None:
        """As JSON, which is YAML too."""
        write_json(Path(file), self.to_dict())


def fields_of(file: str | Path) -> dict[str, Any]:
    """What a YAML or JSON file says, unchecked. OSError for no such file; ValueError for one that holds no fields."""
    path = Path(file)
    if not path.is_file():
        there = "it is a folder" if path.is_dir() else "there is no such file"
        kind = IsADirectoryError if path.is_dir() else FileNotFoundError
        raise kind(f"{file}: {there}; give a YAML or JSON file of the fields of a compression config")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not YAML: it is no text in UTF-8") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold the fields of a compression config, it holds {type(data).__name__}")
    return {name: _number(value) for name, value in data.items()}


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a text, for want of a point; also among the values of a mapping."""
    if isinstance(value, dict):
        return {name: _number(one) for name, one in value.items()}
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value) else value
