"""Building blocks of the HTML reports: self-contained pages of one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

COLORS = ("#3b3f46", "#1f6fd6", "#d98a1f", "#0a9b74", "#c8452f", "#8a58c7", "#7b7f87")

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, sans-serif; color: #23272e; background: #f4f5f7; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 28px; margin: 0 0 4px } h2 { font-size: 20px; margin: 40px 0 6px } h3 { font-size: 16px; margin: 24px 0 4px }
p { margin: 6px 0 12px; max-width: 76ch } .lead { font-size: 18px }
.card { background: #fff; border: 1px solid #dfe2e7; border-radius: 10px; padding: 16px 20px; margin: 16px 0; overflow-x: auto }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #eceef1; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { color: #5b626d; font-weight: 600 }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px }
.sentence { font-size: 18px; font-weight: 600 } .quiet { color: #5b626d; font-size: 14px }
.right { color: #0a7d50 } .wrong { color: #c0331f; font-weight: 600 }
.film { max-width: 100%; height: auto; display: block; margin: 4px 0 }
.facts th { text-align: left; color: #5b626d; font-weight: 400; vertical-align: top }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.tight table { font-size: 14px } .tight th, .tight td { padding: 5px 8px }
li { margin: 4px 0; max-width: 90ch }
.answers td, .answers th { padding: 3px 22px 3px 0; text-align: left; font-size: 14px }
.answers td { white-space: normal; vertical-align: top }
.answers { margin-top: 8px }
.model { margin: 14px 0 2px; font-weight: 600 }
.key { display: inline-block; width: 13px; height: 13px; border-radius: 3px; vertical-align: -2px; margin: 0 5px 0 14px }
.KEPT { color: #23272e; font-weight: 600 } .MERGED { color: #0a7c82; opacity: .75 }
.DROPPED { color: #b3b8c0; text-decoration: line-through }
summary { cursor: pointer; color: #1f6fd6; margin-top: 10px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px 28px }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr } }
svg text { font: 13px system-ui, sans-serif; fill: #23272e }
"""


def document(title: str, body: Sequence[str]) -> str:
    """A whole page. title is plain text, body is HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    head = f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title></head>'
    return "\n".join([head, "<body><main>", *body, "</main></body></html>", ""])


def card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """header is plain text, lines are HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def dot(index: int) -> str:
    return f'<span class="dot" style="background:{color(index)}"></span>'


def dots(names: Sequence[str]) -> str:
    """A line that says whose each color is, in their order."""
    named = "".join(f"<span>{dot(i)}{escape(name)}&emsp;</span>" for i, name in enumerate(names))
    return f'<div class="quiet">{named}</div>'


def state_legend() -> str:
    """A line that says what the colors of a film mean."""
    keys = {"#9aa7b5": "kept", "#0a7c82": "merged into another token", "#16181c": "dropped"}
    return (
        "<p>" + "".join(f'<span class="key" style="background:{c}"></span>{what}' for c, what in keys.items()) + "</p>"
    )


def answer(text: str, right: bool | None) -> str:
    """What a model said, marked as right or wrong; None: it cannot be told."""
    if right is None:
        return escape(text)
    css, mark = ("right", "&#10003;") if right else ("wrong", "&#10007;")
    return f'<span class="{css}">{escape(text)} {mark}</span>'


def strip_image(name: str, picture: Image.Image) -> str:
    """What an image tower kept, drawn by `kept_tokens.layer_strip`."""
    return f'<img class="film" alt="patches kept by {escape(name)}" src="{_inline(picture)}">'


def word_states(fated: Sequence[tuple[str, str]]) -> str:
    """Words and the names of their fates, as they stand after the last layer; nothing for none."""
    said = " ".join(f'<span class="{fate}">{escape(word)}</span>' for word, fate in fated)
    return f'<div class="quiet">words at the last layer: {said}</div>' if said else ""


def _inline(picture: Image.Image) -> str:
    """The picture as a data address. JPEG, since the ground is noise, which PNG would keep at five times the size."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
