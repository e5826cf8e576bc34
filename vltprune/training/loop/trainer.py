"""Training loop: steps, budget, checkpoints. Accelerate handles devices, processes and precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from ...cost.guide_fit import fit_guide
from ...data.shards import Shards
from ...io.preprocessing import transforms
from ...pruning.model import get_pruning
from ...pruning.pruner import Pruner
from ...utils.modes import evaluating
from ...utils.progress import counted, say
from ..config import CompressConfig
from ..data.calibration import calls_of
from ..data.loader import RecordLoader, TrainLoader
from ..data.opener import RecordOpener
from ..data.shards import ShardLoader
from ..losses.decoding import Searched
from ..losses.objectives import Objective, objective_of
from ..losses.train_module import Extra, Student
from .checkpoints import Checkpoints
from .controller import Target, Turns, target
from .interrupts import Stop, Stopped
from .metrics import History, Watch, by_tower, gathered, plain, told, trackers
from .optimizer import freeze, parameter_groups, schedule

# the cost is measured, and the knob turned, every so many steps; so often in a run, at least
_MEASURED, _OFTEN = 5, 200
_SOFT, _HARD = 0.5, 0.01  # soft_temperature at first and at last, in standard deviations of the scores
_HARDENED = 0.5  # the share of the steps after which tokens stay or go, as in evaluation
_PRICE = 0.05  # how much dearer each step makes a share of the dense MACs that is too much
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
    searched: Searched | None = None  # what a decoder does in evaluation
    done: int = 0  # whole steps
    is_whole: bool = True  # whether no step is half done

    def __post_init__(self) -> None:
        config, device = self.config, self._accelerate().device
        freeze(get_pruning(self.model).host, config.freeze)
        self.model.to(device)
        objective = objective_of(self.task, self.model, config.seed).to(device)
        self.loader = self._loader(objective)
        self.steps = config.steps or self.loader.steps(float(config.epochs or 1))
        teacher = None if self.teacher is None else self.teacher.to(device).eval()
        taught = (config.distill, config.distill_summaries)
        student = Student(self.model, objective, config.align, teacher, taught, config.scores_taught, self.extra)
        self.cost_meter = student.cost_meter
        optimizer = torch.optim.AdamW(
            parameter_groups(student, float(config.weight_decay or 0)), lr=float(config.lr or 0)
        )
        costs = dict.fromkeys((config.reduction, *config.serve))
        self.turns = Turns(self.model, tuple(costs)) if config.reduction else None
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.accelerator)
        if not self.checkpoints.last_step():
            with evaluating(self.model):  # here, and not again for each of many measurements
                self._place_first()  # now, while every process has the whole model
        self.student, self.optimizer = self.accelerator.prepare(student, optimizer)

    def train(self) -> None:
        """To the last step, from the last checkpoint if there is one.

        OSError for a checkpoint that cannot be written; BadLossError after `max_bad` losses in a row that are no number.
        Stopped, behind a checkpoint of the last whole step, for Ctrl-C and SIGTERM.
        """
        self.done = self._begin()
        self.accelerator.init_trackers("vltprune", config=plain(self.config.to_dict()))
        if self.accelerator.is_main_process:
            on = f"going on from step {self.done:,}" if self.done else "the first step"
            say(f"vltprune: training {self.steps:,} steps of {self.config.batch_size} records: {on}")
        watch = Watch(self.accelerator, History(self.folder / "history.jsonl"), self.done, self.steps)
        stop = Stop(self.accelerator.num_processes)
        try:
            with stop.watched():
                self._train(watch, stop)
        except KeyboardInterrupt as interrupt:
            if not isinstance(interrupt, Stopped) and self.is_whole and not stop.asked:
                self._save()  # an interrupt that was no signal, between two steps
            raise Stopped(self._stopped()) from None
        finally:
            watch.bar.close()

    def _train(self, watch: Watch, stop: Stop) -> None:
        with closing(self.loader.batches(self.done, self.steps)) as batches:
            for step, (records, images) in enumerate(batches, self.done):
                watch.add(self._step(step, records, images))
                if self.done % self.config.log_every == 0 or self.done == self.steps:
                    watch.report(self.done, **self._standing(step))
                asked = self._anywhere(stop.asked)  # all processes end behind the same step
                if asked or self.done % self.config.checkpoint_every == 0 or self.done == self.steps:
                    self._save()
                if asked:
                    raise Stopped

    def _save(self) -> None:
        if self.done and self.done != self.checkpoints.last_step():
            self.checkpoints.save(self.done, self._state())

    def _stopped(self) -> str:
        """Where the same command goes on, for people to read."""
        last = self.checkpoints.last_step()
        if not self.done:
            return "stopped before the first step was whole; the same command begins anew"
        if last == self.done:
            return f"stopped after step {last:,} of {self.steps:,}; the same command goes on from there"
        on = (
            f"goes on from step {last:,}, of the last checkpoint" if last else "begins anew: there is no checkpoint yet"
        )
        return f"stopped in the middle of step {self.done + 1:,} of {self.steps:,}; the same command {on}"

    def _accelerate(self) -> Accelerator:
        idle = DistributedDataParallelKwargs(find_unused_parameters=True)  # of weights that a host may have
        self.accelerator = Accelerator(
            mixed_precision=self.config.precision,
            log_with=trackers() or None,
            project_dir=str(self.folder),
            kwargs_handlers=[idle],
        )
        return self.accelerator

    def _loader(self, objective: Objective) -> TrainLoader[Any]:
        config, processes = self.config, self.accelerator.num_processes
        assert config.batch_size is not None
        if config.batch_size % (processes * config.accumulate):
            raise ValueError(
                f"batch_size={config.batch_size} does not split into {processes} processes x accumulate="
                f"{config.accumulate} equal parts"
            )
        kind: Any = ShardLoader if isinstance(self.records, Shards) else RecordLoader
        return kind(
            self.records,
            RecordOpener(transforms(self.model), config.seed, config.augment, objective.check),
            config.batch_size,
            self.accelerator.process_index,
            processes,
            config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _begin(self) -> int:
        """The step to go on from, with everything as it was."""
        state = self.checkpoints.restore()
        if state is None:
            return 0
        if self.turns is not None:
            self.turns.load_state_dict(state["turns"])
        self.bad, self.skipped, self.price = state["bad"], state["skipped"], state["price"]
        self.searched = None if state["searched"] is None else Searched(**state["searched"])
        return state["step"]

    def _place_first(self) -> None:
        """Where a fresh run's guide and knob begin, and what decoding costs."""
        first, tell = self.loader.first(_START), self.accelerator.is_main_process
        with told(f"opening the pictures of {len(first)} records to start from", tell):
            calls = calls_of(self.task, first, self.loader.opener.prepare, self.accelerator.device)
        guide = get_pruning(self.model).guide
        if guide is not None and guide.is_untrained:
            with told("placing the guide's anchors among their tokens, by k-means", tell) as bar:
                fit_guide(self.model, counted(calls, bar), self.config.seed, progress=False)
        if self.turns is not None and self.config.budget == "controller":
            with told("measuring MACs, to set the knob", tell) as bar:
                self.turns.start(calls, self._target(0), bar.update, self.cost_meter.meter)
        if self.turns is not None:
            with told("measuring what decoding costs, where there is a decoder", tell) as bar:
                self.searched = Searched.by(self.model, counted(calls, bar))

    def _state(self) -> dict[str, Any]:
        turns = None if self.turns is None else self.turns.state_dict()
        searched = None if self.searched is None else asdict(self.searched)
        more = {"bad": self.bad, "skipped": self.skipped, "price": self.price}
        return {"turns": turns, "searched": searched, **more}

    def _standing(self, step: int) -> dict[str, float]:
        """What a report says besides the steps' own figures."""
        lr = self.optimizer.param_groups[0]["lr"]
        skipped = {"skipped_steps": self.skipped, "skipped_records": len(self.loader.skipped)}
        knob = {} if self.turns is None else by_tower("knob", self.turns.controllers[0].value)
        return {**by_tower("target", self._target(step)), "lr": lr, **knob, **skipped}

    def _target(self, step: int, place: int = 0) -> Any:
        """What to save at a step, as one of the costs has it: a share, or one of each tower's own."""
        cost: Target = 0.0 if self.turns is None else self.turns.costs[place]
        if isinstance(cost, Mapping):
            return {tower: target(step, self.steps, share, self.config.ramp) for tower, share in cost.items()}
        return target(step, self.steps, cost, self.config.ramp)

    def _place(self, step: int) -> int:
        """Which of the costs a step learns; thresholds learn softly at the first alone."""
        return 0 if self.turns is None or self._is_soft(step) else self.turns.place(step)

    def _step(self, step: int, records: list[Any], images: Tensor) -> dict[str, Any] | None:
        """One step of the optimizer, and its figures; None where the loss or the gradient was no number."""
        self.is_whole = False
        figures = self._learn(step, records, images)
        self.done, self.is_whole = step + 1, True
        return figures

    def _learn(self, step: int, records: list[Any], images: Tensor) -> dict[str, Any] | None:
        lr = float(self.config.lr or 0) * schedule(step, self.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["times"] * lr
        pieces = self._gradients(step, records, images)
        if not pieces or not self._clip():
            return self._skip(step, records, images)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bad = 0
        figures = gathered(pieces, self.accelerator)
        self.price += _PRICE * figures.get("over", 0.0)
        place = self._place(step)
        if "saved" in figures and self.turns is not None and not self._is_soft(step):
            wanted = self._target(step, place)
            saved = {t: figures[f"saved {t}"] for t in wanted} if isinstance(wanted, Mapping) else figures["saved"]
            self.turns.controllers[place].step(saved, wanted)
        if self.turns is None or place == 0:
            return figures
        cost = f"{self.turns.costs[place]:g}"  # beside the figures of the cost that was asked for, not among them
        return {f"{name} {cost}": figures[name] for name in ("task", "saved") if name in figures}

    def _clip(self) -> bool:
        """Gradients cut to the largest norm; whether they are numbers. What thresholds get from the price is not cut, nor may
        it cut what the weights learn."""
        groups = self.optimizer.param_groups
        weights = [p for group in groups for p in group["params"] if group["times"] == 1.0]
        norm: Any = self.accelerator.clip_grad_norm_(weights, self.config.max_grad_norm)
        others = [p.grad for group in groups for p in group["params"] if group["times"] != 1.0 and p.grad is not None]
        if self.accelerator.scaler is not None:  # that is how it finds its scale
            return True
        return math.isfinite(norm) and all(bool(torch.isfinite(gradient).all()) for gradient in others)

    def _gradients(self, step: int, records: list[Any], images: Tensor) -> list[dict[str, Any]]:
        """Forward and backward, in `accumulate` pieces: the figures of each, none where a loss was no number."""
        config, a = self.config, self.accelerator
        self._set_pruners(step)
        saving = self._target(step) if self._is_soft(step) else None
        options: dict[str, Any] = {"measured": self._is_measured(step), "saving": saving, "price": self.price}
        options["searched"] = self.searched
        self.student.train()
        pieces, size = [], len(records) // config.accumulate
        for start in range(0, len(records), size):
            with nullcontext() if start + size >= len(records) else a.no_sync(self.student):
                part = images[start : start + size].to(a.device, non_blocking=True)
                figures = self.student(records[start : start + size], part, step, **options)
                loss = figures.pop("loss")
                if self._anywhere(not bool(torch.isfinite(loss))):
                    return []
                a.backward(loss / config.accumulate)
            pieces.append(figures)
        return pieces

    def _is_measured(self, step: int) -> bool:
        every = max(min(_MEASURED, self.steps // _OFTEN), 1)
        if self.turns is None or self._is_soft(step):
            return step % every == 0
        return self.turns.is_measured(step, every)

    def _is_soft(self, step: int) -> bool:
        """Whether tokens are kept softly at a step, under a loss on their cost; otherwise the controller keeps the budget."""
        return self.config.budget == "learned" and self.turns is not None and step < _HARDENED * self.steps

    def _set_pruners(self, step: int) -> None:
        """Sets the budget of the step's cost, and a soft temperature that falls to none, so that the weights get used to it."""
        if self.turns is not None:
            self.turns.take(self._place(step))
        soft_temperature = _SOFT * (_HARD / _SOFT) ** (step / (_HARDENED * self.steps)) if self._is_soft(step) else 0.0
        towers = get_pruning(self.model).towers.values()
        for pruner in [module for tower in towers for module in tower.modules() if isinstance(module, Pruner)]:
            pruner.soft_temperature = soft_temperature

    def _skip(self, step: int, records: list[Any], images: Tensor) -> None:
        """Nothing is learned from such a batch; too many in a row end the run."""
        self.optimizer.zero_grad()
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        if self.bad < self.config.max_bad:
            return
        file = self.folder / f"bad_batch_{step:08d}_{self.accelerator.process_index}.pt"
        torch.save({"step": step, "records": [repr(record) for record in records], "images": images}, file)
        raise BadLossError(
            f"{self.bad} losses in a row were no finite number, the last at step {step}; nothing was learned from them. The "
            f"last batch is in {file}, the last whole checkpoint is of step {self.checkpoints.last_step()}. Lower the "
            "rate, or use precision='no'"
        )

    def _anywhere(self, here: bool) -> bool:
        """Whether something is so in any process."""
        if self.accelerator.num_processes == 1:
            return here
        total: Any = self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device), "sum")
        return bool(total > 0)
