"""Building blocks of the HTML reports: self-contained pages of one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

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
.symbol { vertical-align: -2px; margin-right: 7px }
.sentence { font-size: 18px; font-weight: 600 } .quiet { color: #5b626d; font-size: 14px }
.right { color: #0a7d50 } .wrong { color: #c0331f; font-weight: 600 }
.strip { max-width: 100%; height: auto; display: block; margin: 4px 0 }
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
    """Build a whole page, with its style sheet in it.

    Args:
        title: The page's title, plain text.
        body: HTML, one element or more each.

    Returns:
        The HTML document.
    """
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    head = f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title></head>'
    return "\n".join([head, "<body><main>", *body, "</main></body></html>", ""])


def card(content: str) -> str:
    """HTML in a white box."""
    return f'<div class="card">{content}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Build a table.

    Args:
        header: The names of the columns, plain text.
        rows: The cells of each row, HTML.

    Returns:
        The HTML element.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def definitions(terms: Mapping[str, str]) -> str:
    """A list of terms, such as the columns of a table, and what each means. Plain text."""
    rows = "".join(f"<tr><th>{escape(term)}</th><td>{escape(meaning)}</td></tr>" for term, meaning in terms.items())
    return f'<table class="facts">{rows}</table>'


def bullets(sentences: Sequence[str]) -> str:
    """A list of sentences, plain text; nothing for none."""
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""


def state_legend() -> str:
    """A line that says what the colors of a layer strip mean."""
    keys = {"#9aa7b5": "in color: kept", "#0a7c82": "teal: merged into another token", "#16181c": "black: dropped"}
    boxes = (f'<span class="key" style="background:{color}"></span>{meaning}' for color, meaning in keys.items())
    return f"<p>{''.join(boxes)}</p>"


def answer(text: str, correct: bool | None) -> str:
    """A model's answer, marked as right or wrong.

    Args:
        text: The answer, plain text.
        correct: Whether it is right; None where that is not known, for no mark.

    Returns:
        HTML.
    """
    if correct is None:
        return escape(text)
    css, mark = ("right", "&#10003;") if correct else ("wrong", "&#10007;")
    return f'<span class="{css}">{escape(text)} {mark}</span>'


def strip_image(name: str, strip: Image.Image) -> str:
    """A model's layer strip (`kept_tokens.layer_strip`), inside the page.

    Args:
        name: The model's name, plain text, for screen readers.
        strip: The strip; it is stored as JPEG.

    Returns:
        The HTML element.
    """
    return f'<img class="strip" alt="patches kept by {escape(name)}" src="{_data_address(strip)}">'


def word_states(words: Sequence[tuple[str, str]]) -> str:
    """Words, each with the name of its `TokenState` after the last layer; nothing for none."""
    spans = " ".join(f'<span class="{state}">{escape(word)}</span>' for word, state in words)
    return f'<div class="quiet">words after the last layer: {spans}</div>' if spans else ""


def _data_address(image: Image.Image) -> str:
    """JPEG, since the background is noise, which PNG would store at five times the size."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
