"""Variants of the ablations, each with one thing changed, and files of results."""

from __future__ import annotations

import fcntl
import json
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vltprune import Part
from vltprune.training import CompressConfig

_NAME, _WIDE = 44, 15  # of columns, of the first at least
TURNED, PLAIN = " by temperature", " without maps"
_OFF = 0.015  # how far from what was asked a run may save and need no mention

COMMON: dict[str, Any] = {
    "parts": {"guide": "codebook(anchors=32)"},
    "budget": "controller",
    "distill": 1.0,
    "saliency": 0.5,
    "lr": 1e-4,
    "warmup": 0.05,
    "ramp": 0.4,
}

# fields of the config, and parts of the pruner
VARIANTS: dict[str, dict[str, Any]] = {
    "madtp": {},
    "without MAG": {"parts": {"guide": None, "scorer": "self_attention", "keep": "learned"}},
    "without the alignment loss": {"align": 0.0},
    "neither MAG nor taught scores": {
        "parts": {"guide": None, "scorer": "self_attention", "keep": "learned"},
        "saliency": 0.0,
    },
    "static count": {"parts": {"keep": "ratio"}},
    "static count that fades": {"parts": {"keep": "ratio(decay=0.25)"}},
    "static count that fades by distinct scores": {"parts": {"scorer": "distinct_madtp", "keep": "ratio(decay=0.25)"}},
    "static count at the first block": {"parts": {"keep": "ratio(decay=0.01)"}},
    "static count without MAG": {"parts": {"guide": None, "scorer": "self_attention", "keep": "ratio"}},
    "madtp that fades": {"parts": {"keep": "threshold(decay=0.25)"}},
    "madtp at the first block": {"parts": {"keep": "threshold(decay=0.01)"}},
    "count by distortion": {"parts": {"keep": "distortion"}},
    "count by distortion that fades": {"parts": {"keep": "distortion(decay=0.25)"}},
    "top-p count": {"parts": {"keep": "top_p"}},
    "learned thresholds": {"parts": {"keep": "learned"}},
    "learned budget": {"budget": "learned"},
    "learned thresholds and budget": {"budget": "learned", "parts": {"keep": "learned"}},
    "self_attention alone": {"parts": {"scorer": "self_attention"}},
    "cls_attention alone": {"parts": {"scorer": "cls_attention"}},
    "alignment alone": {"parts": {"scorer": "alignment"}},
    "sparsemax": {"parts": {"guide": "codebook(anchors=32, attend='sparsemax')"}},
    "8 anchors": {"parts": {"guide": "codebook(anchors=8)"}},
    "128 anchors": {"parts": {"guide": "codebook(anchors=128)"}},
    "without distillation": {"distill": 0.0},
    "scores not taught": {"saliency": 0.0},
    "three costs by turns": {"serve": (0.5, 0.7)},
    "drop": {"parts": {"reducer": "drop"}},
    "random": {"parts": {"guide": None, "scorer": "random", "keep": "ratio", "reducer": "drop"}, "saliency": 0.0},
}


def _by_temperature(change: dict[str, Any]) -> dict[str, Any]:
    """The same change where DTP's budget is kept as paper and reference do; itself where no DTP is."""
    keep = Part.from_spec(change.get("parts", {}).get("keep", "threshold"))
    if keep.name != "threshold":
        return change
    return {**change, "parts": {**change.get("parts", {}), "keep": str(keep.replace(knob="temperature"))}}


def _without_maps(change: dict[str, Any]) -> dict[str, Any]:
    """The same change of a guide that has no map of each tower, as the reference has none for BLIP, and by temperature."""
    change = _by_temperature(change)
    parts = {**COMMON["parts"], **change.get("parts", {})}
    if parts["guide"] is None:
        return change
    return {**change, "parts": {**parts, "guide": str(Part.from_spec(parts["guide"]).replace(project=False))}}


def _twins(suffix: str, twin: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the variants that differ from them."""
    return {name + suffix: twin(change) for name, change in VARIANTS.items() if twin(change) != change}


VARIANTS |= _twins(TURNED, _by_temperature) | _twins(PLAIN, _without_maps)


def config_of(variant: str, **own: Any) -> CompressConfig:
    """The common config with the script's own fields, and the variant's change."""
    changed = dict(VARIANTS[variant])
    parts = {**COMMON["parts"], **own.pop("parts", {}), **changed.pop("parts", {})}
    return CompressConfig.from_dict({**COMMON, **own, **changed, "parts": parts})


def twin(name: str, suffix: str) -> str:
    """The twin of a variant, or itself where it has none such."""
    return name + suffix if name + suffix in VARIANTS else name


def compared(base: str) -> list[str]:
    """The variants that a base is compared with: twins like itself, variants that have none such, and its own other twins."""
    suffix = next((one for one in (TURNED, PLAIN) if base.endswith(one)), "")
    plain = base.removesuffix(suffix)
    firsts = [name for name in VARIANTS if not name.endswith((TURNED, PLAIN))]
    like = [twin(name, suffix) for name in firsts]
    own = [name for name in (plain, plain + TURNED, plain + PLAIN) if name in VARIANTS]
    return list(dict.fromkeys([*like, *own]))


def record(file: Path, keys: Sequence[str], row: dict[str, Any]) -> None:
    """A row of a file of results, instead of an older one with the same keys; several processes may do so at once."""
    file.parent.mkdir(exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = json.loads(file.read_text()) if file.exists() else []
        rows = [one for one in rows if any(one[key] != row[key] for key in keys)] + [row]
        rows.sort(key=lambda one: [one[key] for key in keys])
        file.write_text("[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")


def table(file: Path, value: Callable[[dict[str, Any]], float], only: Collection[str] = ()) -> str:
    """Mean and standard deviation over runs, in %: a line a name, a column a share of MACs to save. only: some names.

    Empty without any. Where a run could not save what was asked, its cell says what it saved.
    """
    rows = [row for row in json.loads(file.read_text()) if not only or row["name"] in only]
    if not rows:
        return ""
    shares = sorted({row["reduction"] for row in rows})
    names = sorted({row["name"] for row in rows}, key=lambda name: (name != "dense", _place(name), name))
    head = "".join(f"{share:.0%} fewer".rjust(_WIDE) if share else "dense".rjust(_WIDE) for share in shares)
    wide = max(_NAME, *map(len, names))
    lines = ["".ljust(wide) + " runs" + head]
    for name in names:
        mine = [row for row in rows if row["name"] == name]
        cells = [_cell([row for row in mine if row["reduction"] == share], value).rjust(_WIDE) for share in shares]
        lines.append(name.ljust(wide) + f"{len({row['seed'] for row in mine}):5d}" + "".join(cells))
    return "\n".join(lines)


def differences(file: Path, value: Callable[[dict[str, Any]], float], base: str, only: Collection[str]) -> str:
    """How far names are below `base`, in points, seed by seed: mean, standard deviation, least and most; a line a name.

    only: those names, where two seeds or more are shared with `base` at the largest share of MACs that it was run at; empty
    without any.
    """
    share = max((row["reduction"] for row in json.loads(file.read_text()) if row["name"] == base), default=0.0)
    runs = points(file, value, share)
    wide = max(_NAME, *(len(name) + 2 for name in only))
    lines = [f"points below {base}, at {share:.0%} fewer, seed by seed"]
    for name in sorted(only, key=lambda name: (_place(name), name)):
        apart = above(runs, base, name)
        if name != base and len(apart) > 1:
            spread = f"{statistics.mean(apart):5.1f} ± {statistics.stdev(apart):.1f}"
            lines.append(f"{name.ljust(wide)}{spread}   {min(apart):.1f} .. {max(apart):.1f}")
    return "\n".join(lines) if len(lines) > 1 else ""


def points(file: Path, value: Callable[[dict[str, Any]], float], reduction: float) -> dict[str, dict[int, float]]:
    """What was measured at one cost, in points: by name, and by seed."""
    found: dict[str, dict[int, float]] = {}
    for row in json.loads(file.read_text()):
        if row["reduction"] == reduction:
            found.setdefault(row["name"], {})[row["seed"]] = 100 * value(row)
    return found


def above(runs: Mapping[str, Mapping[int, float]], one: str, other: str) -> list[float]:
    """How far one name is above the other, seed by seed, of the seeds that both have."""
    left, right = runs.get(one, {}), runs.get(other, {})
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def _place(name: str) -> int:
    order = list(VARIANTS)
    plain = name.split(",")[0].rstrip("*").split(" to ")[0]
    return order.index(plain) if plain in order else -1


def _cell(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    if not rows:
        return ""
    values = [100 * value(row) for row in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    saved = statistics.mean(row["macs_saved"] for row in rows)
    off = f" at {saved:.0%}" if abs(saved - rows[0]["reduction"]) > _OFF else ""
    return f"{statistics.mean(values):.1f}{spread}{off}"
