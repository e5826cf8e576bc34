"""CompressConfig: the settings of one compression, as frozen data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..data import shards
from ..evaluation.tasks.matching import K_TEST
from ..models.wordpiece import BERT
from ..pruning.config import PruneConfig
from ..pruning.losses import TRACE_LOSSES
from ..pruning.presets import preset
from ..registry import bind, nearest, tasks
from ..utils.frozen import FrozenDict, thawed
from .fields import parse_fields


@dataclass(frozen=True)
class Recipe:
    """Settings that MADTP trains a task with (arXiv 2403.02991, experiments).

    Args:
        lr: highest learning rate of AdamW.
        weight_decay: of AdamW.
        epochs: length of the run.
        batch_size: records a step, of all its GPUs together.
    """

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


_AT_LEAST_ONE = ("val_limit", "steps", "batch_size", "accumulate", "checkpoint_every", "log_every", "max_bad")

_NOT_NEGATIVE = ("k_test", "seed", "workers", "weight_decay", "align")
_NOT_NEGATIVE += ("distill", "distill_summaries", "distill_tokens", "saliency")


@dataclass(frozen=True)
class CompressConfig:
    """Settings of a compression, from a dense model to a pruned one. Every field can stand in a YAML or JSON file.

    docs/compress.md has the same as a table, with the units and ranges that are checked here.

    Args:
        task: a registered task (nlvr, caption, vqa, retrieval).
        model: the dense model, a name or a folder.
        data: annotations to train on, shards such as train-{000..009}.tar (see `vltprune.data.shards`), which need `steps`,
            or synthetic:train:PAIRSxSENTENCES.
        val: annotations that the knob is chosen on, and results are of; never the test split.
        images: folder that the paths in `data` begin in (None: the file's own).
        val_images: folder that the paths in `val` begin in (None: `images`, else the file's own).
        val_limit: how many records of `val` are used, the first ones (None: all).
        model_args: further arguments of `create_model`.
        pretrained: weights of `model`, as `create_model` takes them.
        vocabulary: WordPiece vocabulary, a file or a packaged name.
        answers: for vqa: file of the answers to choose from (None: they are generated).
        k_test: for retrieval by BLIP: how many nearest its matching head judges again in evaluation (0: it does not).
        start: weights to begin from instead of `model`'s, a folder or a packaged name. They are of a model that was pruned
            with the same parts, to a milder cost. `model` still teaches, and is what results are compared with.
        preset: how to prune, a preset's name.
        parts: parts that replace the preset's own, such as {"reducer": "drop"}.
        freeze: shell patterns of the dense model's parameters that are not trained.
        reduction: share of the dense MACs to save, padding left out; 0 trains the dense model. Or a mapping from tower to a
            share of its own dense MACs, such as {"image": 0.5, "text": 0.3}. Each of these towers has a knob and a controller.
            A tower that is left out stays as its parts say. A mapping needs budget="controller", and no `serve`.
        serve: further shares of the dense MACs. Every second step trains for one of them; the model is calibrated to them
            and evaluated there as well.
        budget: "controller": measured MACs adjust the keeper's knob. "learned": for the first half of the steps tokens are
            kept softly, and a loss on the expected MACs moves scores and thresholds. Then as "controller".
        ramp: share of the steps over which the target rises from 0 to `reduction`. At 0 it is there at once, as suits a
            `start` that is pruned.
        epochs: length of the run (None: the recipe's, see `RECIPES`).
        steps: length of the run, in place of `epochs`.
        batch_size: records a step, of all processes (None: the recipe's).
        accumulate: pieces that a step's records go through the model in.
        lr: highest learning rate of AdamW; it falls by a cosine to 0 (None: the recipe's).
        weight_decay: of AdamW (None: the recipe's).
        warmup: share of the steps over which the learning rate rises.
        align: weight of L_align.
        distill: weight of distillation of the dense model's logits (0: none).
        distill_summaries: weight of distillation of its towers' summary tokens (0: none).
        distill_tokens: weight of distillation of its towers' tokens, those that are kept (0: none).
        losses: weights of further losses of what is kept, by name: keep_ratio, kept_share, ponder, halting_prior, as
            `vltprune.losses` has them.
        saliency: weight of teaching the scores which tokens the dense model's answers depend on (0: none, as in MADTP).
        max_grad_norm: norm that gradients are clipped to.
        augment: whether images are cropped and flipped at random.
        dtype: type in which products are computed, "float32", "bfloat16" or "float16" (Accelerate's mixed precision). Weights
            and the optimizer's state are float32. float16 trains on a GPU.
        seed: of the order of records, of random crops, and of what else is drawn at random.
        workers: processes that open images ahead of their use (0: the run's own process does).
        checkpoint_every: steps between checkpoints.
        log_every: steps between rows of history.jsonl.
        max_bad: so many losses in a row that are not finite end the run.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or two contradict each other.
        LookupError: there is no such task, preset or part.
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
    k_test: int = K_TEST
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
    distill_tokens: float = 0.0
    losses: Mapping[str, float] = field(default_factory=FrozenDict)
    saliency: float = 0.5
    max_grad_norm: float = 1.0
    augment: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    workers: int = 2
    checkpoint_every: int = 500
    log_every: int = 50
    max_bad: int = 10

    def __post_init__(self) -> None:
        for name, value in parse_fields(self).items():
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
        self._check_losses()

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
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        for name in ("lr", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        for name in _NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.budget not in ("controller", "learned"):
            raise ValueError(f"budget={self.budget!r}: write budget='controller' or budget='learned'")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: write dtype='float32', 'bfloat16' or 'float16'")

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
                f"budget='learned' has one Lagrange multiplier for the cost of all towers: write budget='controller' with "
                f"{asked}, or one number, such as reduction=0.5"
            )

    def _check_losses(self) -> None:
        """ValueError for a loss that is not there, or that this config's parts give nothing to."""
        for name in self.losses:
            if name not in TRACE_LOSSES:
                raise ValueError(f"losses: there is no {name!r}{nearest(name, TRACE_LOSSES)}")
            stages = self.pruning.stages
            if name in ("ponder", "halting_prior") and stages[0].part("scorer").name != "halting":
                raise ValueError(f"losses: {name} is of halting probabilities: write preset='avit', or leave it out")
            keepers = {part.name for stage in stages for part in stage.parts("keep")}
            if name == "keep_ratio" and keepers != {"sampled_ratio"}:
                raise ValueError("losses: keep_ratio is of a sampled ratio: write preset='dynamicvit', or leave it out")
            if name in ("keep_ratio", "kept_share") and self.budget != "learned":
                raise ValueError(f"losses: {name} is of soft training: write budget='learned'")

    @property
    def pruning(self) -> PruneConfig:
        """The PruneConfig of preset and parts; one that prunes nowhere for reduction=0."""
        config = preset(self.preset).replace(**self.parts)
        return config if self.reduction else preset("random").replace(at=())

    @property
    def saliency_weight(self) -> float:
        """`saliency`, or 0 where nothing is pruned, and so scored."""
        return self.saliency if self.reduction else 0.0

    def replace(self, **changes: Any) -> CompressConfig:
        """A copy with some fields changed.

        Raises:
            TypeError: there is no such field.
        """
        return CompressConfig.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data that json can write."""
        return thawed(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressConfig:
        """Builds a config from fields.

        Raises:
            TypeError: there is no such field, the text has the nearest; or one is missing.
            ValueError: a value is wrong.
        """
        bind("a compression config", cls, data)
        return cls(**data)

    @classmethod
    def from_file(cls, file: str | Path, **changes: Any) -> CompressConfig:
        """Builds a config from a YAML or JSON file, with some fields changed.

        Args:
            file: holds the fields, as a mapping.
            **changes: fields that replace the file's.

        Returns:
            The config.

        Raises:
            OSError: there is no such file.
            ValueError: it holds no fields, or a value is wrong.
            TypeError: there is no such field, or one is missing.
            LookupError: there is no such task, preset or part.
        """
        return cls.from_dict({**load_fields(file), **changes})


def load_fields(file: str | Path) -> dict[str, Any]:
    """The fields that a YAML or JSON file holds, unchecked.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no fields.
    """
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
