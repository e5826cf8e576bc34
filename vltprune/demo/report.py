"""The demo's report: numbers and images as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from ..viz import charts, html
from ..viz.kept_tokens import TokenState
from .measure import Outcome, relative_time

_LEAD = (
    "A model reads two images and a sentence and says whether the sentence is true. Below, the same small model answers "
    "{questions} questions it has never seen: whole, and with most of its image patches and words pruned on the way through "
    "its layers. MADTP chooses them by what images and text have in common; the random baseline draws lots."
)
_TOKENS = (
    "Image tokens that are left after each layer of the image tower, mean over all images. Fewer tokens are less work for "
    "that layer and for all that follow."
)
_QUESTIONS = "Accuracy by the kind of sentence, in percent; a coin would get 50."
_PICTURES = (
    "Each strip shows one image, the left above the right, and then what is left of it after every layer; the numbers count "
    "tokens, class token included. Do the things the sentence speaks of stay? These are the first questions of each kind in "
    "the test set, not a selection. Beside each answer: how sure the model was."
)


@dataclass(frozen=True)
class Example:
    """One pair of the report. answers: per model, the probability it gave to "true"; films: per model, what its image
    tower kept of both images; words: per model, the sentence's words and what became of each."""

    sentence: str
    family: str
    truth: bool
    answers: Mapping[str, float]
    films: Mapping[str, Image.Image]
    words: Mapping[str, Sequence[tuple[str, TokenState]]]


def page(outcomes: Mapping[str, Outcome], examples: Sequence[Example], dense: str, notes: Sequence[str] = ()) -> str:
    """The report. outcomes: by the models' names, `dense` among them; notes: sentences on how it was measured."""
    questions = f"{len(outcomes[dense].labels):,}"
    body = [
        "<h1>What can a vision-language model leave out?</h1>",
        f'<p class="lead">{_LEAD.format(questions=questions)}</p>',
        html.card(_summary(outcomes, dense)),
        '<p class="quiet">' + " ".join(escape(note) for note in notes) + "</p>",
        f"<h2>Where the tokens go</h2><p>{_TOKENS}</p>",
        html.card(_chart(outcomes)),
        f"<h2>Which questions suffer</h2><p>{_QUESTIONS}</p>",
        html.card(_families(outcomes)),
        f"<h2>What each layer kept</h2><p>{_PICTURES}</p>",
        html.state_legend(),
        *(html.card(_example(example)) for example in examples),
    ]
    return html.document("vltprune demo", body)


def columns(outcomes: Mapping[str, Outcome], dense: str) -> list[list[str]]:
    """The table that the demo prints: a header, then a line a model."""
    table = [["model", "accuracy", "GMACs/sentence", "MACs saved", "image tokens kept, layer by layer", "time"]]
    for name, outcome in outcomes.items():
        kept = " ".join(f"{n:.0f}" for n in outcome.kept["image"][1:])
        seconds = f"{relative_time(outcome.seconds, outcomes[dense].seconds):.2f} x" if outcome.seconds else "-"
        tokens = f"{outcome.kept_share:4.0%}: {kept}"
        numbers = [f"{outcome.accuracy:.1%}", f"{outcome.macs / 1e9:.3f}", f"{outcome.saved:.1%}", tokens]
        table.append([name, *numbers, seconds])
    return table


def _summary(outcomes: Mapping[str, Outcome], dense: str) -> str:
    header, *lines = columns(outcomes, dense)
    return html.table(
        header, [[html.dot(i) + escape(name), *map(escape, rest)] for i, (name, *rest) in enumerate(lines)]
    )


def _families(outcomes: Mapping[str, Outcome]) -> str:
    names = list(next(iter(outcomes.values())).by_family())
    lines = []
    for i, (name, outcome) in enumerate(outcomes.items()):
        scores = outcome.by_family()
        cells = [f"{100 * scores[family]:.1f}" for family in names]
        lines.append([html.dot(i) + escape(name), f"<b>{100 * outcome.accuracy:.1f}</b>", *cells])
    return html.table(["model", "all", *names], lines)


def _chart(outcomes: Mapping[str, Outcome]) -> str:
    """Tokens after each layer: a line a model."""
    most = max(max(outcome.kept["image"]) for outcome in outcomes.values())
    layers = len(next(iter(outcomes.values())).kept["image"]) - 1
    lines = [
        charts.Line(list(enumerate(outcome.kept["image"])), html.color(i))
        for i, outcome in enumerate(outcomes.values())
    ]
    up = charts.Axis(0, most, {0: "0", most: f"{most:.0f}"})
    return charts.chart(lines, charts.layers(layers), up, "image tokens kept by layer") + html.dots(list(outcomes))


def _example(example: Example) -> str:
    verdict = "true" if example.truth else "false"
    answers = html.table(
        list(example.answers), [[_answer(chance, example.truth) for chance in example.answers.values()]]
    )
    first, *rest = (_film(example, name) for name in example.films)
    more = f"<details><summary>{' and '.join(map(escape, list(example.films)[1:]))}</summary>{''.join(rest)}</details>"
    return (
        f'<div class="sentence">&ldquo;{escape(example.sentence)}&rdquo;</div>'
        f'<div class="quiet">{escape(example.family)} &middot; in truth: <b>{verdict}</b></div>'
        f'<div class="answers">{answers}</div>{first}{more if rest else ""}'
    )


def _answer(chance: float, truth: bool) -> str:
    said = chance > 0.5
    return f"{html.answer(str(said).lower(), said == truth)} {max(chance, 1 - chance):.0%}"


def _film(example: Example, name: str) -> str:
    words = html.word_states([(word, fate.name) for word, fate in example.words.get(name, ())])
    return f'<div class="model">{escape(name)}</div>{words}{html.strip_image(name, example.films[name])}'
