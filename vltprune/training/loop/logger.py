"""Metrics logger: a progress bar, a history in JSON lines, and the trackers of Accelerate."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from ...utils.files import write_text
from .metrics import KEPT, SAVED

_SHOWN = ("task", "align", "distill", "budget", "extra")


class History:
    """Rows of a file of JSON lines, each with the `step` it was written at."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            self.rows = [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Removes the rows after a step: a run that resumes from it writes them again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row to the file."""
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class MetricsLogger:
    """Collects the metrics of steps and reports their means; only the first process writes.

    Args:
        accelerator: Accelerate's; its trackers get the scalars.
        history: the run's history, which is rewound to `start`.
        start: steps that are done already.
        steps: steps of the whole run.
    """

    def __init__(self, accelerator: Accelerator, history: History, start: int, steps: int):
        self.accelerator, self.history = accelerator, history
        if accelerator.is_main_process:
            history.rewind(start)
        seconds_between = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs no animation
        self.bar = tqdm(
            initial=start,
            total=steps,
            desc="compressing",
            unit="step",
            mininterval=seconds_between,
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        self._seen: list[Mapping[str, Any]] = []
        self._began = time.perf_counter()

    def add(self, metrics: Mapping[str, Any] | None) -> None:
        """Takes the metrics of one step; None for one that was skipped."""
        self._seen += [] if metrics is None else [metrics]
        self.bar.update()

    def report(self, step: int, **more: float) -> None:
        """Writes means since the last report, and `more`: to the history, behind the bar, to the trackers.

        Args:
            step: of the run; the row's `step`.
            **more: further numbers, written as they are.
        """
        seen, self._seen = self._seen, []
        seconds, self._began = time.perf_counter() - self._began, time.perf_counter()
        if not seen or not self.accelerator.is_main_process:
            return
        names = dict.fromkeys(name for one in seen for name in one)
        means = {name: np.mean([one[name] for one in seen if name in one], 0).tolist() for name in names}
        row = {"step": step, **means, **more, "seconds": seconds / len(seen)}
        self.history.add(row)
        self._show(row)
        scalars = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        self.accelerator.log(scalars | _by_layer(row), step=step)

    def _show(self, row: Mapping[str, Any]) -> None:
        shown = {name: f"{row[name]:.3g}" for name in _SHOWN if name in row}
        for name in ("saved", *(name for name in row if name.startswith(SAVED))):
            target = name.replace("saved", "target")
            if name in row and target in row:
                shown[name] = f"{row[name]:.1%} of {row[target]:.1%}"
        kept = {name.removeprefix(KEPT): row[name] for name in row if name.startswith(KEPT)}
        tokens = {tower: " ".join(f"{n:.0f}" for n in counts[1:]) for tower, counts in kept.items()}
        self.bar.set_postfix(shown | tokens, refresh=False)


def available_trackers() -> list[Any]:
    """TensorBoard, where it is installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return []
    return ["tensorboard"]


def loggable(config: dict[str, Any]) -> dict[str, Any]:
    """A config as a tracker takes it: plain values by name."""
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()}


def _by_layer(row: Mapping[str, Any]) -> dict[str, float]:
    kept = {name: row[name] for name in row if name.startswith(KEPT)}
    return {f"{name}/{depth}": n for name, counts in kept.items() for depth, n in enumerate(counts)}
