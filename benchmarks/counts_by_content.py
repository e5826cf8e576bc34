"""Whether it would help to know how much there is to see: counts by content, for photographs on pages.

    python benchmarks/counts_by_content.py --data PAGES --model "WORK/static_count_that_fades,_pages,_short_0.7_0/model"

of PAGES, which `photographs_on_pages.py` made, and a model that `flickr8k_retrieval.py ablate --short --pages` trained on it
with a static count. At the first block that prunes, each page's share of tokens is the mean one times its photograph's area to
a power, over the mean of that; nothing else is changed. Power 0 is the model as it was trained, 1 divides tokens by area.
Printed are the mean recall on the first 500 records of dev, one caption each, and the share of MACs saved, which is one point
more at 0, for counts are rounded up. Three minutes of one core.
"""

from __future__ import annotations

import argparse
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

RECORDS, BATCH = 500, 50
POWERS = (-0.5, 0.0, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the pages")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model that was pruned by a static count")
    options = parser.parse_args()
    model: Any = vp.load(options.model).eval()
    task, records = Retrieval.of(model), captions(options.data / "dev.json", options.data)[:RECORDS]
    calls = calls_of(task, records, transforms(model), size=BATCH)
    area = torch.tensor([side("dev", place)[0] ** 2 for place in range(RECORDS)])
    for power in POWERS:
        by_content = area**power / (area**power).mean()

        def change(shares: Tensor, factor: Tensor, first: bool) -> Tensor:
            return shares * factor if first else shares

        rows, saved = answered(model, calls, change, by_content)
        print(f"area^{power:g}: {task.score(rows)['mean_recall']:.1%} at {saved:.1%} fewer MACs", flush=True)


if __name__ == "__main__":
    main()
