"""Time of dynamic int8, alone and on top of pruning, over the same model in fp32.

    python benchmarks/int8.py       # 3 minutes on one core; it runs on one thread and writes results/int8.json

ViT-S/16 at 224 px and BERT base on 128 tokens, random weights, dense and pruned by `evit` to about half of the MACs, by torch's
`quantize_dynamic` and torchao's `Int8DynamicActivationInt8WeightConfig`. Calls are interleaved; a row has the median of the
thread's CPU time, which other processes disturb less than they do the clock. Expected: the table of docs/cost.md on a CPU with
AVX-512 VNNI. Without VNNI int8 gains little.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertConfig, BertModel

import vltprune as vp

RESULTS = Path(__file__).parent / "results" / "int8.json"
SECONDS = {1: 20, 8: 35}  # of each batch size


def by_torchao(model: nn.Module) -> nn.Module:
    """A copy in int8, activations row by row."""
    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def by_torch(model: nn.Module) -> nn.Module:
    """A copy in int8, activations by one range a call."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def variants(dense: nn.Module) -> dict[str, nn.Module]:
    """The model, dense and pruned, each in fp32 and in int8."""
    found = {}
    for name, model in (("dense", dense), ("pruned", vp.prune(dense, "evit", keep="ratio(ratio=0.5)"))):
        found |= {name: model, f"{name}, torch": by_torch(model), f"{name}, torchao": by_torchao(model)}
    return found


def median_times(models: Mapping[str, nn.Module], inputs: torch.Tensor, seconds: float) -> dict[str, float]:
    """Median CPU time of a call of each model, in seconds. They take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model(inputs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, model in models.items():
            start = time.thread_time()
            model(inputs)
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(each) for name, each in times.items()}


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch, about what it deprecates
    inputs = {
        "vit_small_patch16_224": lambda batch: torch.randn(batch, 3, 224, 224),
        "bert_base": lambda batch: torch.randint(5, 30000, (batch, 128)),
    }
    towers = (timm.create_model("vit_small_patch16_224").eval(), BertModel(BertConfig()).eval())
    rows = []
    for (name, draw), dense in zip(inputs.items(), towers, strict=True):
        models = variants(dense)
        for batch, seconds in SECONDS.items():
            times = median_times(models, draw(batch), seconds)
            for which, spent in times.items():
                over_dense, over_fp32 = times["dense"] / spent, times[which.partition(",")[0]] / spent
                row = {"model": name, "batch": batch, "variant": which, "seconds": spent}
                rows.append({**row, "over_dense": over_dense, "over_fp32": over_fp32})
                print(
                    f"{name} batch {batch} {which:16} {1e3 * spent:7.1f} ms {over_dense:.2f} {over_fp32:.2f}",
                    flush=True,
                )
    cpu = [line.partition(":")[2].split() for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line]
    machine = {"torch": torch.__version__, "vnni": "avx512_vnni" in cpu[0]}
    RESULTS.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
