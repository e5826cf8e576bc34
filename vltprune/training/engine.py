"""The run: steps, budget, checkpoints. Devices, processes and precision are Accelerate's."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from ..budget import fit_guide
from ..data.shards import Shards
from ..preprocessing import transforms
from ..pruner import Pruner
from ..surgery import pruning
from .batches import Batches
from .checkpoints import Checkpoints
from .config import CompressConfig
from .controller import Controller, target
from .draws import Draws
from .figures import History, Watch, gathered, trackers
from .objectives import objective_of
from .shards import ShardDraws
from .student import Extra, Student

_MEASURED = 5  # every so many steps the cost is measured and the knob turned
_SOFT, _HARD = 0.5, 0.01  # softness at first and at last, in standard deviations of the scores
_HARDENED = 0.5  # the share of the steps after which tokens stay or go, as in evaluation
_PRICE = 0.05  # how much dearer each step makes a share of the dense MACs that is too much
_KEEPERS, _GUIDE = 50.0, 20.0  # how much faster thresholds, and the guide, learn than weights that were trained before
_START = 64  # records that the guide and the knob start from


class BadLossError(FloatingPointError):
    """Too many losses in a row were no number. The last batch is on disk, and so is the last checkpoint."""


@dataclass
class Run:
    """One training run in a folder. model: pruned, over its dense host; task: set to it; records: to train on."""

    config: CompressConfig
    folder: Path
    model: nn.Module
    task: Any
    records: Sequence[Any] | Shards[Any]
    teacher: nn.Module | None = None
    extra: Extra | None = None
    bad: int = 0  # losses that were no number, in a row
    skipped: int = 0  # and in all
    price: float = 0.0  # of the expected cost (the multiplier of an augmented Lagrangian)

    def __post_init__(self) -> None:
        config, device = self.config, self._accelerate().device
        self.draws = self._draws()
        self.steps = config.steps or self.draws.steps(float(config.epochs or 1))
        _freeze(pruning(self.model).host, config.freeze)
        self.model.to(device)
        objective = objective_of(self.task, self.model, config.seed).to(device)
        teacher = None if self.teacher is None else self.teacher.to(device).eval()
        taught = (config.distil, config.distil_summaries)
        student = Student(self.model, objective, config.align, teacher, taught, config.saliency, self.extra)
        optimizer = torch.optim.AdamW(_groups(student, float(config.weight_decay or 0)), lr=float(config.rate or 0))
        self.controller = Controller(self.model) if config.reduction else None
        self.student, self.optimizer = self.accelerator.prepare(student, optimizer)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.accelerator)

    def train(self) -> None:
        """To the last step, from the last checkpoint if there is one.

        OSError for a checkpoint that cannot be written; BadLossError after `max_bad` losses in a row that are no number.
        """
        start, config = self._begin(), self.config
        self.accelerator.init_trackers("vltprune", config=_plain(config.to_dict()))
        watch = Watch(self.accelerator, History(self.folder / "history.jsonl"), start, self.steps)
        for step, (records, images) in enumerate(self.draws.batches(start, self.steps), start):
            watch.add(self._step(step, records, images))
            done = step + 1
            if done % config.log_every == 0 or done == self.steps:
                watch.report(done, **self._standing(step))
            if done % config.checkpoint_every == 0 or done == self.steps:
                self.checkpoints.save(done, self._state())
        watch.bar.close()
        self.accelerator.end_training()

    def _accelerate(self) -> Accelerator:
        self.accelerator = Accelerator(
            mixed_precision=self.config.precision,
            log_with=trackers() or None,
            project_dir=str(self.folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # a tower may prune nowhere
        )
        return self.accelerator

    def _draws(self) -> Batches[Any]:
        config, processes = self.config, self.accelerator.num_processes
        assert config.batch_size is not None
        if config.batch_size % (processes * config.accumulate):
            raise ValueError(
                f"batch_size={config.batch_size} does not split into {processes} processes x accumulate="
                f"{config.accumulate} equal parts"
            )
        kind: Any = ShardDraws if isinstance(self.records, Shards) else Draws
        return kind(
            self.records,
            transforms(self.model),
            config.batch_size,
            config.seed,
            self.accelerator.process_index,
            processes,
            config.augment,
        )

    def _begin(self) -> int:
        """The step to go on from, with everything as it was; a fresh run's guide and knob are placed first."""
        state = self.checkpoints.restore()
        if state is not None:
            if self.controller is not None:
                self.controller.load_state_dict(state["controller"])
            self.bad, self.skipped, self.price = state["bad"], state["skipped"], state["price"]
            return state["step"]
        first = self.draws.first(_START)
        calls = calls_of(self.task, first, self.draws.prepare, self.accelerator.device)
        guide = pruning(self.model).guide
        if guide is not None and guide.is_untrained:
            fit_guide(self.model, calls, self.config.seed)
        if self.controller is not None and self.config.budget == "controller":
            self.controller.start(calls, self._target(0))
        return 0

    def _state(self) -> dict[str, Any]:
        controller = None if self.controller is None else self.controller.state_dict()
        return {"controller": controller, "bad": self.bad, "skipped": self.skipped, "price": self.price}

    def _standing(self, step: int) -> dict[str, float]:
        """What a report says besides the steps' own figures."""
        rate = self.optimizer.param_groups[0]["lr"]
        skipped = {"skipped_steps": self.skipped, "skipped_records": len(self.draws.skipped)}
        knob = {} if self.controller is None else {"knob": self.controller.dial.value}
        return {"target": self._target(step), "rate": rate, **knob, **skipped}

    def _target(self, step: int) -> float:
        return target(step, self.steps, self.config.reduction, self.config.ramp)

    def _step(self, step: int, records: list[Any], images: Tensor) -> dict[str, Any] | None:
        """One step of the optimiser, and its figures; None where the loss or the gradient was no number."""
        rate = float(self.config.rate or 0) * _schedule(step, self.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["times"] * rate
        pieces = self._gradients(step, records, images)
        if not pieces or not self._clip():
            return self._skip(step, records, images)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bad = 0
        figures = gathered(pieces, self.accelerator)
        self.price += _PRICE * figures.get("over", 0.0)
        if "saved" in figures and self.controller is not None and not self._is_soft(step):
            self.controller.step(figures["saved"], self._target(step))
        return figures

    def _clip(self) -> bool:
        """Gradients cut to the largest norm; whether they are numbers. What thresholds get from the price is not cut, nor may
        it cut what the weights learn."""
        groups = self.optimizer.param_groups
        weights = [p for group in groups for p in group["params"] if group["times"] == 1.0]
        norm: Any = self.accelerator.clip_grad_norm_(weights, self.config.clip)
        others = [p.grad for group in groups for p in group["params"] if group["times"] != 1.0 and p.grad is not None]
        if self.accelerator.scaler is not None:  # that is how it finds its scale
            return True
        return math.isfinite(norm) and all(bool(torch.isfinite(gradient).all()) for gradient in others)

    def _gradients(self, step: int, records: list[Any], images: Tensor) -> list[dict[str, Any]]:
        """Forward and backward, in `accumulate` pieces: the figures of each, none where a loss was no number."""
        config, a = self.config, self.accelerator
        self._soften(step)
        saving = self._target(step) if self._is_soft(step) else None
        options = {"measured": step % _MEASURED == 0, "saving": saving, "price": self.price}
        self.student.train()
        pieces, size = [], len(records) // config.accumulate
        for start in range(0, len(records), size):
            with nullcontext() if start + size >= len(records) else a.no_sync(self.student):
                part = images[start : start + size].to(a.device)
                figures = self.student(records[start : start + size], part, step, **options)
                loss = figures.pop("loss")
                if self._anywhere(not bool(torch.isfinite(loss))):
                    return []
                a.backward(loss / config.accumulate)
            pieces.append(figures)
        return pieces

    def _is_soft(self, step: int) -> bool:
        """Whether tokens are kept softly at a step, under a loss on their cost; otherwise the controller keeps the budget."""
        return self.config.reduction > 0 and self.config.budget == "learned" and step < _HARDENED * self.steps

    def _soften(self, step: int) -> None:
        """Less and less, and not at all in the end, so that the weights get used to it."""
        softness = _SOFT * (_HARD / _SOFT) ** (step / (_HARDENED * self.steps)) if self._is_soft(step) else 0.0
        towers = pruning(self.model).towers.values()
        for pruner in [module for tower in towers for module in tower.modules() if isinstance(module, Pruner)]:
            pruner.softness = softness

    def _skip(self, step: int, records: list[Any], images: Tensor) -> None:
        """Nothing is learnt from such a batch; too many in a row end the run."""
        self.optimizer.zero_grad()
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        if self.bad < self.config.max_bad:
            return
        file = self.folder / f"bad_batch_{step:08d}_{self.accelerator.process_index}.pt"
        torch.save({"step": step, "records": [repr(record) for record in records], "images": images}, file)
        raise BadLossError(
            f"{self.bad} losses in a row were no finite number, the last at step {step}; nothing was learnt from them. The "
            f"last batch is in {file}, the last whole checkpoint is of step {self.checkpoints.last_step()}. Lower the "
            "rate, or use precision='no'"
        )

    def _anywhere(self, here: bool) -> bool:
        """Whether something is so in any process."""
        if self.accelerator.num_processes == 1:
            return here
        flag: Any = torch.tensor(float(here), device=self.accelerator.device)
        total: Any = self.accelerator.reduce(flag, "sum")
        return bool(total > 0)


def calls_of(
    task: Any,
    records: Sequence[Any],
    prepare: Callable[[Any], Tensor],
    device: torch.device | str = "cpu",
    size: int = 16,
) -> list[Callable[..., Any]]:
    """Calls that put the records, one text each, to a model as the task does: batches for `budget`.

    Records whose pictures cannot be opened are left out; whoever examines or draws them tells of them.
    """
    calls: list[Callable[..., Any]] = []
    for start in range(0, len(records), size):
        opened = [(record, _opened(record, prepare)) for record in records[start : start + size]]
        there = [(_with_one_text(record), images) for record, images in opened if images is not None]
        if not there:
            continue
        some, images = list(map(list, zip(*there, strict=True)))
        images = torch.stack(images)
        texts = tuple(text.to(device) for text in task.texts(some)[0])
        calls.append(partial(task.answer, records=some, images=images.to(device), texts=texts))
    return calls


def _schedule(step: int, steps: int, warmup: float) -> float:
    """A linear rise over a share of the steps, then a cosine to 0."""
    rise = min((step + 1) / (warmup * steps), 1.0) if warmup > 0 else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def _freeze(host: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters of the dense model that are not trained. ValueError for a pattern that is nobody's."""
    for pattern in patterns:
        found = [parameter for name, parameter in host.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not found:
            some = ", ".join(name for name, _ in list(host.named_parameters())[:3])
            raise ValueError(f"freeze: no parameter is called {pattern!r}; they are called {some}, ...")
        for parameter in found:
            parameter.requires_grad_(False)


def _groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups, `times` the rate: matrices decay; vectors, the guide's anchors and thresholds do not."""
    groups = [
        {"params": [], "weight_decay": weight_decay, "times": 1.0},
        {"params": [], "weight_decay": 0.0, "times": 1.0},
        {"params": [], "weight_decay": 0.0, "times": _KEEPERS},
        {"params": [], "weight_decay": 0.0, "times": _GUIDE},
    ]
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            place = 2 if ".keeper." in name else 3 if ".guide." in name else 1 if parameter.ndim < 2 else 0
            groups[place]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _opened(record: Any, prepare: Callable[[Any], Tensor]) -> Tensor | None:
    """The images of a record, None where they cannot be opened."""
    try:
        return torch.stack([prepare(picture) for picture in record.pictures()])
    except OSError:
        return None


def _with_one_text(record: Any) -> Any:
    """A record with the first of its captions: an image and one text are what an instance costs."""
    return replace(record, captions=record.captions[:1]) if hasattr(record, "captions") else record


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """What a tracker takes: plain values by name."""
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()}
