"""What pruning with training loses in visual question answering: DAQUAR, by a small model in BLIP's architecture.

    python benchmarks/daquar_vqa.py --real REAL --data DAQUAR --work WORK dense
    python benchmarks/daquar_vqa.py --real REAL --data DAQUAR --work WORK trained --reduction 0.5

REAL holds the encoders' weights, as `photo_towers.py` says; DAQUAR train.json, dev.json and images/. The model reads a question
with cross-attention to the photograph's tokens, at 112 px, and writes the answer: its image encoder and both its text stacks
begin as the trained encoders, its cross-attention and head as noise. `dense` trains it; `trained` trains it pruned, to one
cost, its dense self as teacher. The knob is set on the first 256 questions of dev.json, and the shares of exact answers, and
of right words, are of all its 836. Runs resume. Results go to benchmarks/results/daquar_vqa.json, and `table` prints the exact
ones. On one H200, beside a dozen other runs, `dense` took 108 s and `trained` 196 s.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import photo_runs
import torch
import variants
from photo_towers import MINILM, vqa_model

RESULTS = Path(__file__).parent / "results" / "daquar_vqa.json"
AT = {"image": (0, 2, 4, 6), "text": (0, 2, 4)}
_WORDS = ("*.word.*", "*.position.*")
_LOWER = ("visual.cls_token", "visual.pos_embed", "visual.patch_embed.*", "visual.blocks.[0-5].*")


def main() -> None:
    options = photo_runs.parser(__doc__, ["dense", "trained", "table"]).parse_args()
    torch.set_num_threads(options.threads)
    if options.stage == "table":
        return print(variants.table(RESULTS, lambda row: row["scores"]["exact"]))
    {"dense": dense, "trained": trained}[options.stage](options)


def dense(options: argparse.Namespace) -> None:
    """The model that all others start from."""
    fields = {**_own(options), "freeze": _WORDS + _LOWER, "epochs": 10}
    photo_runs.dense(options.work, RESULTS, "dense", lambda: vqa_model(options.real), **fields)


def trained(options: argparse.Namespace) -> None:
    """The dense model, trained to a cost."""
    own = {"model": str(options.work / "dense" / "model"), "freeze": _WORDS, "parts": {"at": AT}, "epochs": 5}
    config = variants.config_of(options.variant, reduction=options.reduction, **own, **_own(options))
    photo_runs.trained(options.work, RESULTS, options.variant, config)


def _own(options: argparse.Namespace) -> dict[str, Any]:
    return {"task": "vqa", "vocabulary": str(options.real / MINILM / "vocab.txt"), **photo_runs.common(options)}


if __name__ == "__main__":
    main()
