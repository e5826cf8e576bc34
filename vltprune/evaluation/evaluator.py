"""Evaluator: runs a model on every record of a data set, logs the answers, and scores them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cost import describe
from ..cost.sample_cost import SampleCost, SampleCostMeter
from ..data import Loader, Record, Skipped, fingerprint
from ..pruning.trace import collect
from ..utils.modes import evaluating
from .results_log import ResultsLog
from .tasks import EvaluationStage, Matching, SupportsUnscored


@dataclass
class Evaluator:
    """A task set to a model on a device; `run` answers what the log does not have yet, `summarize` sums it up.

    cost_meter: the model's, where there is one already. Answers are those of evaluation, whatever mode the model is in.
    """

    task: EvaluationStage[Any]
    model: nn.Module
    device: str = "cpu"
    cost_meter: SampleCostMeter | None = None

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self._cost_meter = self.cost_meter or SampleCostMeter(self.model)
        self._dense_costs: dict[Any, list[SampleCost]] = {}

    @torch.no_grad()
    def run(self, loader: Loader[Any], log: ResultsLog, tick: Callable[[int], object] | None = None) -> None:
        """Answers the loader's records in order, a row each in the log, from the first that has none.

        tick: called with the number of rows just written. A record whose pictures cannot be opened, or whose texts the model
        cannot read, gets a row that says so; where the loader is strict, OSError and ValueError. ValueError for a log of an
        earlier version, whose costs were told otherwise, and for one with a row whose pictures are not, by content, those
        that it was answered by.
        """
        if any("macs" in row and "instances" not in row for row in log.rows):
            raise ValueError(
                "these results were begun by an earlier version, which did not tell padding, or whose the saving is, apart: "
                "remove their folder, or choose another output, and they are measured anew"
            )
        _check_pictures(loader, log)
        loader = replace(loader, start=len(log.rows), skipped=[])
        with evaluating(self.model, self._cost_meter.model):
            for records, images in loader:
                places = self._legible(records, loader)
                rows = self._answer([records[i] for i in places], images[places].to(self.device)) if places else []
                _write(rows, loader, log, tick)
            _write([], loader, log, tick)

    def _legible(self, records: Sequence[Record], loader: Loader[Any]) -> list[int]:
        """The places of the records whose texts have token ids; the others go to what the loader skipped."""
        try:
            self.task.tokenize(records)
            return [*range(len(records))]
        except ValueError:
            places = []
        for place, record in enumerate(records):
            try:
                self.task.tokenize([record])
                places.append(place)
            except ValueError as error:
                if loader.strict:
                    raise ValueError(f"entry {record.index}: {error}") from error
                loader.skipped.append(Skipped(record.index, str(error)))
        return places

    def _answer(self, records: Sequence[Record], images: Tensor) -> list[dict[str, Any]]:
        texts, counts = self.task.tokenize(records)
        texts = tuple(text.to(self.device) for text in texts)
        self._wait()
        start = time.perf_counter()
        with collect(threads=False) as traces:
            answers = self.task.predict(self.model, records, images, texts)
        self._wait()
        seconds = (time.perf_counter() - start) / len(records)

        spent = (
            self._spent_dense(records, images, texts, counts)
            if self._cost_meter.is_dense
            else self._cost_meter(traces, counts)
        )
        return [
            {
                "index": record.index,
                **answer,
                **asdict(cost),
                "seconds": seconds,
                "pictures": fingerprint.hash_images(record),
            }
            for record, answer, cost in zip(records, answers, spent, strict=True)
        ]

    def _spent_dense(
        self, records: Sequence[Record], images: Tensor, texts: tuple[Tensor, ...], counts: list[int]
    ) -> list[SampleCost]:
        """A dense model's costs depend on its inputs' shapes and its texts' lengths, and its keep-all twin is run once for
        each; with a decoder, they depend on what is said too, and the twin says it again every time."""
        lengths = (tuple(mask.sum(-1).tolist()) for mask in texts[1:])
        key = (images.shape, *(text.shape for text in texts), *lengths, *counts)
        if key in self._dense_costs:
            return self._dense_costs[key]
        with collect(threads=False) as traces:
            self.task.predict(self._cost_meter.model, records, images, texts)
        costs = [replace(cost, kept={}) for cost in self._cost_meter(traces, counts)]
        if not any(trace.decode_stats for trace in traces):
            self._dense_costs[key] = costs
        return costs

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def _check_pictures(loader: Loader[Any], log: ResultsLog) -> None:
    """ValueError where a row's pictures are other files now; where the loader is strict, OSError for a row that was skipped."""
    for place, row in enumerate(log.rows[: len(loader.records)]):
        if row.get("pictures") is not None:
            record = loader.records[place]
            if fingerprint.hash_images(record) != row["pictures"]:
                raise ValueError(
                    f"entry {record.index}: its pictures, {', '.join(map(str, record.images))}, are not those that it was "
                    "answered by: choose another --output, or remove that folder"
                )
        if loader.strict and "skipped" in row and (loader.stop is None or place < loader.stop):
            raise OSError(f"entry {row['index']}: {row['skipped']}")


def _write(
    rows: list[dict[str, Any]], loader: Loader[Any], log: ResultsLog, tick: Callable[[int], object] | None
) -> None:
    """Rows, and those of what was skipped meanwhile, in the records' order: how many there are says where to go on."""
    rows = sorted(
        [*rows, *({"index": one.index, "skipped": one.reason} for one in loader.skipped)], key=lambda row: row["index"]
    )
    loader.skipped.clear()
    for place, row in enumerate(rows, start=len(log.rows)):
        if "pictures" not in row:
            row["pictures"] = fingerprint.hash_images(loader.records[place])
    if rows:
        log.add(rows)
    if tick is not None:
        tick(len(rows))


def summarize(
    task: EvaluationStage[Any],
    rows: Sequence[Mapping[str, Any]],
    weight: Callable[[Mapping[str, Any]], float] = lambda row: 1,
) -> dict[str, Any]:
    """The rows of all records, summed up: scores, means an instance, throughput, what was skipped. ValueError for none.

    weight: how much a row counts in the means of costs.

    unscored  what could not be scored on this machine, and why
    macs      multiply-accumulates of an instance: the images of a record and one of its texts; of a dense model on the tokens
              that are there, as `dense_macs`. macs_saved: the share of these that is saved; padding: what the dense
              model spends on padding besides
    towers    per tower: [MACs, dense MACs] of one of its images or texts; tower_padding: likewise
    reductions   per tower: the share of its own dense MACs that is saved; shares: its part of all that is saved, where
              anything is
    kept      per tower: tokens that entered, then leaving each block, mean; empty for a dense model
    records_per_second   of the model's calls alone, without reading pictures and texts
    """
    answered = [row for row in rows if "skipped" not in row]
    skipped = [dict(row) for row in rows if "skipped" in row]
    if not answered:
        first = f": {skipped[0]['skipped']}" if skipped else ""
        raise ValueError(f"none of the {len(rows)} records could be answered{first}")
    weights = [weight(row) for row in answered]

    def mean(*path: str) -> Any:
        values: Any = answered
        for key in path:
            values = [value[key] for value in values]
        return np.average(values, axis=0, weights=weights).tolist()

    macs, dense = mean("macs"), mean("dense_macs")
    towers = {tower: mean("towers", tower) for tower in answered[0]["towers"]}
    scores = _finite(task.score(answered), len(answered))
    return {
        "scores": scores,
        "unscored": task.unscored(scores) if isinstance(task, SupportsUnscored) else {},
        "records": len(answered),
        "macs": macs,
        "dense_macs": dense,
        "macs_saved": 1 - macs / dense,
        "padding": mean("padding"),
        "towers": towers,
        "reductions": {tower: 1 - pruned / whole for tower, (pruned, whole) in towers.items()},
        "shares": describe.saving_by_tower({tower: _spent(answered, weights, tower) for tower in towers}, dense - macs),
        "tower_padding": {tower: mean("tower_padding", tower) for tower in answered[0]["tower_padding"]},
        "kept": {tower: mean("kept", tower) for tower in answered[0]["kept"]},
        "records_per_second": len(answered) / sum(row["seconds"] for row in answered),
        "skipped": skipped,
    }


def _finite(scores: dict[str, float], records: int) -> dict[str, float]:
    """The same scores. FloatingPointError for one that is NaN or infinite."""
    if wrong := [name for name, score in scores.items() if not math.isfinite(score)]:
        raise FloatingPointError(f"{wrong[0]} of {records} records is {scores[wrong[0]]}, which is no score")
    return scores


def _spent(rows: Sequence[Mapping[str, Any]], weights: Sequence[float], tower: str) -> tuple[float, float]:
    """MACs, and dense MACs, of all images or texts of a tower that an instance has, mean."""
    each = [[row["instances"][tower] * macs for macs in row["towers"][tower]] for row in rows]
    macs, dense = np.average(each, axis=0, weights=weights).tolist()
    return macs, dense


def summarize_matching(matching: Matching, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of a second stage, summed up. ValueError for none.

    macs, dense_macs: of a pair whose image is encoded already, the mean of all; kept: the tokens of its text.
    """
    found = summarize(matching, rows, lambda row: row["pairs"])
    pairs, seconds = (sum(row[key] for row in rows if "pairs" in row) for key in ("pairs", "seconds"))
    image = found["towers"]["image"]
    return {
        "k_test": matching.most,
        "scores": found["scores"],
        "pairs": pairs,
        "pairs_per_second": pairs / seconds,
        "macs": found["macs"] - image[0],
        "dense_macs": found["dense_macs"] - image[1],
        "padding": found["padding"] - found["tower_padding"]["image"],
        "kept": {tower: tokens for tower, tokens in found["kept"].items() if tower != "image"},
        "skipped": found["skipped"],
    }
