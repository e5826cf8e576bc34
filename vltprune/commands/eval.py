"""vltprune eval: a model, dense or pruned, on a data set of its task: scores, cost, tokens kept, throughput."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import hub, tasks
from ..data import Loader
from ..exam import Exam, report
from ..journal import Journal
from ..preprocessing import transforms
from ..text import BERT
from . import common

_SETTINGS = ("task", "model", "pretrained", "vocabulary", "answers", "data", "images", "batch_size", "device")


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eval", parents=parents, help="scores and cost of a model on a data set; goes on where it was stopped"
    )
    parser.add_argument("--task", required=True, choices=tasks.tasks.names(), help="what is asked of the model")
    parser.add_argument(
        "--model", required=True, help="a name, such as blip_nlvr_base_madtp, or a saved model's folder"
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="annotations, or synthetic:test (nlvr)")
    parser.add_argument("--images", metavar="DIR", help="the folder that the annotations' paths begin in (their own)")
    parser.add_argument("--output", default="eval", metavar="DIR", help="folder for the results (%(default)s)")
    parser.add_argument("--pretrained", nargs="?", const=True, metavar="PATH", help="weights; alone, the name's own")
    parser.add_argument(
        "--vocabulary",
        default=BERT,
        metavar="PATH",
        help="for BLIP: vocab.txt or tokenizer.json (the hub's %(default)s)",
    )
    parser.add_argument("--answers", metavar="FILE", help="for vqa: a list of answers to choose from (free words)")
    parser.add_argument("--limit", type=common.positive, metavar="N", help="only the first so many records")
    parser.add_argument("--batch-size", type=common.positive, default=16, metavar="N", help="records at a time (16)")
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda (cpu)")
    parser.add_argument("--strict", action="store_true", help="stop at what cannot be read, instead of skipping it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    folder = common.output_folder(args.output)
    common.use_threads(args.threads)
    kind: Any = tasks.tasks[args.task]
    records = kind.read(args.data, args.images or Path(args.data).parent, args.strict)
    settings = {name: getattr(args, name) for name in _SETTINGS}
    journal = Journal(folder, settings)
    model = _load(args)
    task: tasks.Task[Any] = kind.of(model, tasks.Options(args.vocabulary, args.answers))

    loader = Loader(records, transforms(model), args.batch_size, args.strict, stop=args.limit)
    with common.bar("answering", len(loader)) as bar:
        bar.update(min(len(journal.rows), len(loader)))
        Exam(task, model, args.device).sit(loader, journal, bar.update)

    summary = {**settings, **report(task, journal.rows[: args.limit])}
    summary["skipped"] += [{"index": one.index, "skipped": one.reason} for one in getattr(records, "skipped", ())]
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print(summary)
    print(f"wrote {folder / 'summary.json'} and {folder / 'results.jsonl'}")


def _load(args: argparse.Namespace) -> nn.Module:
    if not Path(args.model).is_dir():
        return common.load_model(args.model, args.pretrained, judged=True)
    if args.pretrained:
        raise ValueError(f"--pretrained: the folder {args.model} has weights already, leave one of them out")
    return hub.load(args.model)


def _print(summary: Mapping[str, Any]) -> None:
    rows = [[name, f"{100 * score:.2f}"] for name, score in summary["scores"].items()]
    print(common.table([["", "%"], *rows]) if rows else "nothing to score: the right answers are held back")
    dense = f", {summary['macs_saved']:.1%} fewer than dense ({summary['dense_macs'] / 1e9:.3f})"
    print(f"{summary['records']} records, {summary['records_per_second']:.1f} a second")
    print(f"GMACs an instance: {summary['macs'] / 1e9:.3f}{dense if summary['kept'] else ', dense'}")
    for tower, (entered, *kept) in summary["kept"].items():
        print(f"{tower} tokens, layer by layer (mean): {entered:.0f} -> " + " ".join(f"{n:.0f}" for n in kept))
    for one in summary["skipped"][:5]:
        common.say(f"vltprune: skipped: entry {one['index']}: {one['skipped']}")
    if summary["skipped"]:
        print(f"skipped {len(summary['skipped'])} entries that could not be read; summary.json lists them")
