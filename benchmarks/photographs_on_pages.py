"""Photographs of many sizes, each somewhere on a white page: the same records, where what there is to see differs.

    python benchmarks/photographs_on_pages.py --data FLICKR8K --out PAGES

writes PAGES/train.json, PAGES/dev.json and PAGES/images, for `flickr8k_retrieval.py --data PAGES`. A page is as large as its
photograph was; the photograph's side is a share of the page's, even over 0.4 .. 1, and its place is anywhere that it fits, so
that 16 % to all of the patches show something. Sizes and places come from the record's place in its split: they are the same
on every machine. Captions are as they were. A minute.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from vltprune.data import pictures

SPLITS = ("train", "dev")
LEAST, WHITE = 0.4, (255, 255, 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="train.json, dev.json and the photographs they name")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pages")
    options = parser.parse_args()
    for split in SPLITS:
        records = json.loads((options.data / f"{split}.json").read_text())
        for place, record in enumerate(records):
            file = options.out / record["image"]
            file.parent.mkdir(parents=True, exist_ok=True)
            page(pictures.read(options.data / record["image"]), split, place).save(file, quality=95)
        shutil.copy(options.data / f"{split}.json", options.out)


def page(photograph: Image.Image, split: str, place: int) -> Image.Image:
    """A white page of the photograph's size, and on it the photograph, smaller. place: of the record in its split."""
    numbers = _numbers(split, place)
    share = _side(numbers)
    width, height = (max(1, round(share * length)) for length in photograph.size)
    left, top = (int(numbers.integers(room + 1)) for room in (photograph.width - width, photograph.height - height))
    white = Image.new("RGB", photograph.size, WHITE)
    white.paste(photograph.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return white


def area(split: str, place: int) -> float:
    """The photograph's share of its page."""
    return _side(_numbers(split, place)) ** 2


def _numbers(split: str, place: int) -> np.random.Generator:
    """What a page is drawn from: first the photograph's side, then where it lies."""
    return np.random.default_rng([SPLITS.index(split), place])


def _side(numbers: np.random.Generator) -> float:
    """As a share of the page's."""
    return numbers.uniform(LEAST, 1)


if __name__ == "__main__":
    main()
