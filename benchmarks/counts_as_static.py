"""What its own counts are worth to a trained model: its recall, and that of a static count with their mean shares.

    python benchmarks/counts_as_static.py --data FLICKR8K --model WORK/madtp_that_fades,_bf16,_600_steps_0.7_0/model

of models that `flickr8k_retrieval.py ablate` trained. Each answers for the first 500 records of dev, whose five captions are
measured one after another: the mean of R@1, 5, 10 both ways, in %. As static, all instances have, at each depth of each
tower, the mean share of tokens that the model's counts leave there, at the same MACs (`need_of_instances.py`). Printed
besides is what share of an instance's tokens the first block that prunes leaves in the image tower, mean and standard
deviation. Two minutes of one core a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from need_of_instances import as_static, means, recall, watch

import vltprune as vp
from vltprune.data import captions
from vltprune.flops import Meter
from vltprune.preprocessing import transforms
from vltprune.surgery import pruning
from vltprune.tasks import Retrieval

RECORDS, CAPTIONS = 500, 5


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data set")
    parser.add_argument("--model", type=Path, required=True, nargs="+", help="folders of models")
    options = parser.parse_args()
    for folder in options.model:
        print(told(vp.load(folder).eval(), options.data), folder.parent.name, flush=True)


def told(model: Any, data: Path) -> str:
    """What is printed of a model."""
    records = captions(data / "dev.json", data)[:RECORDS]
    task, prepare = Retrieval.of(model), transforms(model)
    images = torch.stack([prepare(picture) for record in records for picture in record.pictures()])
    words = [task.encode([record.captions[place] for record in records]) for place in range(CAPTIONS)]

    def measure() -> float:
        image = task.image_features(model, images)
        texts = [task.text_features(model, *one) for one in words]
        return sum(recall(image, text) for text in texts) / CAPTIONS

    first = next(iter(pruning(model).towers["image"].pruners.values()))
    left = watch(model)
    with vp.collect() as traces:
        own = measure()
    reduction, share = Meter(model)(traces).reduction, torch.cat(left[first])
    static = as_static(measure, means(left), reduction, model)
    first_left = f"{share.mean():.2f} ± {share.std():.2f} of an image stay at first"
    return f"{own:.1f}, as static {static:.1f}, at {reduction:.1%} fewer MACs; {first_left}:"


if __name__ == "__main__":
    main()
