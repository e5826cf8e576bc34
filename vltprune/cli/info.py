"""vltprune info: parts of a model, where it prunes, and its MACs layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import nn

from ..cost.macs import Cost, count_macs
from ..cost.sample_cost import keep_all
from ..io.recipe import original_recipe
from ..models.catalog import ModelName
from ..pruning.encoder import PrunedEncoder
from ..pruning.model import PrunedModel, is_pruned
from ..pruning.stage import PRUNER_KINDS
from ..utils.table import table
from . import common, example, macs, options, parts


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune info`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
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
    """Runs `vltprune info` with its parsed arguments."""
    common.use_threads(args.threads)
    model = common.load_model(
        args.model, args.pretrained, device=args.device, dtype=args.dtype, **common.keywords(args.arguments)
    )
    dense = not is_pruned(model)
    pruned = model if is_pruned(model) else keep_all(model)
    host = pruned.pruning.host
    title, hint = _title(host)
    print(f"{args.model}: {title}, {_millions(host)} parameters")
    if dense:
        print(f"dense: {hint}")
    else:
        _print_parts(pruned)
    cost = count_macs(pruned, *example.instance_for(host))
    for tower, encoder in pruned.pruning.towers.items():
        if tower in cost.towers:
            _print_tower(tower, encoder, cost, dense)
    print()
    macs.print_cost(cost, host, dense)


def _title(host: nn.Module) -> tuple[str, str]:
    """What a dense model is, and how to prune it."""
    backbone = original_recipe(host).backbone
    if not backbone:
        return f"a {type(host).__name__}", "vltprune.prune prunes it"
    name = ModelName.parse(backbone)
    return f"{name.backbone} of {name.library}", f"append a preset to prune it, as in {name.backbone}_{parts.PRESET}"


def _print_parts(model: PrunedModel) -> None:
    config = model.pruning.config
    print(f"  {'guide':9}{config.describe('guide')}")
    for stage in config.stages:
        for kind in PRUNER_KINDS:
            print(f"  {kind:9}{stage.describe(kind)}")
        everywhere = "every block" if stage.place != "output" else "behind the last block"
        print(f"  {'at':9}{everywhere if stage.at is None else stage.at}")
    own = [model.pruning.guide, *(encoder.pruners for encoder in model.pruning.towers.values())]
    print(f"  parameters of the pruning: {sum(p.numel() for m in own if m is not None for p in m.parameters()):,}")


def _print_tower(tower: str, encoder: PrunedEncoder, cost: Cost, dense: bool) -> None:
    spec = encoder.adapter.spec(encoder.host, 0, tower)
    summary = "a summary token" if spec.has_summary else "no summary token"
    causal = ", causal" if spec.causal else ""
    print(f"\n{tower} tower: {spec.depths} layers, width {spec.dim}, {spec.heads} heads, {summary}{causal}")
    rows = [["", "dense MMACs"] if dense else ["", "dense MMACs", "pruned MMACs", ""]]
    for row in range(spec.depths + 2):
        name = {0: "embedding", spec.depths + 1: "norm, pooling"}.get(row, f"depth {row - 1}")
        before, after = (float(macs[tower][row].sum()) / 1e6 for macs in (cost.dense, cost.towers))
        inner = 0 < row <= spec.depths
        where = "prunes" if inner and encoder.pruners_at(row - 1) else ""
        rows.append([name, f"{before:.1f}"] if dense else [name, f"{before:.1f}", f"{after:.1f}", where])
    print(table(rows))


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
