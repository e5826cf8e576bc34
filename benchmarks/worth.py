"""Prints the two tables of docs/ablations.md: what each part of the method is worth, and how keepers compare.

    python benchmarks/worth.py

It reads what `ablate_nlvr_tiny.py` and `flickr8k_retrieval.py ablate` measured, and runs nothing. Synthetic pairs: accuracy at
80 % fewer MACs. Photographs: mean recall at 70 % fewer.

A line of the first table says how many points the first of two variants is above the second: the differences are taken seed by
seed, and their mean, standard deviation and (number of seeds) printed. A pair of variants may have been run in several ways;
the first is taken that has two seeds: as things are now; "t", DTP's budget kept by its temperature; "m", by its temperature
and without the guide's linear maps. For photographs 140 steps come before 240 steps, "l".
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import ablate_nlvr_tiny
import flickr8k_retrieval
import variants

_PARTS = (
    ("scores, over random choice", "static count", "random"),
    ("the dense model teaches the scores (`saliency=0.5`)", "madtp", "scores not taught"),
    ("`ratio(decay=0.25)`, over `ratio`", "static count that fades", "static count"),
    ("`threshold(decay=0.25)`, over `threshold`", "madtp that fades", "madtp"),
    ("`threshold`, over `ratio`", "madtp", "static count"),
    ("`threshold(decay=0.25)`, over `ratio(decay=0.25)`", "madtp that fades", "static count that fades"),
    ("a guide, for `threshold`", "madtp", "without MAG"),
    ("a guide, for `ratio`", "static count", "static count without MAG"),
    ("the guide's linear maps, for `threshold`", "madtp by temperature", "madtp without maps"),
    ("the guide's linear maps, for `ratio`", "static count", "static count without maps"),
    ("the scorer `madtp`, over `self_attention`", "madtp", "self_attention alone"),
    ("the scorer `madtp`, over `cls_attention`", "madtp", "cls_attention alone"),
    ("the scorer `madtp`, over `alignment`", "madtp", "alignment alone"),
    ("softmax, over sparsemax", "madtp", "sparsemax"),
    ("32 anchors, over 8", "madtp", "8 anchors"),
    ("32 anchors, over 128", "madtp", "128 anchors"),
    ("distillation of logits", "madtp", "without distillation"),
    ("`fuse`, over `drop`", "madtp", "drop"),
)
_KEEPERS = {
    "random choice, dropped": "random",
    "`ratio`": "static count",
    "`ratio(decay=0.25)`": "static count that fades",
    "`ratio(decay=0.01)`": "static count at the first block",
    "`threshold`": "madtp",
    "`threshold(decay=0.25)`": "madtp that fades",
    "`threshold(decay=0.01)`": "madtp at the first block",
    "`distortion`": "count by distortion",
    "`distortion(decay=0.25)`": "count by distortion that fades",
    "`top_p`": "top-p count",
    "`learned`": "learned thresholds",
}
_TWINS = {"": "", variants.TURNED: "t", variants.PLAIN: "m"}

Runs = Mapping[str, Mapping[int, float]]  # points, of each seed, by name


def main() -> None:
    """Print both tables."""
    drawn = variants.points(ablate_nlvr_tiny.RESULTS, ablate_nlvr_tiny.accuracy, 0.8)
    photographs = variants.points(flickr8k_retrieval.RESULTS, flickr8k_retrieval.mean_recall, 0.7)
    print(parts(drawn, photographs), keepers(drawn, photographs), sep="\n\n")


def parts(drawn: Runs, photographs: Runs) -> str:
    """The first table, in Markdown: what a part is worth, in points."""
    rows = []
    for label, one, other in _PARTS:
        on_drawn = worth(drawn, one, other, {", 300 steps": ""})
        on_photographs = worth(photographs, one, other, {", short": "", "": "l"})
        rows.append([label, on_drawn, on_photographs])
    return _markdown(["part", "synthetic pairs", "photographs"], rows)


def keepers(drawn: Runs, photographs: Runs) -> str:
    """The second table, in Markdown: accuracy, and mean recall after three trainings; the second without the guide's maps."""
    rows = []
    for label, variant in _KEEPERS.items():
        cells = [_mean(drawn, variant + ", 300 steps"), _mean(photographs, variants.twin(variant, variants.PLAIN))]
        cells += [_mean(photographs, variant + ending) for ending in (", short", ", bf16, 600 steps")]
        rows.append([label, *cells])
    heads = ("synthetic pairs, 300 steps", "photographs, 240 steps", "photographs, 140 steps", "photographs, 600 steps")
    return _markdown(["keeper", *heads], rows)


def worth(runs: Runs, one: str, other: str, lengths: Mapping[str, str]) -> str:
    """Mean ± sd of one's points above the other's, (seeds), and marks of which twins; empty without two seeds.

    lengths: what runs' names end in, with marks, in order of preference.
    """
    for length, mark in lengths.items():
        for twin, twins_mark in _TWINS.items():
            names = [variants.twin(name, twin) + length for name in (one, other)]
            above = variants.above(runs, *names) if len({*names}) > 1 else []
            if len(above) > 1:
                return f"{_spread(above)} {mark + twins_mark}".rstrip()
    return ""


def _mean(runs: Runs, name: str) -> str:
    """Mean ± sd of a name's points, (seeds); empty where there is none."""
    return _spread(list(runs[name].values())) if name in runs else ""


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} ({len(values)})"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
