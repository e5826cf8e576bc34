"""Shared code of the benchmarks on photographs: options, training of the dense model, lines of results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import variants
from torch import nn

import vltprune as vp
from vltprune.training import CompressConfig, compress


def parser(about: str | None, stages: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every stage."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--real", type=Path, help="weights of the encoders")
    parser.add_argument("--data", type=Path, help="the data set")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--reduction", type=float, default=0.5)
    parser.add_argument("--variant", choices=variants.VARIANTS, default="madtp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def dense(work: Path, results: Path, name: str, build: Callable[[], nn.Module], **fields: Any) -> None:
    """Train the model that all others start from: built once, under a seed. name: in the results. fields: of the config."""
    start = work / "start"
    if not start.is_dir():
        torch.manual_seed(0)
        vp.save(build(), start)
    done = compress(CompressConfig(**fields, model=str(start), reduction=0.0, lr=2e-4, warmup=0.1), work / "dense")
    assert done is not None
    record(results, name, 0, done.rows[-1])


def trained(work: Path, results: Path, name: str, config: CompressConfig) -> None:
    """Train the dense model to one cost, and keep its line of results."""
    done = compress(config, work / f"{name.replace(' ', '_')}_{config.reduction:g}_{config.seed}")
    assert done is not None
    record(results, name, config.seed, done.rows[-1])


def common(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of every config."""
    return {
        "data": str(options.data / "train.json"),
        "val": str(options.data / "dev.json"),
        "images": str(options.data),
        "batch_size": 100,
        "weight_decay": 0.05,
        "augment": True,
        "seed": options.seed,
        "checkpoint_every": 300,
        "log_every": 20,
    }


def record(results: Path, name: str, seed: int, row: dict[str, Any]) -> None:
    """A line of the results, from a row of a report."""
    line = {"name": name, "seed": seed, "reduction": row["reduction"]}
    line |= {"macs_saved": row["macs_saved"], "macs": row["macs"], "scores": row["scores"]}
    line |= {"kept": row["kept"]}
    variants.record(results, ("name", "seed", "reduction"), line)
