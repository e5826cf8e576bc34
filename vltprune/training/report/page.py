"""Report of a compression as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ...cost import describe
from ...models.resolve import has_random_weights, is_saved_model
from ...utils.files import write_text
from ...viz import charts, html
from ..config import CompressConfig
from . import curves, tables
from .examples import Example, Rows

_BUDGETS = {
    "controller": "controller: MACs measured while training turn the keeper's knob",
    "learned": "learned: for the first half tokens are kept softly, and a loss on the expected MACs moves scores and "
    "thresholds; then as controller",
}
_COST = (
    "Scores on the validation split against multiply-accumulates of an instance, its pictures and one text, what the pruning "
    "itself costs included. MACs are those of the tokens that are there: what the dense model spends on padding, and a pruned "
    "one skips, is a column of its own, where there is any, and counts neither as spent nor as saved. Of several towers "
    "each has what it saves of its own MACs, and its part of all that is saved. Dense is the model as it "
    "was before training; the pruned ones share their weights, and differ in the knob. Scores are in percent. Speed "
    "is not in the table: benchmarks/speed.py measures it, on your machine."
)
_MATCHING = (
    "The {most} texts nearest to each image by the features above, and the {most} images nearest to each text, judged again by "
    "the head that sees both. GMACs are those of a pair whose image is encoded already."
)
_TOKENS = (
    "Tokens that are left after each layer, special tokens included: the mean over the validation records, and a band from "
    "the 10th to the 90th percentile of records; of a record with several pictures or texts, their mean counts. The dashed "
    "line is what entered."
)
_TRAINING = (
    "Against the step: means over the steps since the row of history.jsonl before; losses as they are added up, weights "
    "included. MACs and tokens are measured every few steps, in training, on the batch at hand. Target and knob are those "
    "at the row's step, so that what was saved, a mean, comes a little behind."
)
_PICTURES = (
    "The first {count} validation records that could be answered: no choice was made by what was answered. The pictures "
    "show which patches each layer kept at {name}, the numbers count tokens, special tokens included. Answers are those "
    "of the evaluations above."
)


@dataclass(frozen=True)
class Story:
    """What a report tells of, but for its pictures.

    steps       that were trained
    calibrated  of the validation records, so many, the first, the knob was set on
    rows        as of `Compressed`, the dense model's first
    answered    for each of them the evaluation's rows, one a record
    history     the rows of history.jsonl
    """

    config: CompressConfig
    steps: int
    calibrated: int
    rows: Rows
    answered: Sequence[Rows]
    history: Rows = field(default=())

    @property
    def names(self) -> list[str]:
        """What the rows are called."""
        pruned = [
            f"{describe.format_target(row['reduction'])} fewer MACs" if row["reduction"] else "trained"
            for row in self.rows[1:]
        ]
        return ["dense", *pruned]

    @property
    def asked(self) -> int:
        """Which row the config's reduction has; behind the first, which was not trained."""
        return 1 + [row["reduction"] for row in self.rows[1:]].index(self.config.reduction)


def write(file: Path, story: Story, shown: Sequence[Example], missing: str = "") -> None:
    """The page as a file. OSError where it cannot be written."""
    write_text(file, page(story, shown, missing))


def page(story: Story, shown: Sequence[Example], missing: str = "") -> str:
    """shown: examples of what was kept, at the cost that was asked for; missing: why there are none."""
    title = f"{Path(story.config.model).name}, {'compressed' if story.config.reduction else 'trained'}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_lead(story)}</p>',
        f"<h2>What was done</h2>{html.card(_table(_done(story)))}",
        f"<h2>What was selected on what</h2>{html.card(_list(_selected(story)))}",
        f"<h2>Score and cost</h2><p>{_COST}</p>{html.card(_costs(story))}{_list(_gaps(story))}{_matching(story)}",
        f"<h2>Where the tokens go</h2><p>{_TOKENS}</p>{curves.tokens(story.answered, story.names)}",
        f"<h2>How training went</h2><p>{_TRAINING}</p>{_training(story)}",
        "<h2>What each layer kept</h2>",
        *_pictures(story, shown, missing),
    ]
    return html.document(title, body)


def _lead(story: Story) -> str:
    """The outcome in a sentence."""
    dense, row = story.rows[0], story.rows[story.asked]
    main = curves.main_score(dense["scores"])
    macs, whole = (row[name] / 1e9 for name in ("macs", "dense_macs"))
    saved = f"{row['macs_saved']:.1%} fewer MACs ({macs:.4g} G instead of {whole:.4g} G)"
    if main is None:
        return f"{saved}; nothing could be scored."
    was, now = (f"{100 * one['scores'][main]:.2f}" for one in (dense, row))
    return f"{saved} an instance; {escape(main)} on {row['records']:,} validation records {now}, dense {was}."


def _done(story: Story) -> list[tuple[str, str]]:
    """The config in words: what, and how."""
    config, parts = story.config, story.config.pruning
    align = config.align if parts.guide is not None else 0.0
    taught = f"distillation of logits x {config.distill:g}, of summaries x {config.distill_summaries:g}"
    losses = f"the task's, L_align x {align:g}, {taught}, of scores x {config.saliency_weight:g}"
    return [
        ("task", config.task),
        ("dense model", f"{config.model}, weights: {_weights(config)}"),
        *([("begun from", config.start)] if config.start is not None else []),
        *(_pruned(config) if config.reduction else [("pruning", "none: the dense model was trained")]),
        *([("frozen", ", ".join(config.freeze))] if config.freeze else []),
        ("training", f"{story.steps:,} steps of {config.batch_size} records, seed {config.seed}, one run"),
        ("losses", losses + (", random crops and flips" if config.augment else "")),
        ("AdamW", f"learning rate {config.lr:g}, weight decay {config.weight_decay:g}, precision {config.precision!r}"),
        ("data", f"{config.data}; validation {config.val}"),
    ]


def _pruned(config: CompressConfig) -> list[tuple[str, str]]:
    """The part of the config that is about pruning, in words."""
    parts, own = config.pruning, ", ".join(config.parts) or "none"
    serve = ", ".join(f"{100 * share:g} %" for share in config.serve)
    return [
        ("pruning", f"preset {config.preset}; parts that replace its own: {own}"),
        *((f"&emsp;{name}", parts.spelled(name)) for name in ("guide", "scorer", "keep", "reducer")),
        ("&emsp;where", "every block of every tower" if parts.at is None else f"blocks {parts.to_dict()['at']}"),
        (
            "MACs to save",
            describe.format_target(config.reduction) + (f"; every second step {serve}, by turns" if serve else ""),
        ),
        ("budget", f"{_BUDGETS[config.budget]}; the target rises over {config.ramp:.0%} of the steps"),
    ]


def _weights(config: CompressConfig) -> str:
    if is_saved_model(config.model):
        return "the folder's"
    if has_random_weights(config.model, config.pretrained):
        return "random"
    return "those published" if config.pretrained in (None, True) else str(config.pretrained)


def _selected(story: Story) -> list[str]:
    """What the validation split chose, and what it did not. Plain text."""
    config, row = story.config, story.rows[story.asked]
    records = row["records"] + len(row["skipped"])
    told = [
        *(_knob(story, records) if row["knob"] else []),
        f"The weights are those of the last step, {story.steps:,}, the same at every cost. No checkpoint was chosen.",
        f"Scores, costs and tokens are of the {records:,} validation records.",
        f"No test split was read: a compression reads {config.data} to learn from, and {config.val}.",
        f"One run, seed {config.seed}: what another seed would give is not known from this page.",
    ]
    if "accuracy" in row["scores"]:
        share, error = row["scores"]["accuracy"], _error(row)
        told.append(f"An accuracy of {share:.1%} on {row['records']:,} records has a standard error of {error:.1%}.")
    if (config.data, config.images) == (config.val, config.val_images or config.images):
        told.append(
            "Training and validation read the same file: these scores are of records the model has learned from."
        )
    return told


def _knob(story: Story, records: int) -> list[str]:
    """What the knob was set on. Plain text."""
    knob, whole = tables.knobs(story.rows[story.asked]["knob"]), story.calibrated == records
    on = f"all {records:,}" if whole else f"the first {story.calibrated:,} of the {records:,}"
    return [
        f"The knob ({knob}) was set on {on} validation records, one text each, for each cost by itself: to MACs alone, no "
        f"score was looked at. The scores below are of {'the same records' if whole else 'these records and the rest'}.",
        *_drift(story),
    ]


def _drift(story: Story) -> list[str]:
    """How far the cost in training was from the one that is served. Plain text."""
    measured = [row for row in story.history if "saved" in row]
    if not measured:
        return []
    last, row = measured[-1], story.rows[story.asked]
    if not isinstance(story.config.reduction, Mapping):
        drifts = [("", last["saved"], last["target"], row["macs_saved"])]
    else:
        drifts = [
            (f" of the {tower} tower", last[f"saved {tower}"], last[f"target {tower}"], row["reductions"][tower])
            for tower in story.config.reduction
        ]
    return [
        f"When training last measured it, at step {last['step']:,} or a few before, {saved:.1%} of the dense MACs{whose} were "
        f"saved, of {wanted:.1%} to save then. With the knob set, {now:.1%} are, on validation."
        for whose, saved, wanted, now in drifts
    ]


def _error(row: Any) -> float:
    share = row["scores"]["accuracy"]
    return (share * (1 - share) / row["records"]) ** 0.5


def _gaps(story: Story) -> list[str]:
    """What is not in the table, and why. Plain text."""
    there = [row["reduction"] for row in story.rows]
    lost = [f"{100 * share:g} %" for share in story.config.serve if share not in there]
    told = [f"Asked for as well, and out of these parts' reach: {', '.join(lost)} fewer MACs."] if lost else []
    row = story.rows[story.asked]
    if row["knob"]:
        told += _missed(row["reduction"], row["knob"])
        told += [one for one in [describe.note_on_towers(row["shares"], row["reductions"], row["macs_saved"])] if one]
    told += [f"Not scored: {what}, since {why}." for what, why in row["unscored"].items()]
    if row["skipped"]:
        first = row["skipped"][0]
        told.append(f"{len(row['skipped'])} validation records could not be opened, the first: {first['skipped']}.")
    return told


def _missed(reduction: Any, knob: Any) -> list[str]:
    """Targets that calibration came nowhere near."""
    asked = [("", reduction, knob)]
    if isinstance(reduction, Mapping):
        asked = [(f" of the {tower} tower", share, knob["towers"][tower]) for tower, share in reduction.items()]
    missed = []
    for whose, share, cost in asked:
        found = 1 - cost["macs"] / cost["dense_macs"]
        if abs(found - share) > 0.02:  # more than calibration leaves
            missed.append(
                f"{share:.0%} fewer MACs{whose} are out of these parts' reach: the nearest, {found:.1%}, is in its place."
            )
    return missed


def _costs(story: Story) -> str:
    main = curves.main_score(story.rows[0]["scores"])
    chart = curves.costs(story.rows, main) if main else ""
    return chart + _tight(tables.results(story.names, story.rows))


def _matching(story: Story) -> str:
    """The second stage of a retrieval that has one."""
    if "matching" not in story.rows[0]:
        return ""
    told = _MATCHING.format(most=story.rows[0]["matching"]["k_test"])
    return f"<h3>Second stage</h3><p>{told}</p>{html.card(_tight(tables.matching(story.names, story.rows)))}"


def _tight(table: Sequence[Sequence[str]]) -> str:
    """A table whose lines have the colors of the charts."""
    header, *lines = table
    cells = [[charts.symbol(i) + escape(name), *map(escape, rest)] for i, (name, *rest) in enumerate(lines)]
    return f'<div class="tight">{html.table(header, cells)}</div>'


def _training(story: Story) -> str:
    if not story.history:
        return html.card("There are no rows in history.jsonl.")
    last = story.history[-1]
    skipped = (
        f"Up to step {last['step']:,}, {last.get('skipped_steps', 0)} steps were skipped, since their losses or gradients "
        f"were no numbers. {last.get('skipped_records', 0)} records of those drawn since the run was last taken up could not "
        "be opened, and others took their places."
    )
    found = story.rows[story.asked]["knob"]
    knob = "" if found is None else tables.knobs(found)
    return html.card(curves.training(story.history, escape(knob)) + f'<p class="quiet">{skipped}</p>')


def _pictures(story: Story, shown: Sequence[Example], missing: str) -> list[str]:
    if not shown:
        return [html.card(f"No pictures: {escape(missing or 'no record was answered at every cost')}.")]
    name = story.names[story.asked]
    head = f"<p>{_PICTURES.format(count=len(shown), name=escape(name))}</p>{html.state_legend()}"
    return [head, *(html.card(_example(example, story)) for example in shown)]


def _example(example: Example, story: Story) -> str:
    asked = f'<div class="sentence">&ldquo;{escape(example.asked)}&rdquo;</div>' if example.asked else ""
    answers = [[html.answer(said.text, said.right) for said in example.said]]
    film = "" if example.film is None else html.strip_image(story.names[story.asked], example.film)
    return (
        f'{asked}<div class="quiet">record {example.index} &middot; in truth: <b>{escape(example.truth)}</b></div>'
        f'<div class="answers">{html.table(story.names, answers)}</div>'
        f"{html.word_states([(word, fate.name) for word, fate in example.words])}{film}"
    )


def _table(lines: Sequence[tuple[str, str]]) -> str:
    """The first of each line is HTML, the second plain text."""
    cells = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in lines)
    return f'<table class="facts">{cells}</table>'


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""
