"""vltprune info: parts of a model, where it prunes, and its MACs layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..cost.macs import Cost, count_macs
from ..cost.sample_cost import keep_all
from ..models.catalog import ModelName
from ..utils.table import table
from . import common, macs, options, parts


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "info", parents=parents, help="parts, where they prune, parameters, and MACs layer by layer"
    )
    parser.add_argument("model", help=common.MODEL)
    parser.add_argument(
        "arguments",
        nargs="*",
        type=options.assignment,
        metavar="name=value",
        help="for the model: image_size=96, keep='ratio(ratio=0.5)'",
    )
    common.add_pretrained(parser)
    common.add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    common.use_threads(args.threads)
    model: Any = common.load_model(
        args.model, args.pretrained, device=args.device, dtype=args.dtype, **common.keywords(args.arguments)
    )
    dense = not hasattr(model, "pruning")
    pruned: Any = keep_all(model) if dense else model
    print(f"{args.model}: {_origin(pruned.pruning.host)}, {_millions(pruned.pruning.host)} parameters")
    if dense:
        name = ModelName.parse(pruned.pruning.host.recipe.backbone).backbone
        print(f"dense: append a preset to prune it, as in {name}_{parts.PRESET}")
    else:
        _print_parts(pruned)
    cost = count_macs(pruned, *macs.example_for(pruned.pruning.host))
    for tower, encoder in pruned.pruning.towers.items():
        _print_tower(tower, encoder, cost, dense)
    print()
    macs.print_cost(cost, pruned.pruning.host, dense)


def _origin(host: Any) -> str:
    """The backbone that a dense model was built as, and its library."""
    name = ModelName.parse(host.recipe.backbone)
    return f"{name.backbone} of {name.library}"


def _print_parts(model: Any) -> None:
    config = model.pruning.config
    for kind in ("guide", "scorer", "keep", "reducer", "at"):
        part = getattr(config, kind)
        print(f"  {kind:9}{'every block' if kind == 'at' and part is None else part}")
    own = [model.pruning.guide, *(encoder.pruners for encoder in model.pruning.towers.values())]
    print(f"  parameters of the pruning: {sum(p.numel() for m in own if m is not None for p in m.parameters()):,}")


def _print_tower(tower: str, encoder: Any, cost: Cost, dense: bool) -> None:
    spec = encoder.adapter.spec(encoder.host, 0, tower)
    summary = "a summary token" if spec.has_summary else "no summary token"
    causal = ", causal" if spec.causal else ""
    print(f"\n{tower} tower: {spec.depths} layers, width {spec.dim}, {spec.heads} heads, {summary}{causal}")
    rows = [["", "dense MMACs"] if dense else ["", "dense MMACs", "pruned MMACs", ""]]
    for row in range(spec.depths + 2):
        name = {0: "embedding", spec.depths + 1: "norm, pooling"}.get(row, f"depth {row - 1}")
        before, after = (float(macs[tower][row].sum()) / 1e6 for macs in (cost.dense, cost.towers))
        inner = 0 < row <= spec.depths
        where = "prunes" if inner and encoder.pruner(row - 1) is not None else ""
        rows.append([name, f"{before:.1f}"] if dense else [name, f"{before:.1f}", f"{after:.1f}", where])
    print(table(rows))


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
