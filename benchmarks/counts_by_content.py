"""Whether it would help to know how much there is to see: counts by content, for photographs on pages.

    python benchmarks/counts_by_content.py --data PAGES --model WORK/static_count_that_fades,_pages,_short_0.7_*/model

of PAGES, which `photographs_on_pages.py` made, and models that `flickr8k_retrieval.py ablate --short --pages` trained there
with a static count. At the first block that prunes, each page's share of tokens is the mean one times its photograph's area
to a power, over the mean of that; nothing else is changed. Power 0 is a model as it was trained, 1 divides tokens by area.
Printed are the mean recall of each model on the first 500 records of dev with one caption each, over their five captions,
the share of MACs saved, and how far recall is above that at power 0, mean ± sd over models. Five minutes of one core a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from counts_and_things import answered
from photographs_on_pages import area
from torch import Tensor

import vltprune as vp
from vltprune.data import captions
from vltprune.preprocessing import transforms
from vltprune.tasks import Retrieval
from vltprune.training.calls import calls_of

RECORDS, CAPTIONS, BATCH = 500, 5, 50
POWERS = (0.0, -0.5, 0.25, 0.5, 0.75, 1.0)  # the first is what the others are compared with
HALF = 0.499 / 64  # of a token, as a share of a page's: counts are rounded up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the pages")
    parser.add_argument("--model", type=Path, required=True, nargs="+", help="folders of models with a static count")
    options = parser.parse_args()
    models: list[Any] = [vp.load(folder).eval() for folder in options.model]
    task, prepare = Retrieval.of(models[0]), transforms(models[0])
    records = captions(options.data / "dev.json", options.data)[:RECORDS]
    alone = [[replace(one, captions=one.captions[i : i + 1]) for one in records] for i in range(CAPTIONS)]
    calls = [calls_of(task, some, prepare, size=BATCH) for some in alone]
    areas, alike = torch.tensor([area("dev", place) for place in range(len(records))]), []
    for power in POWERS:
        recalls, saved = zip(
            *(recall(task, model, calls, areas**power / (areas**power).mean()) for model in models), strict=True
        )
        alike = alike or recalls
        each = ", ".join(f"{100 * one:.1f}" for one in recalls)
        gains = [100 * (own - same) for own, same in zip(recalls, alike, strict=True)]
        spread = f" ± {stdev(gains):.1f}" if len(gains) > 1 else ""
        print(f"area^{power:g}: {each} at {mean(saved):.1%} fewer MACs, {mean(gains):+.1f}{spread}", flush=True)


def recall(task: Any, model: Any, calls: Sequence[Sequence[Any]], by_content: Tensor) -> tuple[float, float]:
    """Mean recall, and the share of MACs saved, with the first block's shares multiplied; calls: of each caption."""

    def change(shares: Tensor, factor: Tensor, first: bool) -> Tensor:
        return shares * factor - HALF if first else shares

    runs = [answered(model, some, change, by_content) for some in calls]
    recalls, saved = zip(*((task.score(rows)["mean_recall"], saved) for rows, saved in runs), strict=True)
    return sum(recalls) / len(runs), sum(saved) / len(runs)


if __name__ == "__main__":
    main()
