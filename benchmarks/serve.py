"""Latency and throughput of a stream of requests of mixed difficulty, dense and pruned.

    python benchmarks/serve.py                                                    # ViT-B/16 at 224 px: 5 minutes on two cores
    python benchmarks/serve.py --model deit_small_patch16_224 --engines eager finished onnxruntime --most 8 --wait 20

Requests arrive at random (a Poisson process), one image each. Images differ in how much of them is blank, and the pruned
model keeps more tokens of some than of others. One worker serves requests in order: it takes those that wait, up to `--most`,
and waits up to `--wait` milliseconds for more. With counts per instance, ONNX Runtime and OpenVINO take one at a time. Rates
are in shares of what the dense model can serve one by one in eager PyTorch. Each call runs for real; the time between calls,
in which nothing happens, is skipped. Systems take turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clock
import speed_results
import torch
from speed_engines import ENGINES, EXPORTED, start
from speed_rows import Skipped, Subject, subject
from torch import Tensor

import vltprune as vp
from vltprune.deploy.graph import is_adaptive

Serve = Callable[[Sequence[int]], float]  # seconds that a batch of requests, by their numbers, takes


@dataclass(frozen=True)
class System:
    """A model in an engine.

    Attributes:
        serve: runs it on a batch of requests.
        most: the largest batch that it takes.
    """

    serve: Serve
    most: int


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", vp.UntrainedGuideWarning)
    dense = mixed(subject(options.model, options.images))
    with tempfile.TemporaryDirectory() as folder:
        systems = build_systems(dense, options, Path(folder))
        rate = 1 / _seconds_each(systems["dense eager"].serve, options.images)
        rows = [row for load in options.loads for row in streams(systems, load, rate, options)]
    print(table(rows), flush=True)
    if options.record:
        speed_results.publish(speed_results.SERVE, f"{options.model}, batches up to {options.most}", rows)
    if options.output:
        cell = {"options": vars(options), "machine": clock.machine(), "dense_rate": rate, "rows": rows}
        Path(options.output).write_text(json.dumps(cell, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a VisionTransformer of timm")
    parser.add_argument("--preset", default="madtp")
    parser.add_argument("--reduction", type=float, default=0.5)
    parser.add_argument("--engines", nargs="+", default=["eager"], choices=ENGINES)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 1.5], help="in shares of the dense rate")
    parser.add_argument("--requests", type=int, default=100, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3, help="how often systems take turns")
    parser.add_argument("--images", type=int, default=16, help="different images, which set the cost")
    parser.add_argument("--most", type=int, default=1, help="the largest batch")
    parser.add_argument("--wait", type=float, default=0.0, help="milliseconds to wait for a larger batch")
    parser.add_argument(
        "--clock", default="wall", choices=clock.TIMERS, help="'cpu' on a busy machine, with --threads 1"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="also write the rows to this JSON file")
    parser.add_argument(
        "--record", action="store_true", help="also add the rows to benchmarks/results/speed_serve.json"
    )
    return parser.parse_args()


def mixed(dense: Subject) -> Subject:
    """The same model, on images whose blank part differs: from none of the rows of patches to nearly all."""
    images = dense.inputs[0].clone()
    for number, image in enumerate(images):
        blank = number * image.shape[-2] // len(images)
        image[:, :blank] = 0
    return Subject(dense.name, dense.model, (images,))


def build_systems(dense: Subject, options: argparse.Namespace, folder: Path) -> dict[str, System]:
    """What serves requests, by name: the dense and the pruned model in each engine; what cannot run is said and left out."""
    pruned = vp.prune(dense.model, options.preset, reduction=options.reduction, data=[dense.inputs], tolerance=0.02)
    with torch.inference_mode(), vp.collect() as traces:
        pruned(*dense.inputs)
    kept = sorted(traces[0].lengths[-1])
    print(
        f"{options.preset} keeps {kept[0]} to {kept[-1]} tokens of an image, {statistics.median(kept):g} at the median",
        flush=True,
    )
    models = {"dense": dense.model, options.preset: pruned}
    models[f"{options.preset} frozen"] = vp.freeze(pruned, [dense.inputs]).model
    (images,), systems = dense.inputs, {}
    for engine in dict.fromkeys(["eager", *options.engines]):
        for name, model in models.items():
            exported = engine in EXPORTED
            most = 1 if exported and is_adaptive(model) else options.most
            any_batch = {"any_batch": most > 1} if exported else {}
            try:
                run = start(engine, model, (images[:most],), folder, **any_batch)
                systems[f"{name} {engine}"] = System(_serving(run, images, clock.TIMERS[options.clock]), most)
            except Skipped as reason:
                print(f"skipped: {name} {engine}: {reason}", flush=True)
    return systems


def _serving(run: Callable[..., object], images: Tensor, now: Callable[[], float]) -> Serve:
    def serve(requests: Sequence[int]) -> float:
        batch = images[[request % len(images) for request in requests]]
        begin = now()
        run(batch)
        return now() - begin

    # a service is warm: some engines prepare themselves anew for each number of tokens
    for image in range(len(images)):
        serve([image])
    return serve


def _seconds_each(serve: Serve, images: int) -> float:
    """The median seconds of one request by itself."""
    return statistics.median(serve([image]) for image in range(images))


def streams(
    systems: Mapping[str, System], load: float, rate: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Serves the same requests with each system, in turns.

    Args:
        systems: what serves, by name.
        load: requests a second, in shares of `rate`.
        rate: requests that the dense model can serve a second.
        options: of the command line.

    Returns:
        A record for each system: latencies of all rounds in milliseconds, and requests served a second.
    """
    latencies: dict[str, list[float]] = {name: [] for name in systems}
    spans: dict[str, float] = dict.fromkeys(systems, 0.0)
    for number in range(options.rounds):
        arrivals = poisson(load * rate, options.requests, number)
        for name, system in systems.items():
            finished = stream(arrivals, system.serve, system.most, options.wait / 1000 if system.most > 1 else 0.0)
            latencies[name] += [end - begin for begin, end in zip(arrivals, finished, strict=True)]
            spans[name] += finished[-1] - arrivals[0]
    return [
        {
            "system": name,
            "load": load,
            "offered": load * rate,
            "served": options.rounds * options.requests / spans[name],
            **{f"p{share}": 1000 * percentile(latencies[name], share) for share in (50, 95, 99)},
        }
        for name in systems
    ]


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Times of arrival in seconds: gaps are drawn from the exponential distribution with mean 1 / rate."""
    generator, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += generator.expovariate(rate)
        times.append(now)
    return times


def stream(arrivals: Sequence[float], serve: Serve, most: int = 1, wait: float = 0.0) -> list[float]:
    """Serves requests in order, in batches of those that wait.

    Args:
        arrivals: when each request arrives, in seconds, ascending.
        serve: the seconds that a batch of requests takes.
        most: the largest batch.
        wait: seconds that the first request of a batch waits for others at most, once the worker is free.

    Returns:
        When each request is finished, in seconds of the same clock.
    """
    finished: list[float] = []
    now = 0.0
    while len(finished) < len(arrivals):
        first = len(finished)
        now = max(now, arrivals[first])
        full = first + most <= len(arrivals) and arrivals[first + most - 1] <= now + wait
        # a batch begins when it is full, or when waiting is over
        begin = max(now, arrivals[first + most - 1]) if full else now + wait
        batch = [n for n in range(first, min(first + most, len(arrivals))) if arrivals[n] <= begin]
        now = begin + serve(batch)
        finished += [now] * len(batch)
    return finished


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that `share` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 100) - 1)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one a line."""
    lines = [f"{'system':28s}{'load':>6s}{'offered/s':>11s}{'served/s':>10s}{'p50 ms':>9s}{'p95 ms':>9s}{'p99 ms':>9s}"]
    for row in rows:
        lines.append(
            f"{row['system']:28s}{row['load']:6.0%}{row['offered']:11.1f}{row['served']:10.1f}"
            f"{row['p50']:9.0f}{row['p95']:9.0f}{row['p99']:9.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
