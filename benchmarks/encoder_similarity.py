"""What pruning without training loses: similarity of pruned to dense embeddings, on an encoder that you have.

    OMP_NUM_THREADS=1 python benchmarks/encoder_similarity.py text all-MiniLM-L6-v2/ dev.json       # 10 minutes
    OMP_NUM_THREADS=1 python benchmarks/encoder_similarity.py image weights.safetensors images/     # 8 minutes

`text` reads a folder of transformers' (BERT, RoBERTa, DistilBERT, MPNet, ModernBERT) and captions as `vltprune.data.captions`
does, several to an image; an embedding is the mean of the last hidden states, where a merged token weighs as many as it stands
for. `image` reads a file of timm's weights, for `--model`, and a folder of photographs; an embedding is what the model returns.
Every method is calibrated to the asked reduction on inputs that are not measured. Sentences go in batches of one length, so
that no MAC saved is one of padding.

Printed, one line for a method: MACs saved on the measured inputs; cosine of pruned to dense embedding, mean and 5th
percentile; how many of an input's ten nearest neighbors among dense embeddings are among its ten nearest after pruning;
of captions, R@1: how often the nearest other caption tells of the same image; time relative to dense, runs alternating.
Expected of the preset `attention` at 30, 50 and 70 % fewer MACs: R@1 of sentences by all-MiniLM-L6-v2 76, 56 and 47 % (dense
85), neighbors of photographs by a ViT-S/14 in DINOv2's architecture at 112 px 59, 34 and 16 %.
benchmarks/results/encoder_similarity.json has all that was measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import variants
from embeddings import hits, mean_pooled, of_one_length, shared_neighbors
from torch import Tensor, nn

import vltprune as vp
from vltprune.data import captions
from vltprune.data.images import list_images, load_image
from vltprune.layers import ClsAttention, SelfAttention

GUIDE, RATIO = "codebook(anchors=100)", "ratio(ratio=0.5)"
METHODS = {
    "random": {"scorer": "random", "keep": RATIO},
    "mean_cls_attention": {"scorer": "mean_cls_attention", "keep": RATIO},
    "cls_attention": {"scorer": "cls_attention", "keep": RATIO},
    "self_attention": {"scorer": "self_attention", "keep": RATIO},
    "madtp - guide": {"scorer": "unguided", "keep": RATIO},
    "madtp": {"scorer": "madtp", "keep": RATIO, "guide": GUIDE},
    "madtp, threshold": {"scorer": "madtp", "keep": "threshold(knob='temperature')", "guide": GUIDE},
    "distinct_attention": {"scorer": "distinct_attention", "keep": RATIO},
    "self_attention, distortion": {"scorer": "self_attention", "keep": "distortion"},
    "distinct_attention, distortion": {"scorer": "distinct_attention", "keep": "distortion"},
}
SEEDS = (0, 1, 2)  # of random; its numbers are their mean


@vp.scorers.register("unguided")
class Unguided(vp.TokenScorer):
    """The mean of the two terms of `madtp` that need no guide."""

    needs = SelfAttention.needs | ClsAttention.needs

    def __init__(self, spec: vp.BlockSpec):
        super().__init__(spec)
        self.terms = nn.ModuleList((SelfAttention(spec), ClsAttention(spec)))

    def forward(self, tokens: Any, stats: Any, guidance: Any) -> Tensor:
        received, summary = (term(tokens, stats, guidance) for term in self.terms)
        return (received + summary) / 2


@dataclass(frozen=True)
class Subject:
    """A dense encoder, batches to calibrate on and others to measure, and how a dense or pruned one embeds a batch.

    owners: [inputs] what each measured input tells of, None where nothing is known.
    """

    dense: nn.Module
    calibration: Sequence[Tensor]
    batches: Sequence[Tensor]
    embed: Callable[[nn.Module, Tensor], Tensor]
    owners: Tensor | None = None


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    subject = {"text": sentences, "image": photographs}[options.kind](options)
    dense = torch.cat([embedded(subject, subject.dense, batch) for batch in subject.batches])
    print(
        f"{len(dense)} inputs"
        + ("" if subject.owners is None else f", dense R@1 {hits(dense, subject.owners).mean():.1%}")
    )
    name = "sentences" if options.kind == "text" else f"photographs, {options.size} px"
    for reduction in options.reductions:
        for method in options.methods:
            for reducer in options.reducers:
                config = vp.PruneConfig(**METHODS[method], reducer=reducer)
                row = {"name": name, "method": method, "reducer": reducer, "asked": reduction}
                row |= measured(subject, config, reduction, dense)
                print(_line(row), flush=True)
                if options.output:
                    variants.record(Path(options.output), ("name", "method", "reducer", "asked"), row)


def sentences(options: argparse.Namespace) -> Subject:
    """Captions through a transformers encoder: those of the first images are measured, those of the next calibrate."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, dense = (auto.from_pretrained(options.weights) for auto in (AutoTokenizer, AutoModel))
    records = captions(options.inputs, images="")
    held_out = options.count // 5
    texts = [(owner, text) for owner, record in enumerate(records) for text in record.captions]
    texts = texts[: options.count + held_out]
    owned = [(owner, ids) for (owner, _), ids in zip(texts, tokenizer([t for _, t in texts]).input_ids, strict=True)]

    batches = list(of_one_length(owned[: options.count], options.batch))
    calibration = [ids for _, ids in of_one_length(owned[options.count :], options.batch)]
    owners = torch.cat([owners for owners, _ in batches])
    return Subject(dense.eval(), calibration, [ids for _, ids in batches], mean_pooled, owners)


def photographs(options: argparse.Namespace) -> Subject:
    """A folder of pictures through a timm model: the first are measured, the next calibrate."""
    source = {"file": options.weights}
    sizes = {"img_size": options.size, "num_classes": 0}
    dense = timm.create_model(options.model, pretrained=True, pretrained_cfg_overlay=source, **sizes).eval()
    prepare, files = vp.transforms(dense), list_images(options.inputs)[: options.count + options.fitting]
    images = torch.stack([prepare(load_image(file)) for file in files])
    batches = images[: options.count].split(options.batch)
    return Subject(
        dense, list(images[options.count :].split(options.batch)), batches, lambda model, batch: model(batch)
    )


@torch.inference_mode()
def embedded(subject: Subject, model: nn.Module, batch: Tensor) -> Tensor:
    """[batch, dim], of length one."""
    return F.normalize(subject.embed(model, batch), dim=-1)


def measured(subject: Subject, config: vp.PruneConfig, reduction: float, dense: Tensor) -> dict[str, Any]:
    """One row: a method calibrated, then embedding everything; the mean over seeds where it draws lots."""
    model = vp.prune(subject.dense, config)
    if config.guide is not None:
        vp.fit_guide(model, subject.calibration)
    try:
        vp.calibrate(model, subject.calibration, reduction, tolerance=0.02)
    except vp.BudgetError as error:
        return {"out_of_reach": str(error)}

    found = model.pruning.config
    models = [model]
    if found.part("scorer").name == "random":
        models = [vp.prune(subject.dense, found, scorer=f"random(seed={seed})") for seed in SEEDS]
    rows = [compared(subject, each, dense) for each in models]
    means = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    return {**means, "keep": str(found.keep), "time": relative_time(subject, model)}


def compared(subject: Subject, model: nn.Module, dense: Tensor) -> dict[str, float]:
    """Pruned embeddings of every measured input against the dense ones, and the MACs they took."""
    meter, macs, dense_macs, parts = vp.CostMeter(model), 0.0, 0.0, []
    for batch in subject.batches:
        with vp.collect() as traces:
            parts.append(embedded(subject, model, batch))
        cost = meter(traces)
        macs, dense_macs = macs + cost.total, dense_macs + cost.dense_total
    pruned = torch.cat(parts)

    cosine = (pruned * dense).sum(-1)
    row = {
        "reduction": 1 - macs / dense_macs,
        "cosine": cosine.mean().item(),
        "cosine_p5": cosine.quantile(0.05).item(),
    }
    row["neighbors"] = shared_neighbors(dense, pruned).mean().item()
    return row if subject.owners is None else {**row, "recall": hits(pruned, subject.owners).mean().item()}


def relative_time(subject: Subject, model: nn.Module) -> float:
    """Pruned over dense on the largest measured batch, median of five runs that alternate."""
    batch = max(subject.batches, key=len)

    def seconds(each: nn.Module) -> float:
        start = time.perf_counter()
        embedded(subject, each, batch)
        return time.perf_counter() - start

    seconds(subject.dense), seconds(model)  # the first runs are slower
    pairs = [(seconds(subject.dense), seconds(model)) for _ in range(5)]
    return statistics.median(pruned / dense for dense, pruned in pairs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("text", "image"))
    parser.add_argument("weights", help="a folder of transformers' for text, a safetensors file of timm's for image")
    parser.add_argument("inputs", help="a JSON file of captions for text, a folder of photographs for image")
    parser.add_argument(
        "--model", default="vit_small_patch14_dinov2", help="timm's name for the weights of an image encoder"
    )
    parser.add_argument("--size", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--count", type=int, help="inputs that are measured (500 sentences, 100 photographs)")
    parser.add_argument("--batch", type=int, help="sentences (64) or photographs (8) at a time")
    parser.add_argument("--fitting", type=int, default=6, help="photographs that set the cost, which are not measured")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--reducers", nargs="+", choices=("drop", "fuse"), default=("drop", "fuse"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="also write the rows to this JSON file, in place of older ones")
    options = parser.parse_args()
    count, batch = {"text": (500, 64), "image": (100, 8)}[options.kind]
    options.count, options.batch = options.count or count, options.batch or batch
    return options


def _line(row: dict[str, Any]) -> str:
    head = f"{row['asked']:4.0%}  {row['method']:30}  {row['reducer']:4}  "
    if "out_of_reach" in row:
        return head + "out of reach"
    recall = f"   R@1 {row['recall']:5.1%}" if "recall" in row else ""
    return head + (
        f"{row['reduction']:5.1%} saved   cosine {row['cosine']:.3f} (p5 {row['cosine_p5']:.3f})   "
        f"neighbors {row['neighbors']:5.1%}{recall}   time {row['time']:.2f} x"
    )


if __name__ == "__main__":
    main()
