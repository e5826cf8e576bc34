"""Trainer: steps, budget, checkpoints. Accelerate handles devices, processes and precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from ...data.shards import Shards
from ...evaluation.tasks import Task
from ...io.preprocessing import transforms
from ...pruning.model import get_pruning
from ...utils.progress import say
from ..accelerate_state import MIXED_PRECISION
from ..config import CompressConfig
from ..data.calibration import calibration_batches
from ..data.loader import RecordLoader, TrainLoader
from ..data.opener import RecordOpener
from ..data.shards import ShardLoader
from ..losses.decoding import DecodeWork
from ..losses.objectives import Objective, build_objective
from ..losses.train_module import DistillWeights, ExtraLoss, TrainModule
from ..progress import announced
from .budget import TrainBudget
from .checkpoints import Checkpoints
from .initialize import initialize
from .interrupts import InterruptHandler, Stopped
from .logger import History, MetricsLogger, available_trackers, loggable
from .metrics import reduce_metrics
from .optimizer import clip_gradients, freeze, lr_factor, parameter_groups, set_lr

_FIRST_RECORDS = 64  # that the guide and the knobs are fitted to


class BadLossError(FloatingPointError):
    """Too many losses in a row were not finite. The last batch is on disk, and so is the last checkpoint."""


@dataclass
class Trainer:
    """Trains a pruned model in a folder, and resumes from the folder's last checkpoint.

    Args:
        config: what to do.
        folder: where checkpoints, history and the trackers' files go.
        model: the pruned model, over its dense host.
        task: the task, made for the model.
        records: what to train on.
        teacher: the dense model that teaches, where something is distilled.
        extra: a further loss.

    Raises:
        ValueError: `batch_size` does not split into processes and `accumulate` equal parts, or is more than the records.
            Or a pattern of `freeze` fits no parameter, or the keepers have no knob.
        TypeError: the task cannot be trained.
        OSError: nothing can be read from the shards.
    """

    config: CompressConfig
    folder: Path
    model: nn.Module
    task: Task[Any]
    records: Sequence[Any] | Shards[Any]
    teacher: nn.Module | None = None
    extra: ExtraLoss | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.done = 0  # whole steps
        self.in_step = False
        self.skipped_steps, self.skipped_in_a_row = 0, 0  # whose losses were not finite
        self.decode_work: DecodeWork | None = None
        self.accelerator = self._build_accelerator()
        device = self.accelerator.device
        freeze(get_pruning(self.model).host, config.freeze)
        self.model.to(device)
        objective = build_objective(self.task, self.model, config.seed).to(device)
        self.loader = self._build_loader(objective)
        self.steps = config.steps or self.loader.steps(float(config.epochs or 1))
        teacher = None if self.teacher is None else self.teacher.to(device).eval()
        distill = DistillWeights(
            config.distill, config.distill_summaries, config.saliency_weight, config.distill_tokens
        )
        module = TrainModule(self.model, objective, config.align, teacher, distill, self.extra, config.losses)
        self.cost_meter = module.cost_meter
        groups = parameter_groups(module, float(config.weight_decay or 0))
        optimizer = torch.optim.AdamW(groups, lr=float(config.lr or 0))
        self.budget = TrainBudget(self.model, config, self.steps)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.accelerator)
        if not self.checkpoints.last_step():
            self._initialize()  # now, while every process has the whole model
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)

    def train(self) -> None:
        """Trains to the last step, from the last checkpoint if there is one.

        Raises:
            OSError: a checkpoint cannot be written, or nothing can be opened.
            BadLossError: `max_bad` losses in a row are not finite.
            Stopped: Ctrl-C or SIGTERM; there is a checkpoint of the last whole step.
        """
        self.done = self._restore()
        self.accelerator.init_trackers("vltprune", config=loggable(self.config.to_dict()))
        if self.accelerator.is_main_process:
            start = f"going on from step {self.done:,}" if self.done else "the first step"
            say(f"vltprune: training {self.steps:,} steps of {self.config.batch_size} records: {start}")
        logger = MetricsLogger(self.accelerator, History(self.folder / "history.jsonl"), self.done, self.steps)
        interrupts = InterruptHandler(self.accelerator.num_processes)
        try:
            with interrupts.installed(), closing(self.loader.batches(self.done, self.steps)) as batches:
                for step, (records, images) in enumerate(batches, self.done):
                    logger.add(self._step(step, records, images))
                    self._end_step(step, logger, interrupts)
        except KeyboardInterrupt as interrupt:
            if not isinstance(interrupt, Stopped) and not self.in_step and not interrupts.requested:
                self._save()  # an interrupt that was no signal, between two steps
            raise Stopped(self._where_it_stopped()) from None
        finally:
            logger.bar.close()

    def _end_step(self, step: int, logger: MetricsLogger, interrupts: InterruptHandler) -> None:
        """Reports and saves where that is due. Stopped, behind a checkpoint, where it is asked for."""
        is_last = self.done == self.steps
        if self.done % self.config.log_every == 0 or is_last:
            skipped = {"skipped_steps": self.skipped_steps, "skipped_records": len(self.loader.skipped)}
            logger.report(self.done, lr=self.optimizer.param_groups[0]["lr"], **self.budget.metrics(step), **skipped)
        stops = self._in_any_process(interrupts.requested)  # all processes end behind the same step
        if stops or self.done % self.config.checkpoint_every == 0 or is_last:
            self._save()
        if stops:
            raise Stopped

    def _step(self, step: int, records: list[Any], images: Tensor) -> dict[str, Any] | None:
        """One step of the optimizer, and its metrics; None where the loss or a gradient was not finite."""
        self.in_step = True
        set_lr(self.optimizer, float(self.config.lr or 0) * lr_factor(step, self.steps, self.config.warmup))
        pieces = self._backward(step, records, images)
        if pieces and self._clip_gradients():
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.skipped_in_a_row = 0
            metrics = self.budget.update(step, reduce_metrics(pieces, self.accelerator))
        else:
            metrics = self._skip(step, records, images)
        self.done, self.in_step = step + 1, False
        return metrics

    def _backward(self, step: int, records: list[Any], images: Tensor) -> list[dict[str, Any]]:
        """Forward and backward, in `accumulate` pieces: the metrics of each, none where a loss was not finite."""
        accumulate, accelerator = self.config.accumulate, self.accelerator
        self.budget.apply(step)
        options = {
            "measure_cost": self.budget.is_measured(step),
            "target_reduction": self.budget.target(step) if self.budget.is_soft(step) else None,
            "multiplier": self.budget.multiplier,
            "decode_work": self.decode_work,
        }
        self.module.train()
        pieces, size = [], len(records) // accumulate
        for start in range(0, len(records), size):
            is_last = start + size >= len(records)
            with nullcontext() if is_last else accelerator.no_sync(self.module):
                part = images[start : start + size].to(accelerator.device, non_blocking=True)
                metrics = self.module(records[start : start + size], part, step, **options)
                loss = metrics.pop("loss")
                if self._in_any_process(not bool(torch.isfinite(loss))):
                    return []
                accelerator.backward(loss / accumulate)
            pieces.append(metrics)
        return pieces

    def _clip_gradients(self) -> bool:
        return clip_gradients(self.optimizer, self.accelerator, self.config.max_grad_norm)

    def _skip(self, step: int, records: list[Any], images: Tensor) -> None:
        """Nothing is learned from such a batch; too many in a row end the run."""
        self.optimizer.zero_grad()
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.config.max_bad:
            return
        file = self.folder / f"bad_batch_{step:08d}_{self.accelerator.process_index}.pt"
        torch.save({"step": step, "records": [repr(record) for record in records], "images": images}, file)
        raise BadLossError(
            f"{self.skipped_in_a_row} losses in a row were no finite number, the last at step {step}; nothing was learned "
            f"from them. The last batch is in {file}, the last whole checkpoint is of step {self.checkpoints.last_step()}. "
            "Lower the learning rate (lr), or use dtype='float32'"
        )

    def _initialize(self) -> None:
        first, show = self.loader.first(_FIRST_RECORDS), self.accelerator.is_main_process
        with announced(f"opening the images of {len(first)} records to start from", show):
            batches = calibration_batches(self.task, first, self.loader.opener.prepare, self.accelerator.device)
        self.decode_work = initialize(self.model, batches, self.budget, self.cost_meter.meter, show)

    def _save(self) -> None:
        if self.done and self.done != self.checkpoints.last_step():
            self.checkpoints.save(self.done, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "budget": self.budget.state_dict(),
            "decode_work": None if self.decode_work is None else asdict(self.decode_work),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def _restore(self) -> int:
        """The step to go on from, with everything as it was."""
        state = self.checkpoints.restore()
        if state is None:
            return 0
        self.budget.load_state_dict(state["budget"])
        self.decode_work = None if state["decode_work"] is None else DecodeWork(**state["decode_work"])
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        return state["step"]

    def _where_it_stopped(self) -> str:
        """Where the same command resumes, for people to read."""
        last = self.checkpoints.last_step()
        if not self.done:
            return "stopped before the first step was whole; the same command begins anew"
        if last == self.done:
            return f"stopped after step {last:,} of {self.steps:,}; the same command resumes there"
        on = (
            f"resumes from step {last:,}, of the last checkpoint" if last else "begins anew: there is no checkpoint yet"
        )
        return f"stopped in the middle of step {self.done + 1:,} of {self.steps:,}; the same command {on}"

    def _build_accelerator(self) -> Accelerator:
        # a host may have weights that a step does not use
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        return Accelerator(
            mixed_precision=MIXED_PRECISION[self.config.dtype],
            log_with=available_trackers() or None,
            project_dir=str(self.folder),
            kwargs_handlers=[unused],
        )

    def _build_loader(self, objective: Objective) -> TrainLoader[Any]:
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

    def _in_any_process(self, here: bool) -> bool:
        """Whether something is so in any process."""
        if self.accelerator.num_processes == 1:
            return here
        total: Any = self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device), "sum")
        return bool(total > 0)
