"""What each part of the method is worth, a line a part: the ablations' differences, on drawn pairs and on photographs.

    python benchmarks/worth.py

reads the results of `ablate_nlvr_tiny.py --steps 300` (accuracy at 80 % fewer MACs) and of `flickr8k_retrieval.py ablate`
(mean recall at 70 %), and runs nothing. A line is what the first of two variants is above the second, in points, seed by seed:
mean, standard deviation, and how many seeds both were run with. Of the twins of a variant the first pair is taken that has two
seeds: as things are now, then "t", DTP's budget kept by temperature, then "m", by temperature and without maps; of
photographs the short runs, then the long ones, "l".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import ablate_nlvr_tiny
import flickr8k_retrieval
import variants

_LINES = (
    ("scores, not chance", "static count", "random"),
    ("scores that the dense model teaches", "madtp", "scores not taught"),
    ("shares that fade, for a static count", "static count that fades", "static count"),
    ("shares that fade, for DTP", "madtp that fades", "madtp"),
    ("DTP, not one share everywhere", "madtp", "static count"),
    ("own counts, where both fade", "madtp that fades", "static count that fades"),
    ("MAG, for DTP", "madtp", "without MAG"),
    ("MAG, for a static count", "static count", "static count without MAG"),
    ("its maps, for DTP by temperature", "madtp by temperature", "madtp without maps"),
    ("its maps, for a static count", "static count", "static count without maps"),
    ("three scores, not self-attention alone", "madtp", "self_attention alone"),
    ("three scores, not class attention alone", "madtp", "cls_attention alone"),
    ("three scores, not alignment alone", "madtp", "alignment alone"),
    ("softmax, not sparsemax", "madtp", "sparsemax"),
    ("32 anchors, not 8", "madtp", "8 anchors"),
    ("32 anchors, not 128", "madtp", "128 anchors"),
    ("the teacher's logits", "madtp", "without distillation"),
    ("fusing, not dropping", "madtp", "drop"),
)
_TWINS = {"": "", variants.TURNED: "t", variants.PLAIN: "m"}
_WIDE, _CELL = 42, 20

Runs = Mapping[str, Mapping[int, float]]  # points, of each seed, by name


def main() -> None:
    """Print the table."""
    print("worth, in points".ljust(_WIDE) + "".join(name.rjust(_CELL) for name in ("drawn pairs", "photographs")))
    drawn = variants.points(ablate_nlvr_tiny.RESULTS, ablate_nlvr_tiny.accuracy, 0.8)
    photographs = variants.points(flickr8k_retrieval.RESULTS, flickr8k_retrieval.mean_recall, 0.7)
    for label, one, other in _LINES:
        cells = [
            worth(drawn, one, other, {", 300 steps": ""}),
            worth(photographs, one, other, {", short": "", "": "l"}),
        ]
        print((label.ljust(_WIDE) + "".join(cell.rjust(_CELL) for cell in cells)).rstrip())


def worth(runs: Runs, one: str, other: str, lengths: Mapping[str, str]) -> str:
    """Mean ± sd of one's points above the other's, (seeds), and marks of which twins; empty without two seeds.

    lengths: what runs' names end in, with marks, in order of preference.
    """
    for length, mark in lengths.items():
        for twin, twins_mark in _TWINS.items():
            names = [variants.twin(name, twin) + length for name in (one, other)]
            above = variants.above(runs, *names) if len({*names}) > 1 else []
            if len(above) > 1:
                spread = f"{statistics.mean(above):.1f} ± {statistics.stdev(above):.1f} ({len(above)})"
                return f"{spread} {mark + twins_mark:<2}"
    return ""


if __name__ == "__main__":
    main()
