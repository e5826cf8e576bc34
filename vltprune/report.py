"""Where the demo's numbers and pictures become one HTML file that needs nothing beside it. No model is run here."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from .evaluate import Outcome, relative_time
from .visualize import Fate

COLOURS = ("#3b3f46", "#1f6fd6", "#d98a1f", "#0a9b74", "#c8452f", "#8a58c7", "#7b7f87")

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, sans-serif; color: #23272e; background: #f4f5f7; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 28px; margin: 0 0 4px } h2 { font-size: 20px; margin: 40px 0 6px }
p { margin: 6px 0 12px; max-width: 76ch } .lead { font-size: 18px }
.card { background: #fff; border: 1px solid #dfe2e7; border-radius: 10px; padding: 16px 20px; margin: 16px 0; overflow-x: auto }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #eceef1; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { color: #5b626d; font-weight: 600 }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px }
.sentence { font-size: 18px; font-weight: 600 } .quiet { color: #5b626d; font-size: 14px }
.right { color: #0a7d50 } .wrong { color: #c0331f; font-weight: 600 }
.film { max-width: 100%; height: auto; display: block; margin: 4px 0 }
.answers td, .answers th { padding: 3px 22px 3px 0; text-align: left; font-size: 14px }
.answers { margin-top: 8px }
.model { margin: 14px 0 2px; font-weight: 600 }
.key { display: inline-block; width: 13px; height: 13px; border-radius: 3px; vertical-align: -2px; margin: 0 5px 0 14px }
.KEPT { color: #23272e; font-weight: 600 } .MERGED { color: #0a7c82; opacity: .75 }
.DROPPED { color: #b3b8c0; text-decoration: line-through }
summary { cursor: pointer; color: #1f6fd6; margin-top: 10px }
svg text { font: 13px system-ui, sans-serif; fill: #23272e }
"""


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
    words: Mapping[str, Sequence[tuple[str, Fate]]]


def page(outcomes: Mapping[str, Outcome], examples: Sequence[Example], dense: str, notes: Sequence[str] = ()) -> str:
    """The report. outcomes: by the models' names, `dense` among them; notes: sentences on how it was measured."""
    questions = f"{len(outcomes[dense].labels):,}"
    body = [
        "<h1>What can a vision-language model leave out?</h1>",
        f'<p class="lead">{_LEAD.format(questions=questions)}</p>',
        _card(_summary(outcomes, dense)),
        '<p class="quiet">' + " ".join(escape(note) for note in notes) + "</p>",
        f"<h2>Where the tokens go</h2><p>{_TOKENS}</p>",
        _card(_chart(outcomes)),
        f"<h2>Which questions suffer</h2><p>{_QUESTIONS}</p>",
        _card(_families(outcomes)),
        f"<h2>What each layer kept</h2><p>{_PICTURES}</p>",
        _legend(),
        *(_card(_example(example)) for example in examples),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    head = f'<!doctype html>\n<html lang="en"><head>{head}<title>vltprune demo</title></head>'
    return "\n".join([head, "<body><main>", *body, "</main></body></html>", ""])


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


def _card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def _summary(outcomes: Mapping[str, Outcome], dense: str) -> str:
    header, *lines = columns(outcomes, dense)
    return _table(header, [[_dot(i) + escape(name), *map(escape, rest)] for i, (name, *rest) in enumerate(lines)])


def _families(outcomes: Mapping[str, Outcome]) -> str:
    names = list(next(iter(outcomes.values())).by_family())
    lines = []
    for i, (name, outcome) in enumerate(outcomes.items()):
        scores = outcome.by_family()
        cells = [f"{100 * scores[family]:.1f}" for family in names]
        lines.append([_dot(i) + escape(name), f"<b>{100 * outcome.accuracy:.1f}</b>", *cells])
    return _table(["model", "all", *names], lines)


def _chart(outcomes: Mapping[str, Outcome]) -> str:
    """Tokens after each layer as an SVG: a line a model, its name at the right end."""
    width, height, left, right, top, bottom = 760, 300, 48, 36, 14, 40
    most = max(max(outcome.kept["image"]) for outcome in outcomes.values())
    steps = len(next(iter(outcomes.values())).kept["image"]) - 1

    def at(step: int, tokens: float) -> tuple[float, float]:
        return left + (width - left - right) * step / steps, top + (height - top - bottom) * (1 - tokens / most)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="image tokens kept by layer">']
    for tokens in (0, most):
        y = at(0, tokens)[1]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7eb"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tokens:.0f}</text>')
    for step in range(steps + 1):
        label = "input" if step == 0 else f"layer {step}"
        parts.append(f'<text x="{at(step, 0)[0]:.1f}" y="{height - 14}" text-anchor="middle">{label}</text>')
    for i, outcome in enumerate(outcomes.values()):
        points = [at(step, tokens) for step, tokens in enumerate(outcome.kept["image"])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(i)}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{_colour(i)}"/>' for x, y in points]
    names = "".join(f"<span>{_dot(i)}{escape(name)}&emsp;</span>" for i, name in enumerate(outcomes))
    return "".join(parts) + f'</svg><div class="quiet">{names}</div>'


def _legend() -> str:
    keys = {"#9aa7b5": "kept", "#0a7c82": "merged into another token", "#16181c": "dropped"}
    return (
        "<p>" + "".join(f'<span class="key" style="background:{c}"></span>{what}' for c, what in keys.items()) + "</p>"
    )


def _example(example: Example) -> str:
    verdict = "true" if example.truth else "false"
    answers = _table(list(example.answers), [[_answer(chance, example.truth) for chance in example.answers.values()]])
    first, *rest = (_film(example, name) for name in example.films)
    more = f"<details><summary>{' and '.join(map(escape, list(example.films)[1:]))}</summary>{''.join(rest)}</details>"
    return (
        f'<div class="sentence">&ldquo;{escape(example.sentence)}&rdquo;</div>'
        f'<div class="quiet">{escape(example.family)} &middot; in truth: <b>{verdict}</b></div>'
        f'<div class="answers">{answers}</div>{first}{more if rest else ""}'
    )


def _answer(chance: float, truth: bool) -> str:
    said = chance > 0.5
    css, mark = ("right", "&#10003;") if said == truth else ("wrong", "&#10007;")
    return f'<span class="{css}">{str(said).lower()} {mark}</span> {max(chance, 1 - chance):.0%}'


def _film(example: Example, name: str) -> str:
    words = " ".join(f'<span class="{fate.name}">{escape(word)}</span>' for word, fate in example.words.get(name, ()))
    said = f'<div class="quiet">words at the last layer: {words}</div>' if words else ""
    picture = f'<img class="film" alt="patches kept by {escape(name)}" src="{_inline(example.films[name])}">'
    return f'<div class="model">{escape(name)}</div>{said}{picture}'


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """header is plain text, lines are HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _dot(index: int) -> str:
    return f'<span class="dot" style="background:{_colour(index)}"></span>'


def _inline(picture: Image.Image) -> str:
    """The picture as a data address. JPEG, since the ground is noise, which PNG would keep at five times the size."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
