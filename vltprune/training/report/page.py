"""Report of a compression as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ...cost import describe
from ...evaluation.metrics import main_score
from ...models.resolve import has_random_weights, is_saved_model
from ...registry import guides
from ...utils.files import write_text
from ...viz import charts, html
from ..config import CompressConfig
from . import curves, tables
from .examples import Example, Rows

_ABOUT = (
    "Token pruning removes image patches and words that matter little between the layers of a model, so that later layers have "
    "less to compute. This page reports one run of <code>vltprune compress</code>: a dense model was {done}, "
    "and then compared with itself before. Computation is counted in multiply-accumulates (MACs)."
)
_BUDGETS = {
    "controller": "controller: the MACs measured in training adjust the keeper's setting (its knob)",
    "learned": "learned: for the first half of the steps tokens are kept softly, and a loss on the expected MACs trains scores "
    "and thresholds; then as controller",
}
_COST = (
    "Scores on the validation split against the computation of an instance: a record's images and one of its texts. Speed is "
    "not in the table: benchmarks/speed.py measures it on your machine."
)
_MATCHING = (
    "The model's matching head scores again the {k} texts nearest to each image by the features above, and the {k} images "
    "nearest to each text. GMACs are those of a pair whose image is encoded already."
)
_TOKENS = (
    "Tokens that are left after each layer, special tokens included. The line is the mean over the validation records, the "
    "band reaches from the 10th to the 90th percentile. A record with several images or texts counts with their mean. The "
    "dashed line is the number that entered."
)
_TRAINING = (
    "Each point is a mean over the steps since the previous row of history.jsonl. Losses include their weights. MACs and "
    "tokens are measured every few steps, on the training batch. Target and knob are those of the row's own step, so the "
    "saving follows them with a delay."
)
_IMAGES = (
    "The first {count} validation records that every model could answer; none was selected by its answers. The first image of "
    "a row is the input, then follows what is left of it after each layer at {name}. Numbers count tokens, special tokens "
    "included. Check whether the parts that the text asks about stay visible."
)


@dataclass(frozen=True)
class ReportData:
    """What a report shows, but for its example images.

    Attributes:
        config: The run's config.
        steps: Training steps.
        calibration_records: How many validation records, from the first, the knob was calibrated on.
        rows: Results as of `CompressResult`, the dense model's first.
        record_rows: For each of them, the rows of its evaluation, one a record.
        history: The rows of history.jsonl.
    """

    config: CompressConfig
    steps: int
    calibration_records: int
    rows: Rows
    record_rows: Sequence[Rows]
    history: Rows = field(default=())

    @property
    def names(self) -> list[str]:
        """The names of the rows."""
        pruned = [
            f"{describe.format_target(row['reduction'])} fewer MACs" if row["reduction"] else "trained"
            for row in self.rows[1:]
        ]
        return ["dense", *pruned]

    @property
    def target_index(self) -> int:
        """The index of the row that has the config's reduction; the dense model's, row 0, was not trained."""
        return 1 + [row["reduction"] for row in self.rows[1:]].index(self.config.reduction)


def write(file: Path, data: ReportData, shown: Sequence[Example], missing: str = "") -> None:
    """Write the report as an HTML page.

    Args:
        file: The page; one that exists is replaced.
        data: What to report.
        shown: Example records, with what was kept at the config's reduction.
        missing: Why there are no examples.

    Raises:
        OSError: If the file cannot be written.
    """
    write_text(file, page(data, shown, missing))


def page(data: ReportData, shown: Sequence[Example], missing: str = "") -> str:
    """The report as an HTML page.

    Args:
        data: What to report.
        shown: Example records, with what was kept at the config's reduction.
        missing: Why there are no examples.

    Returns:
        The page, self-contained.
    """
    title = f"{Path(data.config.model).name}, {'compressed' if data.config.reduction else 'trained'}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_lead(data)}</p>',
        f"<p>{_ABOUT.format(done='pruned and trained on' if data.config.reduction else 'trained on')}</p>",
        f"<h2>Score and cost</h2><p>{_COST}</p>{html.card(_costs(data))}{html.bullets(_gaps(data))}{_matching(data)}",
        f"<h2>What the columns mean</h2>{html.card(html.definitions(_columns(data)))}",
        f"<h2>What was done</h2>{html.card(_facts(_done(data)))}",
        f"<h2>What was selected on what</h2>{html.card(html.bullets(_selected(data)))}",
        f"<h2>Where the tokens go</h2><p>{_TOKENS}</p>{curves.tokens(data.record_rows, data.names)}",
        f"<h2>How training went</h2><p>{_TRAINING}</p>{_training(data)}",
        "<h2>What each layer kept</h2>",
        *_images(data, shown, missing),
    ]
    return html.document(title, body)


def _lead(data: ReportData) -> str:
    """The result in a sentence."""
    dense, row = data.rows[0], data.rows[data.target_index]
    main = main_score(dense["scores"])
    macs, dense_macs = (row[name] / 1e9 for name in ("macs", "dense_macs"))
    saved = f"{row['macs_saved']:.1%} fewer MACs ({macs:.4g} G instead of {dense_macs:.4g} G)"
    if main is None:
        return f"{saved}; nothing could be scored."
    before, after = (f"{100 * one['scores'][main]:.2f} %" for one in (dense, row))
    return f"{saved} an instance. On {row['records']:,} validation records {escape(main)} is {after}; dense: {before}."


def _done(data: ReportData) -> list[tuple[str, str]]:
    """The config in words."""
    config, parts = data.config, data.config.pruning
    has_anchors = parts.guide is not None and not getattr(guides[parts.part("guide").name], "queried", False)
    align = config.align if has_anchors else 0.0
    distillation = f"distillation of logits x {config.distill:g}, of summaries x {config.distill_summaries:g}"
    distillation += f", of tokens x {config.distill_tokens:g}, of scores x {config.saliency_weight:g}"
    others = [f"{name} x {weight:g}" for name, weight in config.losses.items()]
    losses = ", ".join(["the task's", f"L_align x {align:g}", distillation, *others])
    return [
        ("task", config.task),
        ("dense model", f"{config.model}, weights: {_weights(config)}"),
        *([("initial weights", config.start)] if config.start is not None else []),
        *(_pruned(config) if config.reduction else [("pruning", "none: the dense model was trained")]),
        *([("frozen", ", ".join(config.freeze))] if config.freeze else []),
        ("training", f"{data.steps:,} steps of {config.batch_size} records, seed {config.seed}, one run"),
        ("losses", losses + (", random crops and flips" if config.augment else "")),
        ("AdamW", f"learning rate {config.lr:g}, weight decay {config.weight_decay:g}, products in {config.dtype}"),
        ("data", f"{config.data}; validation {config.val}"),
    ]


def _pruned(config: CompressConfig) -> list[tuple[str, str]]:
    """The part of the config that is about pruning, in words."""
    parts = config.pruning
    replaced = ", ".join(config.parts) or "none"
    serve = ", ".join(f"{100 * share:g} %" for share in config.serve)
    return [
        ("pruning", f"preset {config.preset}; parts that replace the preset's: {replaced}"),
        *((f"&emsp;{name}", parts.describe(name)) for name in ("guide", "scorer", "keep", "selector", "reducer")),
        ("&emsp;where", "every block of every tower" if parts.at is None else f"blocks {parts.to_dict()['at']}"),
        (
            "MACs to save",
            describe.format_target(config.reduction) + (f"; every second step one of {serve}" if serve else ""),
        ),
        ("budget", f"{_BUDGETS[config.budget]}; the target rises over {config.ramp:.0%} of the steps"),
    ]


def _weights(config: CompressConfig) -> str:
    if is_saved_model(config.model):
        return "the folder's"
    if has_random_weights(config.model, config.pretrained):
        return "random"
    return "those published" if config.pretrained in (None, True) else str(config.pretrained)


def _selected(data: ReportData) -> list[str]:
    """What was selected on the validation split, and what was not. Plain text."""
    config, row = data.config, data.rows[data.target_index]
    records = row["records"] + len(row["skipped"])
    sentences = [
        *(_knob(data, records) if row["knob"] else []),
        f"The weights are those of the last step, {data.steps:,}, the same at every cost. No checkpoint was chosen.",
        f"Scores, costs and tokens are of the {records:,} validation records.",
        f"No test split was read: a compression reads {config.data} to learn from, and {config.val}.",
        f"One run, seed {config.seed}: what another seed would give is not known from this page.",
    ]
    if "accuracy" in row["scores"]:
        share, error = row["scores"]["accuracy"], _error(row)
        sentences.append(
            f"An accuracy of {share:.1%} on {row['records']:,} records has a standard error of {error:.1%}."
        )
    if (config.data, config.images) == (config.val, config.val_images or config.images):
        sentences.append(
            "Training and validation read the same file: these scores are of records the model has learned from."
        )
    return sentences


def _knob(data: ReportData, records: int) -> list[str]:
    """What the knob was calibrated on. Plain text."""
    knob, whole = tables.knobs(data.rows[data.target_index]["knob"]), data.calibration_records == records
    on = f"all {records:,}" if whole else f"the first {data.calibration_records:,} of the {records:,}"
    return [
        f"The knob ({knob}) was set on {on} validation records, one text each, for each cost separately. It was set by MACs "
        f"alone; no score was used. The scores above are of {'the same records' if whole else 'these records and the rest'}.",
        *_drift(data),
    ]


def _drift(data: ReportData) -> list[str]:
    """How far the cost in training was from that of the evaluated model. Plain text."""
    measured = [row for row in data.history if "saved" in row]
    if not measured:
        return []
    last, row = measured[-1], data.rows[data.target_index]
    if not isinstance(data.config.reduction, Mapping):
        drifts = [("", last["saved"], last["target"], row["macs_saved"])]
    else:
        drifts = [
            (f" of the {tower} tower", last[f"saved {tower}"], last[f"target {tower}"], row["reductions"][tower])
            for tower in data.config.reduction
        ]
    return [
        f"When training last measured it, at step {last['step']:,} or a few before, {saved:.1%} of the dense MACs{whose} were "
        f"saved, of {wanted:.1%} to save then. With the knob set, {now:.1%} are, on validation."
        for whose, saved, wanted, now in drifts
    ]


def _error(row: Any) -> float:
    accuracy = row["scores"]["accuracy"]
    return (accuracy * (1 - accuracy) / row["records"]) ** 0.5


def _gaps(data: ReportData) -> list[str]:
    """What is not in the table, and why. Plain text."""
    reached = [row["reduction"] for row in data.rows]
    lost = [f"{100 * share:g} %" for share in data.config.serve if share not in reached]
    sentences = [f"Also requested, and out of these parts' reach: {', '.join(lost)} fewer MACs."] if lost else []
    row = data.rows[data.target_index]
    if row["knob"]:
        sentences += _missed(row["reduction"], row["knob"])
        sentences += [
            one for one in [describe.note_on_towers(row["shares"], row["reductions"], row["macs_saved"])] if one
        ]
    sentences += [f"Not scored: {what}, since {why}." for what, why in row["unscored"].items()]
    if row["skipped"]:
        first = row["skipped"][0]
        sentences.append(
            f"{len(row['skipped'])} validation records could not be opened, the first: {first['skipped']}."
        )
    return sentences


def _missed(reduction: Any, knob: Any) -> list[str]:
    """The targets that calibration could not reach."""
    targets = [("", reduction, knob)]
    if isinstance(reduction, Mapping):
        targets = [(f" of the {tower} tower", share, knob["towers"][tower]) for tower, share in reduction.items()]
    missed = []
    for whose, share, cost in targets:
        found = 1 - cost["macs"] / cost["dense_macs"]
        if abs(found - share) > 0.02:  # more than calibration's tolerance
            missed.append(
                f"{share:.0%} fewer MACs{whose} are out of these parts' reach: the nearest, {found:.1%}, is in its place."
            )
    return missed


def _costs(data: ReportData) -> str:
    main = main_score(data.rows[0]["scores"])
    chart = curves.costs(data.rows, main) if main else ""
    return chart + _tight(tables.results(data.names, data.rows))


def _columns(data: ReportData) -> dict[str, str]:
    return tables.meanings(tables.results(data.names, data.rows)[0])


def _matching(data: ReportData) -> str:
    """The second stage of a retrieval that has one."""
    if "matching" not in data.rows[0]:
        return ""
    text = _MATCHING.format(k=data.rows[0]["matching"]["k_test"])
    return f"<h3>Second stage</h3><p>{text}</p>{html.card(_tight(tables.matching(data.names, data.rows)))}"


def _tight(table: Sequence[Sequence[str]]) -> str:
    """A table whose rows have the symbols of the charts."""
    header, *rows = table
    cells = [[charts.symbol(i) + escape(name), *map(escape, rest)] for i, (name, *rest) in enumerate(rows)]
    return f'<div class="tight">{html.table(header, cells)}</div>'


def _training(data: ReportData) -> str:
    if not data.history:
        return html.card("There are no rows in history.jsonl.")
    last = data.history[-1]
    skipped = (
        f"Up to step {last['step']:,}, {last.get('skipped_steps', 0)} steps were skipped, because their losses or gradients "
        f"were not finite. {last.get('skipped_records', 0)} records that were sampled since the run last resumed could not be "
        "decoded, and others replaced them."
    )
    found = data.rows[data.target_index]["knob"]
    knob = "" if found is None else tables.knobs(found)
    return html.card(curves.training(data.history, escape(knob)) + f'<p class="quiet">{skipped}</p>')


def _images(data: ReportData, shown: Sequence[Example], missing: str) -> list[str]:
    if not shown:
        return [html.card(f"No images: {escape(missing or 'no record was answered at every cost')}.")]
    name = data.names[data.target_index]
    head = f"<p>{_IMAGES.format(count=len(shown), name=escape(name))}</p>{html.state_legend()}"
    return [head, *(html.card(_example(example, data)) for example in shown)]


def _example(example: Example, data: ReportData) -> str:
    prompt = f'<div class="sentence">&ldquo;{escape(example.prompt)}&rdquo;</div>' if example.prompt else ""
    answers = [[html.answer(prediction.text, prediction.correct) for prediction in example.predictions]]
    strip = "" if example.strip is None else html.strip_image(data.names[data.target_index], example.strip)
    return (
        f'{prompt}<div class="quiet">record {example.index} &middot; in truth: <b>{escape(example.reference)}</b></div>'
        f'<div class="answers">{html.table(data.names, answers)}</div>'
        f"{html.word_states([(word, state.name) for word, state in example.words])}{strip}"
    )


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    """The first of each row is HTML, the second plain text."""
    cells = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f'<table class="facts">{cells}</table>'
