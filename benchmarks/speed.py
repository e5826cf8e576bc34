"""Speed of pruned models over the dense one, and how much of the saving in MACs the clock shows.

    python benchmarks/speed.py                                  # ViT-B/16 at 384 px, batch 8: 4 minutes on two cores
    python benchmarks/speed.py --model deit_small_patch16_224 --batch 1 --engines eager finished onnxruntime openvino
    python benchmarks/speed.py --model bert --batch 32 --rows keep-all evit madtp
    python benchmarks/speed.py --model blip_nlvr_base --rows keep-all evit madtp --output results.json

Weights and inputs are random. All rows and engines take turns in one process, and medians are compared. "x" is the speed-up
over the dense model in eager PyTorch, with its fused attention. "own" is that over the dense model in the same engine.
"realized" is own, divided by the speed-up in MACs. The rows:

    no-block         a pruned model that prunes in no block
    keep-all         madtp, which keeps all tokens
    limit            tokens are sliced to fixed counts; nothing is scored
    tome             a minimal ToMe with the same counts
    evit             class attention, the same ratio at each block, the rest is dropped
    madtp            the scores of MADTP; each instance's ratio is drawn around a mean; the rest is fused
    madtp-threshold  the same with MADTP's own counts
    madtp-frozen     madtp with its mean count at each layer (vltprune.freeze)
    PRESET           any preset as it is

The engines "training", "training-soft" and "training-recomputed" run a step, forward and backward: with tokens that stay or go
as in evaluation, softly as in the first half of `vltprune compress`, or with blocks that are computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import clock
import speed_results
import torch
from speed_engines import ENGINES, start
from speed_rows import ROWS, Row, Skipped, Subject, build, subject

import vltprune as vp

Key = tuple[str, str, float]  # row, engine, reduction
_WHOLE = ("dense", "no-block", "keep-all")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", vp.UntrainedGuideWarning)
    dense = subject(options.model, options.batch, options.device)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(dense, options, Path(folder))
    print(table(rows), flush=True)
    if options.record:
        rounds = [row | {"rounds": len(row["rounds"])} for row in rows]
        speed_results.publish(speed_results.CELLS, f"{options.model}, batch {options.batch}", rounds)
    if options.output:
        cell = {"options": vars(options), "machine": clock.machine(options.device), "rows": rows}
        Path(options.output).write_text(json.dumps(cell, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_384", help="'bert', or a name that create_model takes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", nargs="+", default=[row for row in ROWS if "-" not in row or row in _WHOLE])
    parser.add_argument("--engines", nargs="+", default=["eager"], choices=ENGINES)
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--spread", type=float, default=0.25, help="half the width of the interval of madtp's ratios")
    parser.add_argument("--repeats", type=int, help="rounds; as many as --seconds allow, 5 to 41, by default")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", default="wall", choices=clock.TIMERS, help="'cpu' on a busy machine, with --threads 1"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="also measure the memory of a call")
    parser.add_argument("--output", help="also write the rows to this JSON file")
    parser.add_argument(
        "--record", action="store_true", help="also add the rows to benchmarks/results/speed_cells.json"
    )
    return parser.parse_args()


def measured(dense: Subject, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Times all rows in all engines; a row that cannot run is said and left out.

    Args:
        dense: the dense model and its batch.
        options: of the command line.
        folder: where exported files go.

    Returns:
        A record for each row, engine and reduction.
    """
    rows, calls = {}, {}
    for name, reduction in _asked(options):
        try:
            row = (
                Row("dense", dense.model, 1.0, 1.0)
                if name == "dense"
                else build(name, dense, reduction, options.spread)
            )
        except Skipped as reason:
            print(f"skipped: {name}: {reason}", flush=True)
            continue
        for engine in dict.fromkeys(["eager", *options.engines]) if name == "dense" else options.engines:
            try:
                calls[name, engine, reduction] = partial(start(engine, row.model, dense.inputs, folder), *dense.inputs)
            except Skipped as reason:
                print(f"skipped: {name} {reduction:.0%} in {engine}: {reason}", flush=True)
            else:
                rows[name, engine, reduction] = row
    memory = {key: clock.peak_memory(call, options.device) for key, call in calls.items()} if options.memory else {}
    times = clock.interleaved(calls, options.repeats, options.seconds, options.device, options.clock)
    return [_record(key, rows[key], times, memory.get(key)) for key in calls]


def _asked(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Rows and reductions; what spends all MACs comes once."""
    whole = [(name, 0.0) for name in ("dense", *options.rows) if name in _WHOLE]
    pruned = [name for name in options.rows if name not in _WHOLE]
    return [*whole, *((name, reduction) for name in pruned for reduction in options.reductions)]


def _record(key: Key, row: Row, times: dict[Key, list[float]], memory: float | None) -> dict[str, Any]:
    name, engine, reduction = key
    eager = clock.compare(times["dense", "eager", 0.0], times[key])
    own = clock.compare(times["dense", engine, 0.0], times[key])
    milliseconds = [round(1000 * one, 2) for one in times[key]]
    return {
        "row": name,
        "engine": engine,
        "reduction": reduction,
        "mac_speedup": row.mac_speedup,
        "milliseconds": statistics.median(milliseconds),
        "speedup": eager["speedup"],
        "own_speedup": own["speedup"],
        "own_quartiles": [own["low"], own["high"]],
        "realized": own["speedup"] / row.mac_speedup,
        "rounds": milliseconds,
        "spread": row.spread,
        "memory_mib": memory,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one a line."""
    lines = [
        f"{'row':16s}{'engine':13s}{'MACs':>6s}{'ms':>10s}{'x':>7s}{'own':>7s}{'realized':>10s}{'quartiles of own':>18s}"
    ]
    for row in rows:
        low, high = row["own_quartiles"]
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:8.0f} MiB"
        lines.append(
            f"{row['row']:16s}{row['engine']:13s}{-row['reduction']:6.0%}{row['milliseconds']:10.1f}{row['speedup']:7.2f}"
            f"{row['own_speedup']:7.2f}{row['realized']:10.2f}{low:10.2f} .. {high:.2f}{memory}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
