"""Published results on speed, in benchmarks/results/, and their tables in docs/speed.md.

python benchmarks/speed_results.py                          # prints the tables of the page
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from variants import record

_FOLDER = Path(__file__).parent / "results"
CELLS, SCALING, SERVE = (_FOLDER / f"speed_{name}.json" for name in ("cells", "scaling", "serve"))
CHART = Path(__file__).parents[1] / "docs" / "speed.svg"
_KEYS = {
    CELLS: ("name", "engine", "row", "reduction"),
    SCALING: ("name", "tokens", "batch", "spread", "reduction"),
    SERVE: ("name", "load", "system"),
}
_MODELS = {
    "vit_base_patch16_384, batch 8": "ViT-B 384 px, B8",
    "vit_base_patch16_224, batch 8": "ViT-B 224 px, B8",
    "deit_small_patch16_224, batch 8": "DeiT-S 224 px, B8",
    "vit_base_patch16_384, batch 1": "ViT-B 384 px, B1",
    "vit_base_patch16_224, batch 1": "ViT-B 224 px, B1",
    "deit_small_patch16_224, batch 1": "DeiT-S 224 px, B1",
    "bert, batch 32": "BERT base, B32",
    "bert, batch 1": "BERT base, B1",
    "ViT-B-16, batch 8": "CLIP B/16, B8",
    "ViT-B-16, batch 1": "CLIP B/16, B1",
    "blip_nlvr_base, batch 1": "BLIP NLVR base, B1",
    "blip_nlvr_base, batch 4": "BLIP NLVR base, B4",
}
_ROWS = {
    "no-block": "pruned in no block",
    "keep-all": "`madtp`, all tokens kept",
    "limit": "slicing, no scores",
    "tome": "ToMe, minimal",
    "evit": "class attention, ratio, drop",
    "madtp": "`madtp`, counts per instance",
    "madtp-threshold": "`madtp`, its own counts",
    "madtp-frozen": "`madtp`, frozen",
}
_REDUCTIONS = (0.5, 0.8)  # the shares of the MACs that the tables have
_ENGINES = {
    "eager": "eager",
    "kernels": "eager, kernels",
    "finished": "finished",
    "finished-kernels": "finished, kernels",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "training": "training",
    "training-soft": "training, soft",
    "training-recomputed": "training, recomputed",
}


def publish(file: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a file of results, in place of older ones of the same kind.

    Args:
        file: CELLS, SCALING or SERVE.
        name: what was timed; provenance.json has the command for it.
        rows: the rows.
    """
    for row in rows:
        record(file, _KEYS[file], {"name": name, **row})


def realized(cells: Sequence[dict[str, Any]], engine: str = "eager") -> str:
    """Markdown: models down, rows across, in one engine; the share of the saving in MACs that the clock shows.

    A cell has the reductions in ascending order. Rows that save nothing show their speed-up.
    """
    mine = [cell for cell in cells if cell["engine"] == engine]
    rows = [row for row in _ROWS if any(cell["row"] == row for cell in mine)]
    lines = [["", *(_ROWS[row] for row in rows)]]
    for name in _present(mine, _MODELS):
        lines.append([_MODELS[name], *(_numbers(mine, name, row, "realized") for row in rows)])
    return _markdown(lines)


def engines(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: the speed-up by the clock over the dense model in eager PyTorch, of each engine; rows across."""
    others = _served(_ENGINES)[1:]
    names = [name for name in _MODELS if any(c["name"] == name and c["engine"] in others for c in cells)]
    rows = ("dense", "limit", "evit", "madtp", "madtp-frozen")
    lines = [["", "engine", "dense", *(_ROWS[row] for row in rows[1:])]]
    for name in names:
        for engine in _served(_ENGINES):
            mine = [cell for cell in cells if (cell["name"], cell["engine"]) == (name, engine)]
            if mine:
                columns = [_numbers(mine, name, row, "speedup") for row in rows]
                lines.append([_MODELS[name], _ENGINES[engine], *columns])
    return _markdown(lines)


def _served(engines: Iterable[str]) -> list[str]:
    return [engine for engine in engines if not engine.startswith("training")]


def steps(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: the speed-up by the clock of a training step over that of the dense model; rows across."""
    mine = [cell for cell in cells if cell["engine"].startswith("training")]
    rows = [row for row in ("dense", *_ROWS) if any(cell["row"] == row for cell in mine)]
    lines = [["", "step", *(_ROWS.get(row, row) for row in rows)]]
    for name in _present(mine, _MODELS):
        wanted = (name, "training", "dense")
        (dense,) = (c["milliseconds"] for c in mine if (c["name"], c["engine"], c["row"]) == wanted)
        here = [cell | {"faster": dense / cell["milliseconds"]} for cell in mine if cell["name"] == name]
        for engine in dict.fromkeys(cell["engine"] for cell in here):
            of_engine = [cell for cell in here if cell["engine"] == engine]
            columns = [_numbers(of_engine, name, row, "faster") for row in rows]
            lines.append([_MODELS[name], _ENGINES[engine], *columns])
    return _markdown(lines)


def memory(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: MiB that a call needs beyond the weights, in eager PyTorch with and without kernels; rows across."""
    mine = [cell for cell in cells if cell["memory_mib"] is not None]
    rows = [row for row in ("dense", *_ROWS) if any(cell["row"] == row for cell in mine)]
    lines = [["", "engine", *(_ROWS.get(row, row) for row in rows)]]
    for name in _present(mine, _MODELS):
        for engine in dict.fromkeys(cell["engine"] for cell in mine if cell["name"] == name):
            here = [cell for cell in mine if cell["engine"] == engine]
            columns = [_numbers(here, name, row, "memory_mib", digits=0) for row in rows]
            lines.append([_MODELS[name], _ENGINES[engine], *columns])
    return _markdown(lines)


def scaled(rows: Sequence[dict[str, Any]], spread: float = 0.25) -> str:
    """Markdown: engines and batches down, tokens of an image across; the speed-up over the dense model.

    A cell has the reductions in ascending order. One spread of counts; others are in the chart.
    """
    mine = [row for row in rows if row["spread"] == spread]
    tokens = sorted({row["tokens"] for row in mine})
    lines = [["engine", "batch", *(f"{count:,} tokens" for count in tokens)]]
    for name in _names(mine):
        for batch in sorted({row["batch"] for row in mine if row["name"] == name}):
            here = [row | {"row": row["tokens"]} for row in mine if row["batch"] == batch]
            columns = [_numbers(here, name, count, "speedup") for count in tokens]
            lines.append([_ENGINES[name.rpartition(", ")[2]], str(batch), *columns])
    return _markdown(lines)


def served(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a table for each model and largest batch, with systems down and loads across.

    A cell has the latency of half of the requests, and of nineteen of twenty, in milliseconds.
    """
    return "\n\n".join(_stream(name, [row for row in rows if row["name"] == name]) for name in _names(rows))


def _stream(name: str, rows: Sequence[dict[str, Any]]) -> str:
    loads = sorted({row["load"] for row in rows})
    batches = name.partition(", ")[2]
    head = "p50 / p95, ms" + (f", {batches}" if batches != "batches up to 1" else "")
    lines = [[head, *(f"load {load:.0%}" for load in loads)]]
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = {row["load"]: row for row in rows if row["system"] == system}
        cells = (f"{mine[load]['p50']:.0f} / {mine[load]['p95']:.0f}" if load in mine else "" for load in loads)
        lines.append([system, *cells])
    return _markdown(lines)


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


def _numbers(cells: Sequence[dict[str, Any]], name: str, row: str | int, what: str, digits: int = 2) -> str:
    """The values of a row, "0.98 / 0.95", a dash for one that is missing; the speed-up for what is realized of no saving."""
    mine = {cell["reduction"]: cell for cell in cells if (cell["name"], cell["row"]) == (name, row)}
    if 0.0 in mine:
        return f"{mine[0.0]['own_speedup' if what == 'realized' else what]:.{digits}f}"
    values = (f"{mine[share][what]:.{digits}f}" if share in mine else "-" for share in _REDUCTIONS)
    return " / ".join(values) if mine else ""


def _present(cells: Sequence[dict[str, Any]], order: Iterable[str]) -> list[str]:
    return [name for name in order if any(cell["name"] == name for cell in cells)]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


def main() -> None:
    cells, sizes, rows = (json.loads(file.read_text()) if file.exists() else [] for file in (CELLS, SCALING, SERVE))
    shares = (realized(cells, engine) for engine in ("eager", "kernels", "onnxruntime", "openvino"))
    for table in (*shares, engines(cells), scaled(sizes), steps(cells), memory(cells), served(rows)):
        if table.count("\n") > 1:
            print(table, end="\n\n")


if __name__ == "__main__":
    main()
