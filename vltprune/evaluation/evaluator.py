"""Evaluator: runs a model on every record of a data set, logs the answers, and scores them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from ..cost import describe
from ..cost.sample_cost import SampleCost, SampleCostMeter
from ..data import Loader, Skipped, fingerprint
from ..data.records import R
from ..pruning.trace import collect
from ..utils.modes import evaluating
from .processes import Processes
from .results_log import ResultsLog, Row
from .tasks import EvaluationStage, Matching, SupportsUnscored

ALONE = Processes()


class Evaluator(Generic[R]):
    """Evaluates a model on a task: `run` logs a row for each record, `summarize` turns the rows into scores and costs.

    Attributes:
        task: The task, set to the model.
        model: The model, dense or pruned; it is evaluated in evaluation mode, whatever mode it is in.
        device: The device that it runs on.
        cost_meter: What measures the cost of each record.
        processes: The processes that share the records; each has an evaluator of its own, with the same model.
    """

    def __init__(
        self,
        task: EvaluationStage[R],
        model: nn.Module,
        device: str = "cpu",
        cost_meter: SampleCostMeter | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Move the model to the device.

        Args:
            task: As of the class.
            model: As of the class.
            device: As of the class.
            cost_meter: The model's cost meter, where there is one already.
            processes: As of the class.
        """
        self.task = task
        self.model = model.to(device)
        self.device = device
        self.cost_meter = cost_meter or SampleCostMeter(model)
        self.processes = processes
        self._dense_costs: dict[tuple[object, ...], list[SampleCost]] = {}

    @torch.no_grad()
    def run(self, loader: Loader[R], log: ResultsLog, tick: Callable[[int], object] | None = None) -> None:
        """Evaluate the loader's records in order, from the first that has no row in the log.

        A record whose images cannot be decoded, or whose texts the model cannot read, gets a row with the reason. Several
        processes take turns at the batches that one alone would have, and each of them gets all rows.

        Args:
            loader: The records and their images; the same in all processes.
            log: The log; it gets one row a record. All processes begin with the same rows.
            tick: Called with the number of rows just written.

        Raises:
            OSError, ValueError: If the loader is strict, for a record that cannot be evaluated.
            ValueError: If the log is of an earlier version, or if a row's images have changed since.
            ProcessError: If another process failed.
        """
        with self.processes.together():
            if self.processes.is_main:
                _check_log(loader, log)
        answered = self._answer(
            replace(loader, start=len(log.rows), skipped=[], part=self.processes.rank, parts=self.processes.count)
        )
        with evaluating(self.model, self.cost_meter.model):
            while True:
                with self.processes.together():
                    batch = next(answered, [])
                rows = [row for part in self.processes.gather(batch) for row in part]
                if not rows:
                    return
                log.add(rows)
                if tick is not None:
                    tick(len(rows))

    def _answer(self, loader: Loader[R]) -> Iterator[list[dict[str, Any]]]:
        """The rows of each batch of the loader, skipped records included, in the records' order."""
        places = itertools.chain.from_iterable(loader.batches)
        size, rows = loader.batch_size, []
        for records, images in loader:
            valid = self._tokenizable(records, loader)
            answers = self._predict([records[i] for i in valid], images[valid].to(self.device)) if valid else []
            rows += _with_skipped(answers, loader, places)
            # more than one batch where the loader left out some, all of whose records are skipped
            while len(rows) >= size:
                yield rows[:size]
                rows = rows[size:]
        rows += _with_skipped([], loader, places)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def _tokenizable(self, records: Sequence[R], loader: Loader[R]) -> list[int]:
        """The batch indices of the records whose texts can be tokenized; the others are listed as skipped."""
        try:
            self.task.tokenize(records)
            return [*range(len(records))]
        except ValueError:
            valid = []
        for i, record in enumerate(records):
            try:
                self.task.tokenize([record])
                valid.append(i)
            except ValueError as error:
                if loader.strict:
                    raise ValueError(f"entry {record.index}: {error}") from error
                loader.skipped.append(Skipped(record.index, str(error)))
        return valid

    def _predict(self, records: Sequence[R], images: Tensor) -> list[dict[str, Any]]:
        texts, counts = self.task.tokenize(records)
        texts = tuple(text.to(self.device) for text in texts)
        self._synchronize()
        start = time.perf_counter()
        with collect(threads=False) as traces:
            predictions = self.task.predict(self.model, records, images, texts)
        self._synchronize()
        seconds = (time.perf_counter() - start) / len(records)

        costs = (
            self._dense_cost(records, images, texts, counts)
            if self.cost_meter.is_dense
            else self.cost_meter(traces, counts)
        )
        return [
            {
                "index": record.index,
                **prediction,
                **asdict(cost),
                "seconds": seconds,
                "image_hash": fingerprint.hash_images(record),
            }
            for record, prediction, cost in zip(records, predictions, costs, strict=True)
        ]

    def _dense_cost(
        self, records: Sequence[R], images: Tensor, texts: tuple[Tensor, ...], counts: list[int]
    ) -> list[SampleCost]:
        """The costs of a dense model, from the traces of its copy that is pruned and keeps all tokens.

        They depend on the shapes of the inputs and the lengths of the texts, and are measured once for each. With a decoder
        they depend on the generated text too, and are measured every time.
        """
        lengths = (tuple(mask.sum(-1).tolist()) for mask in texts[1:])
        key = (images.shape, *(text.shape for text in texts), *lengths, *counts)
        if key in self._dense_costs:
            return self._dense_costs[key]
        with collect(threads=False) as traces:
            self.task.predict(self.cost_meter.model, records, images, texts)
        costs = [replace(cost, kept={}) for cost in self.cost_meter(traces, counts)]
        if not any(trace.decode_stats for trace in traces):
            self._dense_costs[key] = costs
        return costs

    def _synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def _check_log(loader: Loader[R], log: ResultsLog) -> None:
    """ValueError for rows of an earlier version or of other images; OSError for a skipped one where the loader is strict."""
    if any("macs" in row and "instances" not in row for row in log.rows):
        raise ValueError(
            "these results are of an earlier version, which did not record padding and savings by tower: remove their "
            "folder, or choose another --output"
        )
    for i, row in enumerate(log.rows[: len(loader.records)]):
        if row.get("image_hash") is not None:
            record = loader.records[i]
            if fingerprint.hash_images(record) != row["image_hash"]:
                raise ValueError(
                    f"entry {record.index}: its images, {', '.join(map(str, record.images))}, have changed since it was "
                    "evaluated: choose another --output, or remove that folder"
                )
        if loader.strict and "skipped" in row and (loader.stop is None or i < loader.stop):
            raise OSError(f"entry {row['index']}: {row['skipped']}")


def _with_skipped(answers: list[dict[str, Any]], loader: Loader[R], places: Iterator[int]) -> list[dict[str, Any]]:
    """The rows of the next records, answered or skipped by the loader, in order. places: Where those records stand."""
    skipped: list[dict[str, Any]] = [{"index": one.index, "skipped": one.reason} for one in loader.skipped]
    loader.skipped.clear()
    rows = sorted([*answers, *skipped], key=lambda row: row["index"])
    for row, place in zip(rows, places, strict=False):
        if "skipped" in row:
            row["image_hash"] = fingerprint.hash_images(loader.records[place])
    return rows


def summarize(
    task: EvaluationStage[Any],
    rows: Sequence[Row],
    weight: Callable[[Row], float] = lambda row: 1,
) -> dict[str, Any]:
    """Summarize the rows of all records.

    Args:
        task: The task that the rows are of.
        rows: The rows of the log.
        weight: The weight of a row in the means of costs.

    Returns:
        A mapping of plain JSON values:

        - scores: the metrics, shares of 1; unscored: what could not be scored on this machine, and why
        - records: how many were evaluated; skipped: the rows of those that were not
        - macs, dense_macs: multiply-accumulates of an instance (a record's images and one of its texts), and the dense
          model's, on tokens that are no padding
        - macs_saved: the share that is saved
        - padding: multiply-accumulates that the dense model spends on padding besides
        - towers: per tower, [MACs, dense MACs] of one of its images or texts; tower_padding: the same for padding
        - reductions: per tower, the saved share of its own dense MACs; shares: its part of all that is saved
        - kept: per tower, mean tokens that entered, then mean tokens that left each block; empty for a dense model
        - records_per_second: of the model's calls alone, without decoding and tokenizing

    Raises:
        ValueError: If no record was evaluated.
        FloatingPointError: If a score is NaN or infinite.
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
        "shares": describe.saving_by_tower(
            {tower: _instance_macs(answered, weights, tower) for tower in towers}, dense - macs
        ),
        "tower_padding": {tower: mean("tower_padding", tower) for tower in answered[0]["tower_padding"]},
        "kept": {tower: mean("kept", tower) for tower in answered[0]["kept"]},
        "records_per_second": len(answered) / sum(row["seconds"] for row in answered),
        "skipped": skipped,
    }


def _finite(scores: dict[str, float], records: int) -> dict[str, float]:
    """The scores. FloatingPointError for one that is NaN or infinite."""
    if wrong := [name for name, score in scores.items() if not math.isfinite(score)]:
        raise FloatingPointError(
            f"{wrong[0]} of {records} records is {scores[wrong[0]]}, which is no score: check the model's weights, or use "
            "--dtype float32"
        )
    return scores


def _instance_macs(rows: Sequence[Row], weights: Sequence[float], tower: str) -> tuple[float, float]:
    """Mean MACs and dense MACs of all images or texts that an instance has of a tower."""
    macs_of_rows = [[row["instances"][tower] * macs for macs in row["towers"][tower]] for row in rows]
    macs, dense = np.average(macs_of_rows, axis=0, weights=weights).tolist()
    return macs, dense


def summarize_matching(matching: Matching, rows: Sequence[Row]) -> dict[str, Any]:
    """Summarize the rows of retrieval's second stage.

    Args:
        matching: The second stage.
        rows: The rows of its log.

    Returns:
        A mapping of plain JSON values: k_test, scores, pairs, pairs_per_second, skipped, and means over the pairs. These
        are macs, dense_macs and padding, without the image, which is encoded already, and kept, the tokens of the text.

    Raises:
        ValueError: If no pair was scored.
        FloatingPointError: If a score is NaN or infinite.
    """
    found = summarize(matching, rows, lambda row: row["pairs"])
    pairs, seconds = (sum(row[key] for row in rows if "pairs" in row) for key in ("pairs", "seconds"))
    image = found["towers"]["image"]
    return {
        "k_test": matching.k,
        "scores": found["scores"],
        "pairs": pairs,
        "pairs_per_second": pairs / seconds,
        "macs": found["macs"] - image[0],
        "dense_macs": found["dense_macs"] - image[1],
        "padding": found["padding"] - found["tower_padding"]["image"],
        "kept": {tower: tokens for tower, tokens in found["kept"].items() if tower != "image"},
        "skipped": found["skipped"],
    }
