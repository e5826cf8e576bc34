"""Training metrics: a progress bar, a history in JSON lines, and the trackers of Accelerate."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ...core import precision
from ...utils.files import write_text
from ...utils.progress import bar, say

_SHOWN = ("task", "align", "distill", "budget", "extra")
_KEPT, _SAVED, _COST = "kept ", "saved ", "macs "


@contextlib.contextmanager
def told(what: str, tell: bool = True, total: int | None = None) -> Iterator[tqdm]:
    """Says what is being done, as it begins, and gives a progress bar for it; nothing is shown unless `tell`."""
    if tell:
        say(f"vltprune: {what} ...")
    with bar(what, total, disable=not tell) as shown:
        yield shown


class History:
    """Rows of a file of JSON lines, each with the `step` it was written at."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file.is_file():
            whole = file.read_text(encoding="utf-8").splitlines(keepends=True)
            self.rows = [json.loads(line) for line in whole if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Forget what was reported after a step: a run that goes on from it reports it again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Watch:
    """The figures of the steps since the last report; only the first process writes."""

    def __init__(self, accelerator: Accelerator, history: History, start: int, steps: int):
        self.accelerator, self.history = accelerator, history
        if accelerator.is_main_process:
            history.rewind(start)
        pace = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs no animation
        self.bar = tqdm(
            initial=start,
            total=steps,
            desc="compressing",
            unit="step",
            mininterval=pace,
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        self._seen: list[Mapping[str, Any]] = []
        self._began = time.perf_counter()

    def add(self, figures: Mapping[str, Any] | None) -> None:
        """Those of one step; None for one that was skipped."""
        self._seen += [] if figures is None else [figures]
        self.bar.update()

    def report(self, step: int, **more: float) -> None:
        """Means since the last report, and `more`: a line of history, the bar's tail, the trackers' scalars."""
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
        for name in ("saved", *(name for name in row if name.startswith(_SAVED))):
            aim = name.replace("saved", "target")
            if name in row and aim in row:
                shown[name] = f"{row[name]:.1%} of {row[aim]:.1%}"
        kept = {name.removeprefix(_KEPT): row[name] for name in row if name.startswith(_KEPT)}
        tokens = {tower: " ".join(f"{n:.0f}" for n in left[1:]) for tower, left in kept.items()}
        self.bar.set_postfix(shown | tokens, refresh=False)


def _mean(values: Sequence[Tensor]) -> Tensor:
    each = torch.stack(list(values))
    return each.to(precision.widest_float(each.device)).mean(0)


def gathered(pieces: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> dict[str, Any]:
    """The figures of a step's pieces, as of `Student`, meant over them and over all processes: plain numbers.

    Where MACs were measured, `saved` is the share of the dense ones that was saved, and `saved image` that of the image
    tower's own.
    """
    means: dict[str, Tensor] = {}
    for name in pieces[0]:
        if name not in ("kept", "towers"):
            means[name] = _mean([piece[name] for piece in pieces])
    for tower in pieces[0].get("kept", ()):
        means[_KEPT + tower] = torch.stack([piece["kept"][tower] for piece in pieces]).mean(0)
        means[_COST + tower] = torch.stack([piece["towers"][tower] for piece in pieces]).mean(0)
    if accelerator.num_processes > 1:
        means = accelerator.reduce(means, "mean")
    figures: dict[str, Any] = {name: value.tolist() for name, value in means.items()}
    if "macs" in figures:
        figures["saved"] = 1 - figures["macs"] / figures["dense_macs"]
    for name in [name for name in figures if name.startswith(_COST)]:
        macs, dense = figures.pop(name)
        figures[_SAVED + name.removeprefix(_COST)] = 1 - macs / dense
    return figures


def trackers() -> list[Any]:
    """TensorBoard, where it is installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return []
    return ["tensorboard"]


def _by_layer(row: Mapping[str, Any]) -> dict[str, float]:
    kept = {name: row[name] for name in row if name.startswith(_KEPT)}
    return {f"{name}/{depth}": n for name, tokens in kept.items() for depth, n in enumerate(tokens)}


def by_tower(name: str, value: float | Mapping[str, float]) -> dict[str, float]:
    """A figure by its name; those of each tower, by their names."""
    return {f"{name} {tower}": one for tower, one in value.items()} if isinstance(value, Mapping) else {name: value}


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """What a tracker takes: plain values by name."""
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()}
