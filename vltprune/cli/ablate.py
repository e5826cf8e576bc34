"""vltprune ablate: compares ways to prune a model, each set to equal cost; a page, tables, and resumption."""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import nn

from ..data import Loader, fingerprint
from ..evaluation import tasks
from ..evaluation.ablation import Ablation, CellRunner, TaskMetric
from ..evaluation.ablation_grid import Cell, Grid, cell_key
from ..evaluation.results_log import ResultsLog, Row
from ..evaluation.tasks.base import Images
from ..models.catalog import ModelName
from ..models.resolve import is_saved_model
from ..utils.progress import bar
from . import common, eval, options, prune

_LOG = "cells.jsonl"
_FILES = ("settings.json", _LOG, "ablation.json", "ablation.csv", "ablation.md", "ablation.html")
_GRID = "such as 'preset=evit,madtp; keep=ratio(ratio=0.5),top_p; reduction=0.3,0.5; seed=0,1'"


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "ablate",
        parents=parents,
        help="compare presets and parts at equal cost on a data set: a page with charts and a table; resumes",
        description="Each cell of the grid is the model pruned with its preset and parts, calibrated to its reduction, and "
        "scored. Cells that are in the folder already are not run again, and a grid may grow.",
    )
    parser.add_argument(
        "--grid",
        type=_grid,
        required=True,
        metavar="TEXT",
        help=f"lists of values whose cross product is compared, {_GRID}",
    )
    eval.add_model(parser)
    eval.add_data(parser)
    parser.add_argument(
        "--val", metavar="FILE", help="annotations that costs are set and measured on, without labels (default: --data)"
    )
    parser.add_argument(
        "--val-limit",
        type=options.positive,
        default=64,
        metavar="N",
        help="only the first N records of them (default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=options.fraction,
        default=0.01,
        metavar="FRACTION",
        help="how far from the asked MACs a cell may be, relative to them (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=options.natural,
        default=3,
        metavar="N",
        help="how often each cell is timed against the dense model; 0 leaves time out (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs", type=options.positive, default=1, metavar="N", help="processes that run cells (default: %(default)s)"
    )
    common.add_output(parser, "ablate/TASK/MODEL")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    _check(args)
    folder = common.output_folder(args.output or common.default_output(f"ablate/{args.task}", args.model))
    if args.overwrite:
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
    common.use_threads(args.threads)
    model = eval.load(args)
    settings = {**eval.settings_of(args, model), **_own_settings(args)}
    log = ResultsLog(folder, settings, _LOG)
    runner = _runner(args, model)

    _complete(args, runner, log)
    by_key = {cell_key(row["cell"]): row for row in log.rows}
    rows = [by_key[cell_key(None)], *(by_key[cell.key] for cell in args.grid)]
    ablation = Ablation(args.grid, rows, settings)
    page = ablation.save(folder)
    print(ablation.markdown())
    failed = len(ablation.failed)
    if failed == len(args.grid):
        raise ValueError(f"none of the {failed} cells ran, the first because: {ablation.failed[0]['error']}")
    print(f"{len(args.grid) - failed} of {len(args.grid)} cells ran" + (f", {failed} did not" if failed else ""))
    print(f"wrote {page}, and the same as .json, .csv and .md")


def _grid(text: str) -> Grid:
    """An argparse type: a grid."""
    try:
        return Grid.from_text(text)
    except (LookupError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _check(args: argparse.Namespace) -> None:
    """OSError or ValueError, before a model is built, for what cannot be read or pruned."""
    if args.answers and args.task != "vqa":
        raise ValueError(f"--answers goes with --task vqa: leave it out of --task {args.task}")
    common.check_annotations("--data", args.data)
    if args.val:
        common.check_annotations("--val", args.val)
    common.image_folders(args)
    if not is_saved_model(args.model) and (preset := ModelName.parse(args.model).preset):
        raise ValueError(
            f"--model {args.model} names the preset {preset}: name the dense model, and the preset in --grid"
        )


def _own_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What cells depend on besides the settings of an evaluation. The grid may grow, so it is none of them."""
    names = ("limit", "val", "val_limit", "tolerance", "repeats", "strict")
    return {**{name: getattr(args, name) for name in names}, "content_of_val": fingerprint.hash_file(args.val)}


def _runner(args: argparse.Namespace, model: nn.Module) -> CellRunner:
    """What runs the cells on the model and data of the options."""
    kind: Any = tasks.tasks[args.task]
    images = common.image_folders(args)
    task: tasks.Task[Any] = kind.from_model(model, tasks.Options(args.vocabulary, args.answers))
    records = kind.load_records(args.data, images, args.strict)
    val = kind.load_records(args.val, _val_images(args), args.strict) if args.val else records
    loader = Loader(
        records, common.input_transform(model), args.batch_size, args.strict, stop=args.limit, workers=args.workers
    )
    source = f"--val {args.val}" if args.val else f"--data {args.data}"
    batches = prune.record_batches(task, val[: args.val_limit], model, args.batch_size, source)
    metric = TaskMetric(task, loader, args.device)
    return CellRunner(model, metric, [batch for _, batch in batches], args.tolerance, args.repeats)


def _val_images(args: argparse.Namespace) -> Images:
    """The folder of --images, or that of --val itself."""
    return common.image_folders(argparse.Namespace(images=args.images, data=args.val))


def _complete(args: argparse.Namespace, runner: CellRunner, log: ResultsLog) -> None:
    """Run the cells that the log lacks, the dense model first, and log each as soon as it is done."""
    done = {cell_key(row["cell"]) for row in log.rows}
    missing = [cell for cell in (None, *args.grid) if cell_key(cell and cell.to_dict()) not in done]
    with bar("cells", 1 + len(args.grid)) as shown:
        shown.update(1 + len(args.grid) - len(missing))
        jobs = min(args.jobs, len(missing))
        for row in _in_processes(args, missing, jobs) if jobs > 1 else map(runner, missing):
            log.add([row])
            shown.update()


_of_process: CellRunner | None = None


def _in_processes(args: argparse.Namespace, cells: Sequence[Cell | None], jobs: int) -> Iterator[Row]:
    """The rows of cells in the order in which processes finish them. ChildProcessError where a process dies."""
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, initializer=_start, initargs=(args, threads))
    try:
        for future in as_completed([pool.submit(_run_cell, cell) for cell in cells]):
            yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"a process of --jobs {args.jobs} died, perhaps for lack of memory: the same command resumes, with fewer --jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(args: argparse.Namespace, threads: int) -> None:
    """Load model and data in a process of its own. What loading says, the command has said already."""
    global _of_process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends it without a traceback
    torch.set_num_threads(threads)
    with contextlib.redirect_stderr(io.StringIO()):
        _of_process = _runner(args, eval.load(args))


def _run_cell(cell: Cell | None) -> Row:
    assert _of_process is not None  # `_start` ran
    return _of_process(cell)
