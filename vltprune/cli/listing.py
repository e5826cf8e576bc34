"""vltprune list, info, macs: which models there are, what they are made of, and what they cost."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import registry
from ..cost import savings
from ..cost.macs import Cost, count_macs
from ..cost.sample_cost import keep_all
from ..hosts.find import find_composite
from ..io.preprocessing import image_size
from ..models import zoo
from ..models.catalog import ModelName, list_models, list_pretrained, unprunable
from ..models.resolve import is_saved_model
from . import common, options

_COUNTED = (
    "Counted: multiply-accumulates (MACs) of all matrix products, attention and the pruners' own scoring included, of one\n"
    "instance ({instance}); norms, activations and softmax are not. Dense is\n"
    "what the dense model spends on the tokens that are there; padding stands beside it. FLOPs are twice as many."
)
_ANSWER = 5  # tokens; BLIP's answers are short
_PARTS = ("presets", "scorers", "keepers", "reducers", "guides")


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    lister = commands.add_parser("list", parents=parents[:1], help="names of models, or of the parts of a pruner")
    lister.add_argument(
        "pattern", nargs="?", default="*", help="a part of the name, or a shell pattern such as 'vit_*_384'"
    )
    lister.add_argument("--library", choices=("vltprune", "timm", "open_clip"), help="only models of this library")
    what = lister.add_mutually_exclusive_group()
    what.add_argument("--pretrained", action="store_true", help="names with weights, by their tags")
    what.add_argument("--parts", action="store_true", help="presets, scorers, keepers, reducers and guides instead")
    lister.set_defaults(run=run_list)

    info = commands.add_parser(
        "info", parents=parents, help="parts, where they prune, parameters, and MACs layer by layer"
    )
    info.add_argument("model", help=common.MODEL)
    info.add_argument(
        "arguments",
        nargs="*",
        type=options.assignment,
        metavar="name=value",
        help="for the model: image_size=96, keep='ratio(ratio=0.5)'",
    )
    common.add_pretrained(info)
    common.add_device(info)
    info.set_defaults(run=run_info)

    cost = commands.add_parser("macs", parents=parents, help="MACs of a model, dense and pruned")
    cost.add_argument("model", help=common.MODEL)
    common.add_pretrained(cost)
    common.add_device(cost)
    cost.add_argument("--image-size", type=options.positive, help="pixels (the model's own)")
    cost.add_argument("--tokens", type=options.positive, help="length of the sentence (35, or what the model takes)")
    cost.set_defaults(run=run_macs)


def run_list(args: argparse.Namespace) -> None:
    if args.parts:
        for kind in _PARTS:
            print(f"{kind:10}{', '.join(getattr(registry, kind).names())}")
        return
    pattern = args.pattern if any(c in args.pattern for c in "*?[") else f"*{args.pattern}*"
    names = (list_pretrained if args.pretrained else list_models)(pattern, library=args.library)
    if args.library in (None, "vltprune"):
        names = sorted({*names, *fnmatch.filter(zoo.packaged_names(), pattern)})
    if not names:
        raise LookupError(f"no model's name matches {args.pattern!r}{_instead(args, pattern)}")
    print("\n".join(names))


def _instead(args: argparse.Namespace, pattern: str) -> str:
    """What there is where nothing was found."""
    if args.pretrained and list_models(pattern, library=args.library):
        return ": there are such models, and no weights of them"
    others = unprunable(pattern)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return f" of those that can be pruned; {', '.join(others[:3])}{more} cannot"
    return registry.nearest(args.pattern, list_models(library=args.library))


def run_info(args: argparse.Namespace) -> None:
    common.use_threads(args.threads)
    model: Any = common.load_model(
        args.model, args.pretrained, device=args.device, dtype=args.dtype, **common.keywords(args.arguments)
    )
    dense = not hasattr(model, "pruning")
    pruned: Any = keep_all(model) if dense else model
    print(f"{args.model}: {_origin(pruned.pruning.host)}, {_millions(pruned.pruning.host)} parameters")
    if dense:
        print(
            f"dense: append a preset to prune it, as in {ModelName.parse(pruned.pruning.host.recipe.backbone).backbone}_madtp"
        )
    else:
        _print_parts(pruned)
    cost = count_macs(pruned, *_example_for(pruned.pruning.host))
    for tower, encoder in pruned.pruning.towers.items():
        _print_tower(tower, encoder, cost, dense)
    print()
    _print_cost(cost, pruned.pruning.host, dense)


def _origin(host: Any) -> str:
    """The backbone that a dense model was built as, and its library."""
    name = ModelName.parse(host.recipe.backbone)
    return f"{name.backbone} of {name.library}"


def run_macs(args: argparse.Namespace) -> None:
    common.use_threads(args.threads)
    if args.image_size and is_saved_model(args.model):
        raise ValueError(f"--image-size {args.image_size}: the folder {args.model} says itself what its model is")
    size = {_SIZE_ARGUMENT[ModelName.parse(args.model).library]: args.image_size} if args.image_size else {}
    model: Any = common.load_model(args.model, args.pretrained, device=args.device, dtype=args.dtype, **size)
    dense = not hasattr(model, "pruning")
    pruned: Any = keep_all(model) if dense else model
    cost = count_macs(pruned, *_example_for(pruned.pruning.host, args.tokens))
    _print_cost(cost, pruned.pruning.host, dense)
    if not dense:
        print("What is pruned depends on the input: this one was noise. Measure your own with vltprune.count_macs.")


_SIZE_ARGUMENT = {"vltprune": "image_size", "timm": "img_size", "open_clip": "force_image_size"}


def _example_for(host: nn.Module, tokens: int | None = None) -> tuple[Tensor, ...]:
    """`example` where the model is, in its dtype."""
    device, dtype = next(host.parameters()).device, common.dtype_of(host)
    return tuple(one.to(device, dtype if one.is_floating_point() else None) for one in example(host, tokens))


def example(host: Any, tokens: int | None = None) -> tuple[Tensor, ...]:
    """One instance of noise that a dense model takes. ValueError for a sentence that it cannot read."""
    generator = torch.Generator().manual_seed(0)
    composite = find_composite(host)
    towers = {"image": host} if composite is None else {t: m for t, (m, _) in composite.towers(host).items()}
    images = torch.randn(1, 3, *image_size(towers["image"]), generator=generator)
    if composite is None:
        if tokens is not None:
            raise ValueError(f"--tokens: a {type(host).__name__} reads no sentence")
        return (images,)
    if hasattr(host, "images_per_sentence"):
        images = images if host.images_per_sentence == 1 else images.repeat(2, 1, 1, 1)[None]
        reader = host.text if hasattr(host, "text") else host.decoder.body
        longest, vocabulary = reader.position.num_embeddings, reader.word.num_embeddings
        length = tokens or min(35, max(longest // 2, 1))
        ids = torch.randint(1, vocabulary, (1, length), generator=generator)
        answers = (torch.ones_like(ids), ids[:, :_ANSWER]) if hasattr(host, "rank") else ()
        return images, ids, *answers
    return images, _clip_text(towers["text"], tokens, generator)


def _clip_text(tower: Any, tokens: int | None, generator: torch.Generator) -> Tensor:
    """A sentence for open_clip: noise, then its end, which has the highest id, then padding."""
    length: int = getattr(tower, "context_length", None) or 77
    vocabulary: int = getattr(tower, "vocab_size", None) or 49408
    tokens = tokens or length
    if tokens > length:
        raise ValueError(f"--tokens {tokens}: this model reads sentences of at most {length} tokens")
    text = torch.zeros(1, length, dtype=torch.long)
    text[0, :tokens] = torch.randint(1, vocabulary - 1, (tokens,), generator=generator)
    text[0, tokens - 1] = vocabulary - 1
    return text


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
    print(common.table(rows))


def _print_cost(cost: Cost, host: nn.Module, dense: bool) -> None:
    """Each tower, a decoder, the sum of all, whose the saving is, and what was counted."""
    for tower, macs in cost.towers.items():
        before, after, padding = (float(one.sum()) for one in (cost.dense[tower], macs, cost.padding[tower]))
        share = "" if dense else savings.share(tower, cost.shares)
        _print_macs(f"{tower} tower", before, after, padding, dense, share)
    if cost.dense_decoder:
        _print_macs("decoder", cost.dense_decoder, cost.decoder, cost.decoder_padding, dense)
    _print_macs("all", cost.dense_total, cost.total, cost.skipped, dense)
    note = "" if dense else savings.whose(cost.shares, cost.reductions, cost.reduction)
    if note:
        print(note)
    print(_COUNTED.format(instance=_instance(host)))


def _print_macs(what: str, before: float, after: float, padding: float, dense: bool, share: str = "") -> None:
    saved = "" if dense else f"   pruned {after / 1e9:9.3f} GMACs   ({savings.less(after, before)}{share})"
    beside = f"   and {padding / 1e9:.3f} on padding{'' if dense else ', skipped'}" if padding > 0 else ""
    print(f"{what:12} dense {before / 1e9:9.3f} GMACs{saved}{beside}")


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


def _instance(host: nn.Module) -> str:
    if find_composite(host) is None:
        return "an image"
    if hasattr(host, "rank"):
        return f"an image, a question and an answer of {_ANSWER} tokens"
    return "two images and a sentence" if getattr(host, "images_per_sentence", 1) == 2 else "an image and a sentence"
