"""Whether tokens follow need: what DTP keeps of a drawn image, against how many things the image shows.

    python benchmarks/counts_and_things.py

Of the packaged models, on 512 validation pairs: mean tokens left behind each block that prunes, by number of things, and their
correlation over images. A count that is the same for all correlates with nothing. Half a minute of one core.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import vltprune as vp
from vltprune.data import SyntheticPairs
from vltprune.models import zoo
from vltprune.preprocessing import transforms
from vltprune.tasks import Nlvr
from vltprune.training.calls import calls_of

NAMES = ("blip_nlvr_tiny_madtp.p70", "blip_nlvr_tiny_madtp.p80")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512)
    pairs = parser.parse_args().pairs
    drawn = SyntheticPairs("val", pairs)
    things = np.array([len(scene) for i in range(pairs) for scene in drawn[i].scenes])
    for name in NAMES:
        for depth, counts in tokens_left(name, pairs).items():
            means = ", ".join(f"{n}: {counts[things == n].mean():.1f}" for n in np.unique(things))
            print(f"{name}, block {depth}: tokens by things {means}; r = {np.corrcoef(things, counts)[0, 1]:.2f}")


@torch.no_grad()
def tokens_left(name: str, pairs: int) -> dict[int, np.ndarray]:
    """Tokens of each image, [2 pairs], behind each block that prunes."""
    model = vp.load(zoo.WEIGHTS / name)
    left: dict[int, list[int]] = {depth: [] for depth in map(int, vp.surgery.pruning(model).towers["image"].pruners)}
    for call in calls_of(Nlvr.of(model), Nlvr.read(f"synthetic:val:{pairs}", ""), transforms(model)):
        with vp.collect() as traces:
            call(model)
        image = next(trace for trace in traces if trace.tower == "image")
        for depth, counts in left.items():
            counts += image.steps[depth].lengths
    return {depth: np.array(counts) for depth, counts in left.items()}


if __name__ == "__main__":
    main()
