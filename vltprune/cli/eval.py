"""vltprune eval: scores, cost, tokens kept and throughput of a model on a data set of its task."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import __version__
from ..cost import describe
from ..data import Loader, fingerprint
from ..data.records import R
from ..evaluation import tasks
from ..evaluation.evaluator import Evaluator, summarize, summarize_matching
from ..evaluation.processes import Processes
from ..evaluation.results_log import ResultsLog, Row, write_json
from ..evaluation.tasks.matching import K_TEST
from ..models.wordpiece import BERT
from ..utils.progress import bar
from ..utils.table import table
from . import common, options

_SETTINGS = ("task", "model", "model_args", "pretrained", "vocabulary", "answers")
_SETTINGS += ("data", "images", "batch_size", "device")


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune eval`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "eval", parents=parents, help="scores and cost of a model on a data set; resumes where it was stopped"
    )
    add_model(parser)
    add_data(parser)
    most = (
        f"for retrieval by BLIP: how many nearest its matching head judges again; 0 leaves that out (default: {K_TEST})"
    )
    parser.add_argument("--k-test", type=options.natural, metavar="K", help=most)
    parser.add_argument(
        "--output",
        type=options.output,
        metavar="DIR",
        help="folder for the results; one of the same settings resumes where it was stopped (default: eval/TASK/MODEL)",
    )
    parser.set_defaults(run=run)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model, --model-args, --pretrained, --vocabulary, --device and --dtype."""
    parser.add_argument("--model", required=True, help=common.MODEL)
    arguments = "for the named model: vocab_size=30524, keep='ratio(ratio=0.5)'"
    parser.add_argument(
        "--model-args", type=options.assignment, nargs="+", default=[], metavar="NAME=VALUE", help=arguments
    )
    common.add_pretrained(parser)
    vocabulary = "for BLIP: vocab.txt or tokenizer.json (default: the hub's %(default)s)"
    parser.add_argument("--vocabulary", type=options.vocabulary, default=BERT, metavar="PATH", help=vocabulary)
    common.add_device(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add --task, --data, --images, --answers, --limit, --batch-size, --workers and --strict."""
    parser.add_argument("--task", required=True, choices=tasks.tasks.names(), help="what is asked of the model")
    parser.add_argument("--data", required=True, metavar="FILE", help="annotations, or synthetic:test (nlvr)")
    common.add_images(parser)
    parser.add_argument(
        "--answers",
        type=options.file,
        metavar="FILE",
        help="for vqa: a list of answers to choose from (default: free words)",
    )
    parser.add_argument("--limit", type=options.positive, metavar="N", help="only the first N records (default: all)")
    parser.add_argument(
        "--batch-size", type=options.positive, default=16, metavar="N", help="records at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=options.natural,
        default=2,
        metavar="N",
        help="threads that open images (default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at what cannot be read, instead of skipping it")


def run(args: argparse.Namespace) -> int:
    """Runs `vltprune eval` with its parsed arguments, and returns the exit code. Of several processes the first one prints."""
    if _launched_as()[0] == 0:
        _run(args)
        return 0
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            _run(args)
        except KeyboardInterrupt:
            return 130
        except Exception:  # which the first process prints
            if args.traceback:
                raise
            return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    with _group(args.device) as (processes, device):
        job = _prepare(args, processes, device)
        rows = job.answer("answering", job.task, job.loader, job.folder, job.settings)[: len(job.loader)]
        matching, pairs, summary = None, [], {}
        if isinstance(job.task, tasks.Retrieval) and job.task.has_head and args.k_test != 0:
            with processes.together():
                if processes.is_main:
                    summary = _summarize(job, rows)
                matching = job.task.matching(job.loader.records, rows, args.k_test or K_TEST)
            pairs = _second_stage(job, matching)
    if not processes.is_main:
        return
    if matching is None:
        _summarize(job, rows)
    else:
        summary["matching"] = summarize_matching(matching, pairs)
        write_json(job.folder / "summary.json", summary)
        _print_matching(summary["matching"])
    print(f"wrote {job.folder / 'summary.json'}, and the answer to each record in the same folder")


@dataclass(frozen=True)
class _Job:
    """An evaluation that is ready to run, in one process of those that share it.

    Attributes:
        task: The task, set to the model.
        model: The model, on the process's device.
        loader: The records and their images.
        folder: The folder of the results.
        settings: What the answers depend on.
        processes: The processes.
        device: The process's device.
    """

    task: Any
    model: nn.Module
    loader: Loader[Any]
    folder: Path
    settings: Mapping[str, Any]
    processes: Processes
    device: str

    def answer(
        self,
        what: str,
        stage: tasks.EvaluationStage[R],
        loader: Loader[R],
        folder: Path,
        settings: Mapping[str, object],
    ) -> list[Row]:
        """Answer the records that a folder's log lacks, under a progress bar, and return all its rows."""
        with self.processes.together():
            log = ResultsLog(folder if self.processes.is_main else None, settings)
        rows = self.processes.broadcast(log.rows)
        if not self.processes.is_main:
            log.add(rows)
        evaluator = Evaluator(stage, self.model, self.device, processes=self.processes)
        with bar(what, len(loader)) as shown:
            shown.update(min(len(log.rows), len(loader)))
            evaluator.run(loader, log, shown.update)
        return log.rows


def _prepare(args: argparse.Namespace, processes: Processes, device: str) -> _Job:
    """Check the options, and load what they name."""
    with processes.together():
        _check_options(args)
        common.check_annotations("--data", args.data)
        images = common.image_folders(args)
        folder = args.output or common.default_output(f"eval/{args.task}", args.model)
        if processes.is_main:
            folder = common.output_folder(folder)
        common.use_threads(args.threads)
        kind: Any = tasks.tasks[args.task]
        records = kind.load_records(args.data, images, args.strict)
        model = load(args, device)
        settings = settings_of(args, model)
        task: tasks.Task[Any] = kind.from_model(model, tasks.Options(args.vocabulary, args.answers))
        _check_second_stage(task, args.k_test)
        loader = Loader(
            records, common.input_transform(model), args.batch_size, args.strict, stop=args.limit, workers=args.workers
        )
    _check_alike(processes, settings)
    return _Job(task, model, loader, Path(folder), settings, processes, device)


def _launched_as() -> tuple[int, int]:
    """The rank of this process and the number of all, as a launcher such as `accelerate launch` or torchrun has set them."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ.get("RANK", 0)), count) if count > 1 else (0, 1)


@contextmanager
def _group(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes that a launcher has started, and this one's device; without a launcher this process alone."""
    if _launched_as()[1] == 1:
        yield Processes(), device
        return
    try:
        from ..training.accelerate_state import accelerate_state
    except ImportError as error:
        raise ImportError(f"several processes need the extra train: pip install 'vltprune[train]' ({error})") from error
    had_group = dist.is_initialized()
    with accelerate_state("float32", device) as state:
        yield Processes(state.process_index, state.num_processes), str(state.device)
    if not had_group:
        dist.destroy_process_group()


def _check_alike(processes: Processes, settings: Mapping[str, object]) -> None:
    """ValueError where a process has other files or weights than the first: their answers would be of two models."""
    first = processes.broadcast(settings)
    with processes.together():
        for key, value in settings.items():
            if value != first[key]:
                raise ValueError(
                    f"{key} is {value!r} here, and {first[key]!r} in process 0: give all processes the same files"
                )


def settings_of(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """What answers depend on: options, and digests of the files and weights that they name. Those of images are in each row.

    Args:
        args: The options of `add_model` and `add_data`.
        model: The model that they mean.
    """
    return {
        **{name: getattr(args, name) for name in _SETTINGS},
        "dtype": str(common.dtype_of(model)).removeprefix("torch."),
        "version": __version__,
        "content_of_model": fingerprint.hash_model(model),
        "content_of_data": fingerprint.hash_file(args.data),
        "content_of_answers": fingerprint.hash_file(args.answers),
        "content_of_vocabulary": fingerprint.hash_file(args.vocabulary),
    }


def _summarize(job: _Job, rows: Sequence[Row]) -> dict[str, Any]:
    """Summarize a task's rows: print, write summary.json, and the file of answers where a server takes one."""
    task: Any = job.task
    if isinstance(task, tasks.SupportsSubmission):  # before the scorer, which may fail
        results = task.submission([row for row in rows if "skipped" not in row])
        write_json(job.folder / f"{job.settings['task']}_result.json", results)
    summary: dict[str, Any] = {**job.settings, **summarize(job.task, rows)}
    unreadable = getattr(job.loader.records, "skipped", ())
    summary["skipped"] += [{"index": one.index, "skipped": one.reason} for one in unreadable]
    write_json(job.folder / "summary.json", summary)
    _print(summary)
    return summary


def _second_stage(job: _Job, matching: tasks.Matching) -> list[Row]:
    """The rows of BLIP's second stage. Its log is for these images and texts: another --limit has another."""
    # the pairs follow from the similarity, whose rounding may differ by machine
    matching = replace(matching, similarity=job.processes.broadcast(matching.similarity))
    loader = replace(job.loader, records=matching.pairs(), batch_size=1, stop=None)
    images, texts = matching.similarity.shape
    settings = {**job.settings, "content_of_features": matching.fingerprint}
    return job.answer("matching", matching, loader, job.folder / f"matching_{images}x{texts}_k{matching.k}", settings)


def _check_options(args: argparse.Namespace) -> None:
    """ValueError for options of another task."""
    if args.k_test and args.task != "retrieval":
        raise ValueError(
            f"--k-test {args.k_test}: only retrieval has a second stage: leave it out of --task {args.task}"
        )
    if args.answers and args.task != "vqa":
        raise ValueError(f"--answers goes with --task vqa: leave it out of --task {args.task}")


def _check_second_stage(task: object, most: int | None) -> None:
    if most and not (isinstance(task, tasks.Retrieval) and task.has_head):
        raise ValueError(
            f"--k-test {most}: only retrieval has a second stage, by models with a matching head: use a blip_retrieval"
        )


def load(args: argparse.Namespace, device: str | None = None) -> nn.Module:
    """The model of the options of `add_model`.

    Args:
        args: The options.
        device: Where it runs; None for the options' device.
    """
    torch.manual_seed(0)  # random weights must be the same when a stopped run resumes
    return common.load_model(
        args.model,
        args.pretrained,
        warn_if_dense=True,
        device=device or args.device,
        dtype=args.dtype,
        **common.keywords(args.model_args),
    )


def _print(summary: Row) -> None:
    _print_scores(summary["scores"])
    for what, why in summary["unscored"].items():
        print(f"{what}: not scored ({why})")
    print(f"{summary['records']} records, {summary['records_per_second']:.1f} a second")
    _print_macs("an instance", summary["macs"], summary["dense_macs"], summary["padding"])
    for tower, (macs, dense) in summary["towers"].items():
        _print_macs(
            f"one {tower}",
            macs,
            dense,
            summary["tower_padding"][tower],
            describe.format_tower_saving(tower, summary["shares"]),
        )
    note = describe.note_on_towers(summary["shares"], summary["reductions"], summary["macs_saved"])
    if summary["kept"] and note:  # nothing is kept of a dense model
        print(note)
    _print_kept(summary)
    for one in summary["skipped"][:5]:
        common.say(f"vltprune: skipped: entry {one['index']}: {one['skipped']}")
    if summary["skipped"]:
        print(f"skipped {len(summary['skipped'])} entries that could not be read; summary.json lists them")


def _print_matching(found: Row) -> None:
    print(f"\nsecond stage, the nearest {found['k_test']} judged by the matching head:")
    _print_scores(found["scores"])
    print(f"{found['pairs']} pairs, {found['pairs_per_second']:.1f} a second")
    _print_macs("a matched pair, its image encoded already", found["macs"], found["dense_macs"], found["padding"])
    _print_kept(found)
    if found["skipped"]:
        print(f"skipped {len(found['skipped'])} calls, whose images could not be read; summary.json lists them")


def _print_scores(scores: Mapping[str, float]) -> None:
    rows = [[name, f"{100 * score:.2f}"] for name, score in scores.items()]
    print(table([["", "%"], *rows]) if rows else "no scores here: score the result file elsewhere")


def _print_macs(what: str, macs: float, dense: float, padding: float, of_saving: str = "") -> None:
    """Print MACs, pruned against dense. of_saving: the part of the whole saving, as the tail of a sentence."""
    saved = f"{describe.format_change(macs, dense)} than dense ({dense / 1e9:.3f})" if macs != dense else "as dense"
    print(f"GMACs of {what}: {macs / 1e9:.3f}, {saved}{of_saving}{describe.format_padding(padding)}")


def _print_kept(summary: Row) -> None:
    for tower, (entered, *kept) in summary["kept"].items():
        print(f"{tower} tokens, layer by layer (mean): {entered:.0f} -> " + " ".join(f"{n:.0f}" for n in kept))
