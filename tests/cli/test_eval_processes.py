"""`eval` in two processes: the rows, scores and files of one process, and one message when either fails."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from ranks import in_a_process, on_two_ranks

from vltprune.cli import common
from vltprune.cli import main as cli
from vltprune.data import SyntheticPairs
from vltprune.evaluation.tasks import Nlvr

pytest.importorskip("accelerate", reason="several processes need accelerate: pip install 'vltprune[train]'")
SMALL = ["vision_width=32", "vision_depth=2", "vision_heads=2", "text_width=32", "text_depth=2", "text_heads=2"]


def rows(folder):
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{**row, "seconds": 0} for row in found]


def summary(folder):
    return {**json.loads((folder / "summary.json").read_text()), "records_per_second": 0, "matching": None}


@pytest.fixture
def statements(tmp_path):
    """Eleven statements about two images; both of the second batch of two, and one of the fourth, are broken."""
    for i, pixels in enumerate(SyntheticPairs("test", 1)[0].images):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    words = "no star", "a red star", "no circle", "a red circle", "a star", "two circles"
    entries = [
        {
            "images": ["0.png", "broken.png" if i in (2, 3, 6) else f"{i % 2}.png"],
            "sentence": words[i % len(words)],
            "label": str(bool(i % 3)),
        }
        for i in range(11)
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path / "data.json"


def nlvr(data, output, *options):
    argv = ["eval", "--task", "nlvr", "--model", "blip_nlvr_tiny_evit", "--model-args", *SMALL, "--workers", "1"]
    return [*argv, "--data", str(data), "--output", str(output), "--batch-size", "2", *options]


def alone(argv):
    assert cli.main(argv) == 0


def in_two(argv, output, code=0, fault=None):
    """Run a command in two processes; what each of them printed, the two streams together."""
    on_two_ranks(command, argv, output, code, fault)
    return [Path(f"{output}.{rank}").read_text() for rank in range(2)]


def command(rank, argv, output, code, fault):
    if fault is not None:
        fault(rank)
    with open(f"{output}.{rank}", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        found = cli.main(argv)
    assert found == code, Path(f"{output}.{rank}").read_text()


def test_two_processes_write_what_one_writes(statements, tmp_path):
    in_a_process(alone, nlvr(statements, tmp_path / "one"))
    first, second = in_two(nlvr(statements, tmp_path / "two"), tmp_path / "out")
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    assert [row["index"] for row in rows(tmp_path / "two") if "skipped" in row] == [2, 3, 6]
    assert summary(tmp_path / "two") == summary(tmp_path / "one")
    assert first.count("8 records") == first.count("RANDOM weights") == 1 and second == ""


def test_runs_of_one_and_of_two_processes_continue_each_other(statements, tmp_path):
    in_a_process(alone, nlvr(statements, tmp_path / "one"))
    in_two(nlvr(statements, tmp_path / "both", "--limit", "4"), tmp_path / "out")
    in_a_process(alone, nlvr(statements, tmp_path / "both", "--limit", "6"))
    assert len(rows(tmp_path / "both")) == 6
    in_two(nlvr(statements, tmp_path / "both"), tmp_path / "out")
    assert rows(tmp_path / "both") == rows(tmp_path / "one")
    assert summary(tmp_path / "both") == summary(tmp_path / "one")


def test_both_stages_of_retrieval(captioned, vocabulary, tmp_path):
    file, arguments = vocabulary
    argv = ["eval", "--task", "retrieval", "--model", "blip_retrieval_tiny_evit", "--vocabulary", file, "--k-test", "2"]
    argv += ["--model-args", *arguments, *SMALL, "--data", str(captioned), "--batch-size", "2", "--output"]
    in_a_process(alone, [*argv, str(tmp_path / "one")])
    first, second = in_two([*argv, str(tmp_path / "two")], tmp_path / "out")
    for stage in ("", "matching_5x9_k2"):
        assert rows(tmp_path / "two" / stage) == rows(tmp_path / "one" / stage)
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["matching"] for name in ("one", "two"))
    assert {**two, "pairs_per_second": 0} == {**one, "pairs_per_second": 0}
    assert summary(tmp_path / "two") == summary(tmp_path / "one")
    assert "the nearest 2 judged" in first and second == ""


def fails_late(rank):
    """The second process fails at its second batch."""
    predict, calls = Nlvr.predict, []

    def failing(self, *args):
        calls.append(rank)
        if rank == 1 and len(calls) == 2:
            raise FloatingPointError("the answer\nis NaN")
        return predict(self, *args)

    Nlvr.predict = failing  # in this process, which ends here


def test_an_error_in_one_process_ends_both_with_one_message(statements, tmp_path):
    argv = nlvr(statements, tmp_path / "two", "--batch-size", "1")
    first, second = in_two(argv, tmp_path / "out", 2, fails_late)
    error = "vltprune: error: process 1 of 2 failed: FloatingPointError: the answer is NaN"
    assert [line for line in first.splitlines() if "error" in line] == [error] and second == ""
    in_two(argv, tmp_path / "out")
    in_a_process(alone, nlvr(statements, tmp_path / "one", "--batch-size", "1"))
    assert rows(tmp_path / "two") == rows(tmp_path / "one")


def leaves(rank):
    """The second process ends without a word, as one does that the system kills."""
    predict = Nlvr.predict
    Nlvr.predict = lambda *args: os._exit(0) if rank else predict(*args)


def test_a_lost_process_ends_the_other(statements, tmp_path):
    with contextlib.suppress(FileNotFoundError):
        in_two(nlvr(statements, tmp_path / "two"), tmp_path / "out", 2, leaves)
    (line,) = [line for line in Path(f"{tmp_path / 'out'}.0").read_text().splitlines() if "error" in line]
    assert line.startswith("vltprune: error: process 0 of 2 lost another one: ")


def has_other_weights(rank):
    create = common.load_model

    def load(*args, **more):
        model = create(*args, **more)
        if rank:
            next(model.parameters()).data.add_(1)
        return model

    common.load_model = load


@pytest.mark.parametrize(
    ("options", "fault", "complaint"),
    [
        ((), has_other_weights, "process 1 of 2 failed: ValueError: content_of_model is"),
        (("--k-test", "5"), None, "only retrieval has a second stage"),
        (("--data", "nowhere.json"), None, "no annotation file nowhere.json"),
    ],
)
def test_what_ends_both_before_the_first_batch(options, fault, complaint, statements, tmp_path):
    first, second = in_two(nlvr(statements, tmp_path / "two", *options), tmp_path / "out", 2, fault)
    (line,) = [line for line in first.splitlines() if "error" in line]
    assert complaint in line and second == ""
    assert not list((tmp_path / "two").glob("results*"))
