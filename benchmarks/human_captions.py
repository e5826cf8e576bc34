"""How people agree with people: each photograph's first caption scored against the others, by pycocoevalcap.

    python benchmarks/human_captions.py FLICKR8K/dev.json

prints what docs/evaluate.md says of Flickr8k's dev split. Takes seconds; needs the extra `eval` and Java.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vltprune.caption_metrics import caption_scores
from vltprune.data import captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="annotations with several captions an image")
    records = captions(parser.parse_args().file, ".")
    first = {str(record.index): record.captions[0] for record in records}
    others = {str(record.index): record.captions[1:] for record in records}
    for name, score in caption_scores(first, others).items():
        print(f"{name:8} {100 * score:.2f}")


if __name__ == "__main__":
    main()
