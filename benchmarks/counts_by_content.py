"""Whether it would help to know how much there is to see: counts by content, for photographs on pages.

    python benchmarks/counts_by_content.py --data PAGES --model WORK/static_count_that_fades,_pages,_short_0.7_*/model

of PAGES, which `photographs_on_pages.py` made, and models that `flickr8k_retrieval.py ablate --short --pages` trained there
with a static count. At the first block that prunes, each page's share of tokens is the mean one times its photograph's area
to a power, over the mean of that; nothing else is changed. Power 0 is a model as it was trained, 1 divides tokens by area.
Printed are the mean recall of each model on the first 500 records of dev with one caption each, over their five captions,
and the share of MACs saved. Five minutes of one core a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from counts_and_things import answered
from photographs_on_pages import side
from torch import Tensor

import vltprune as vp
from vltprune.data import captions
from vltprune.preprocessing import transforms
from vltprune.tasks import Retrieval
from vltprune.training.calls import calls_of

RECORDS, CAPTIONS, BATCH = 500, 5, 50
POWERS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0)
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
    area = torch.tensor([side("dev", place)[0] ** 2 for place in range(len(records))])
    for power in POWERS:
        found = [recall(task, model, calls, area**power / (area**power).mean()) for model in models]
        recalls = ", ".join(f"{one:.1%}" for one, _ in found)
        print(
            f"area^{power:g}: {recalls} at {sum(saved for _, saved in found) / len(found):.1%} fewer MACs", flush=True
        )


def recall(task: Any, model: Any, calls: Sequence[Sequence[Any]], by_content: Tensor) -> tuple[float, float]:
    """Mean recall, and the share of MACs saved, with the first block's shares multiplied; calls: of each caption."""

    def change(shares: Tensor, factor: Tensor, first: bool) -> Tensor:
        return shares * factor - HALF if first else shares

    runs = [answered(model, some, change, by_content) for some in calls]
    recalls, saved = zip(*((task.score(rows)["mean_recall"], saved) for rows, saved in runs), strict=True)
    return sum(recalls) / len(runs), sum(saved) / len(runs)


if __name__ == "__main__":
    main()
