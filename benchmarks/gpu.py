"""Pruned models on one GPU: whether its kernels agree with the exact path, how many images a second, how much memory.

    python benchmarks/gpu.py --output gpu.json           # some minutes on one NVIDIA GPU, in bfloat16
    python benchmarks/gpu.py --device cpu --tiny         # the same on a CPU in seconds, to see that it runs

Three tables are printed, and written as JSON:

1. Checks. Attention, its gradients and statistics in half precision, against the exact path in single precision on the CPU; a
   ragged batch against each instance alone; pruned models against the CPU. The exit status is 1 where one fails.
2. From what size on instances are attended to one by one rather than padded: what `_SMALL` in `vltprune/core/attention.py`
   should be on this device, in logits (heads * longest ** 2); and both against the kernel for ragged batches.
3. Images a second and peak memory beyond weights: the dense model with fused attention, ToMe, EViT's scores and MADTP's, whose
   counts per instance spread by a quarter. Models are timed in turns, and medians are printed. Beside them are the speed-up
   and what part of the speed-up in MACs it is.

Expected: nothing yet. No GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import clock
import speed_rows
import torch
from torch import Tensor, nn

import vltprune as vp
from vltprune.core import attention
from vltprune.core.kernels import column_stats, varlen

BOTH = vp.Stat.RECEIVED | vp.Stat.COLUMN


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", vp.UntrainedGuideWarning)
    parts = (("checks", _checks), ("padding", _padding), ("models", _models))
    found: dict[str, Any] = {"machine": clock.machine(options.device), "options": vars(options)}
    for name, measure in parts:
        found[name] = []
        for row in measure(options):
            found[name].append(row)
            print("  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        print()
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    return int(not all(row["passed"] for row in found["checks"]))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a VisionTransformer of timm")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny batches")
    parser.add_argument("--output", help="also write the tables to this JSON file")
    options = parser.parse_args(arguments)
    if options.tiny:
        tiny = {"model": "test_vit", "batch": [1, 2], "reductions": [0.3], "repeats": 2}
        options = argparse.Namespace(**{**vars(options), **tiny})
    return options


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _checks(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    for head_dim in (64, 80):
        for causal in (False, True):
            yield from _kernel_checks(options.device, dtype, head_dim, causal)
    yield from _model_checks(options, dtype)


def _kernel_checks(device: str, dtype: torch.dtype, head_dim: int, causal: bool) -> Iterator[dict[str, Any]]:
    """Output, gradients and statistics of a ragged batch in half precision, against single precision and instances alone."""
    layout = vp.Layout((197, 1, 60, 130, 64, 33))
    qkv = torch.randn(layout.total, 3, 4, head_dim).to(dtype)
    tokens = vp.PackedTokens(torch.zeros(layout.total, 1), layout, layout.slot, torch.rand(layout.total) < 0.1)
    scale, gradient = head_dim**-0.5, torch.randn(layout.total, 4, head_dim)

    def run(qkv: Tensor, tokens: vp.PackedTokens) -> tuple[Tensor, Tensor, vp.AttentionStats]:
        leaf = qkv.clone().requires_grad_()
        q, k, v = leaf.unbind(1)
        out = vp.attend(q, k, v, tokens.layout, scale, causal=causal)
        out.backward(gradient[: len(out)].to(out))
        with torch.no_grad():
            _, stats = vp.attend_with_stats(q, k, v, tokens, scale, BOTH, causal=causal)
        return out.detach(), _gradient(leaf), stats

    out, exact_gradient, stats = run(qkv.float(), tokens)
    there = qkv.to(device)
    on_device = replace(
        tokens,
        x=tokens.x.to(device),
        position=tokens.position.to(device),
        protected=tokens.protected.to(device),
        layout=vp.Layout(layout.lengths, torch.device(device)),
    )
    found = run(there, on_device)
    q, k, v = there.unbind(1)
    used = varlen.applies(q, k, v, on_device.layout, on_device.layout, causal)
    about = {"dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim, "causal": causal}
    yield {"check": "output", **about, "kernel": used, **_difference(found[0], out, 0.02)}
    yield {"check": "gradients", **about, "kernel": used, **_difference(found[1], exact_gradient, 0.05)}
    used = column_stats.applies(q, k, BOTH)
    for stat in BOTH:
        yield {"check": str(stat.name), **about, "kernel": used, **_difference(found[2][stat], stats[stat], 1e-4)}

    alone = [run(there[rows], on_device.select_instances([i])) for i, rows in enumerate(_rows(layout))]
    together = torch.cat([one[0] for one in alone])
    yield {"check": "output alone", **about, **_difference(found[0], together.cpu().float(), 0.02)}
    for stat in BOTH:
        own = torch.cat([one[2][stat] for one in alone])
        yield {"check": f"{stat.name} alone", **about, **_difference(found[2][stat], own.cpu(), 1e-5)}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _rows(layout: vp.Layout) -> tuple[Tensor, ...]:
    return torch.arange(layout.total).split(layout.lengths)


def _difference(found: Tensor, exact: Tensor, tolerance: float) -> dict[str, Any]:
    """The largest difference, relative to the largest value."""
    difference = float((found.detach().cpu().float() - exact.detach().float()).abs().max() / exact.abs().max())
    return {"difference": difference, "tolerance": tolerance, "passed": difference <= tolerance}


@torch.inference_mode()
def _model_checks(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A pruned model in half precision on the device, against the CPU; and in single precision, alone and in a batch."""
    dense = speed_rows.subject(options.model, 4)
    for preset in ("evit", "madtp"):
        model = vp.prune(dense.model, preset)
        exact, _ = _run(model, dense.inputs[0])
        model, images = model.to(options.device), dense.inputs[0].to(options.device)
        single, lengths = _run(model, images)
        alone = [_run(model, images[i : i + 1]) for i in range(len(images))]
        same = sum(one[1][-1][0] == last for one, last in zip(alone, lengths[-1], strict=True))
        yield {"check": f"{preset} in single precision", **_difference(single, exact.cpu(), 0.01)}
        row = _difference(torch.cat([one[0] for one in alone]), single.cpu(), 1e-3)
        yield {"check": f"{preset} alone", "same_counts": f"{same} of {len(images)}", **row}
        half, _ = _run(model.to(dtype), images.to(dtype))
        # near a tie rounding decides which token stays: this catches what is wrong, not what is rounded
        yield {"check": f"{preset} in {options.dtype}", **_difference(half, exact.cpu(), 0.25)}
        dense.model.float().cpu()


def _run(model: nn.Module, images: Tensor) -> tuple[Tensor, Sequence[Sequence[int]]]:
    with vp.collect() as traces:
        out = model(images)
    return out, traces[0].lengths


@torch.inference_mode()
def _padding(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds of attention to a ragged batch: padded, one call an instance, and by the kernel where there is one."""
    heads, head_dim, batch = 12, 64, 4 if options.tiny else 32
    small = dict.fromkeys((torch.float32, getattr(torch, options.dtype)), 0)
    for n in (8, 16) if options.tiny else (8, 16, 32, 64, 128, 256, 512, 1024):
        lengths = tuple(int(n * (0.75 + 0.5 * i / (batch - 1))) for i in range(batch))
        layout = vp.Layout(lengths, torch.device(options.device))
        for dtype in small:
            q, k, v = torch.randn(layout.total, 3, heads, head_dim, device=options.device, dtype=dtype).unbind(1)
            inputs = (q, k, v, layout)
            calls = {"padded": partial(_attend, *inputs, small=2**62), "one_by_one": partial(_attend, *inputs, small=0)}
            if varlen.applies(*inputs, layout):
                calls["kernel"] = partial(vp.attend, *inputs, head_dim**-0.5)
            times = clock.interleaved(calls, options.repeats, device=options.device)
            found = {name: 1000 * statistics.median(one) for name, one in times.items()}
            logits = heads * layout.longest**2
            if found["padded"] <= found["one_by_one"]:
                small[dtype] = logits
            yield {"dtype": str(dtype).removeprefix("torch."), "longest": layout.longest, "logits": logits, **found}
    for dtype, logits in small.items():
        yield {"dtype": str(dtype).removeprefix("torch."), "padding_pays_up_to_logits": logits}


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: vp.Layout, small: int) -> Tensor:
    """Attention without the kernel, padded up to so many logits."""
    padding = mock.patch.object(attention, "_SMALL", {q.device.type: small})
    with padding, mock.patch.object(varlen, "applies", return_value=False):
        return vp.attend(q, k, v, layout, q.shape[2] ** -0.5)


def _models(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    dense = speed_rows.subject(options.model, 8 if options.tiny else 32, options.device)
    rows: dict[str, speed_rows.Row | None] = {"dense": None}
    for reduction in options.reductions:
        rows |= {
            f"{name} {reduction:.0%}": speed_rows.build(name, dense, reduction) for name in ("tome", "evit", "madtp")
        }
    dtype = getattr(torch, options.dtype)
    models = {name: (row.model if row else dense.model).to(dtype) for name, row in rows.items()}
    for batch in options.batch:
        images = torch.randn(batch, *dense.inputs[0].shape[1:], device=options.device, dtype=dtype)
        calls = {name: lambda model=model, images=images: model(images) for name, model in models.items()}
        with torch.inference_mode():
            times = clock.interleaved(calls, options.repeats, device=options.device)
            memory = {name: clock.peak_memory(call, options.device) for name, call in calls.items()}
        for name, row in rows.items():
            speedup = clock.compare(times["dense"], times[name])["speedup"]
            macs = row.mac_speedup if row else 1.0
            yield {
                "batch": batch,
                "model": name,
                "images_a_second": batch / statistics.median(times[name]),
                "MiB": memory[name],
                "mac_speedup": macs,
                "speedup": speedup,
                "realized": speedup / macs,
            }


if __name__ == "__main__":
    sys.exit(main())
