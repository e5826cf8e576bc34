"""The demo's report: results, explanations and example images as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ..viz import charts, html
from .examples import Example
from .measure import ModelResult, speedup

TRAINING_NOTE = (
    "MADTP's weights were trained with pruning, for 2,000 steps at 70 % and 7,900 at 80 %; random pruning was not trained.\n"
    "After equal training of 300 steps, choosing tokens by score is worth 9.8 ± 2.2 points over random choice (3 seeds, 80 %)."
)
_LEAD = (
    "A vision-language model cuts images into patches and turns every patch, and every word, into a token. Most patches show "
    "background. Token pruning removes such tokens between the layers, so that later layers have less to compute. This page "
    "compares one small model without pruning, with MADTP, and with random pruning, on {questions} questions."
)
_SETUP = {
    "The task": "Two images and a sentence about them: is the sentence true? Half of the sentences are, so guessing gives "
    "50 %. Images and sentences are generated (synthetic NLVR): colored shapes on a cluttered background. No model was trained "
    "on these pairs (test split, seed {seed}).",
    "The model": "blip_nlvr_tiny, a small BLIP with 2.6 million parameters. Its image encoder has {layers} layers and reads "
    "{patches} patches of 8 x 8 pixels and a class token. Its text encoder has 4 layers and attends to the image tokens that "
    "are left.",
    "MADTP": "Multimodal alignment-guided dynamic token pruning (CVPR 2024). Tokens are scored by attention and by how well "
    "they align with concepts that images and text share. How many are kept differs from image to image. The others are "
    "merged into one token. The first two or three layers prune image patches; words are pruned as well.",
    "random": "Patches are chosen at random and dropped, in the same layers, at the same cost. Words stay.",
    "70 %, 80 %": "The share of the dense model's computation (MACs) that pruning was set to save.",
    "trained": "The weights were trained on with pruning switched on.",
    "untrained": "The dense model's weights, as they are.",
    "MADTP's weights": "The weights of the row “MADTP 80 %, trained”.",
}
_COLUMNS = {
    "accuracy": "Share of the questions answered right. Its standard error is about {error:.1%}.",
    "GMACs/sentence": "Billions of multiply-accumulates for one sentence and its two images, the pruning itself included. "
    "Tokens that only pad a sentence are not counted; the dense model spends {padding:.3f} G on them.",
    "MACs saved": "Share of the dense model's multiply-accumulates that were saved.",
    "image tokens kept": "Mean share of the image tokens that leave a layer, then their number after layer 1, 2, ...",
    "speed-up": "How many times as fast as the dense model, median over batches, on this machine ({threads}).",
}
_NOT_SHOWN = (
    "An equally trained random baseline: see the sentence above. The rows show what the shipped weights do, not what MADTP "
    "gains over chance.",
    "Photographs and real sentences. Synthetic images have much background, which is easy to prune. docs/results.md has "
    "numbers on photographs, where more is lost.",
    "The speed of larger models. At 96 x 96 pixels pruning's own overhead is large, so time falls less than MACs.",
    "Variation over training runs. Each row is one model.",
)
_TOKENS = (
    "Image tokens after each layer, mean over all images. A lower line means less work in all later layers. Models that keep "
    "the same number share a line, which is then drawn in both colors."
)
_FAMILIES = (
    "Accuracy by the kind of sentence, in percent; guessing gives 50. The last section has an example of each kind."
)
_IMAGES = (
    "Each row shows one image as the model sees it, then what is left of it after every layer: the left image above, the "
    "right below. Numbers count tokens, class token included. Check whether the shapes that the sentence names stay visible. "
    "These are the first test questions of each kind, not a selection. The percentage beside an answer is the model's "
    "confidence in it."
)


def page(results: Mapping[str, ModelResult], examples: Sequence[Example], dense: str, seed: int, threads: int) -> str:
    """Build the report as an HTML page.

    Args:
        results: The results by the models' names, in the order of the rows.
        examples: The questions to show with images.
        dense: The dense model's name.
        seed: The seed of the pairs.
        threads: CPU threads that were used.

    Returns:
        The HTML document, images and charts included.
    """
    whole = results[dense]
    questions = len(whole.labels)
    facts = {
        "layers": len(whole.kept["image"]) - 1,
        "patches": round(whole.kept["image"][0]) - 1,
        "error": (whole.accuracy * (1 - whole.accuracy) / questions) ** 0.5,
        "padding": whole.padding / 1e9,
        "seed": seed,
        "threads": f"{threads} CPU thread{'s' * (threads > 1)}",
    }
    body = [
        "<h1>What can a vision-language model leave out?</h1>",
        f'<p class="lead">{_LEAD.format(questions=f"{questions:,}")}</p>',
        html.card(_results(results, dense)),
        f"<p><b>{escape(TRAINING_NOTE)}</b></p>",
        f"<h2>What was compared</h2>{html.card(html.definitions(_filled(_SETUP, facts)))}",
        f"<h2>What the columns mean</h2>{html.card(html.definitions(_filled(_COLUMNS, facts)))}",
        f"<h2>What this page does not show</h2>{html.card(html.bullets(_NOT_SHOWN))}",
        f"<h2>Where the tokens go</h2><p>{_TOKENS}</p>{html.card(_chart(results))}",
        f"<h2>Which questions suffer</h2><p>{_FAMILIES}</p>{html.card(_families(results))}",
        f"<h2>What each layer kept</h2><p>{_IMAGES}</p>{html.state_legend()}",
        *(html.card(_example(example)) for example in examples),
    ]
    return html.document("vltprune demo", body)


def table(results: Mapping[str, ModelResult], dense: str) -> list[list[str]]:
    """Build the demo's table as plain text.

    Args:
        results: The results by the models' names, in the order of the rows.
        dense: The dense model's name, for speed-ups.

    Returns:
        The cells of each row: a header, then a row a model.
    """
    rows = [["model", "accuracy", "GMACs/sentence", "MACs saved", "image tokens kept, layer by layer", "speed-up"]]
    for name, result in results.items():
        tokens = " ".join(f"{n:.0f}" for n in result.kept["image"][1:])
        faster = f"{speedup(result.seconds, results[dense].seconds):.2f} x" if result.seconds else "-"
        rows.append(
            [
                name,
                f"{result.accuracy:.1%}",
                f"{result.macs / 1e9:.3f}",
                f"{result.macs_saved:.1%}",
                f"{result.kept_ratio:4.0%}: {tokens}",
                faster,
            ]
        )
    return rows


def _filled(texts: Mapping[str, str], facts: Mapping[str, object]) -> dict[str, str]:
    return {term: meaning.format(**facts) for term, meaning in texts.items()}


def _results(results: Mapping[str, ModelResult], dense: str) -> str:
    header, *rows = table(results, dense)
    return html.table(
        header, [[charts.symbol(i) + escape(name), *map(escape, rest)] for i, (name, *rest) in enumerate(rows)]
    )


def _families(results: Mapping[str, ModelResult]) -> str:
    families = list(next(iter(results.values())).accuracy_by_family())
    rows = []
    for i, (name, result) in enumerate(results.items()):
        accuracy = result.accuracy_by_family()
        cells = [f"{100 * accuracy[family]:.1f}" for family in families]
        rows.append([charts.symbol(i) + escape(name), f"<b>{100 * result.accuracy:.1f}</b>", *cells])
    return html.table(["model", "all", *families], rows)


def _chart(results: Mapping[str, ModelResult]) -> str:
    """Image tokens after each layer, a line a model."""
    most = max(max(result.kept["image"]) for result in results.values())
    layers = len(next(iter(results.values())).kept["image"]) - 1
    lines = [
        charts.Line(list(enumerate(result.kept["image"])), charts.series_color(i), mark=charts.series_mark(i))
        for i, result in enumerate(results.values())
    ]
    up = charts.Axis(0, most, {tokens: f"{tokens:.0f}" for tokens in (0, 50, 100, most) if tokens <= most})
    svg = charts.chart(lines, charts.layer_axis(layers), up, "image tokens after each layer")
    return svg + charts.legend(list(results))


def _example(example: Example) -> str:
    rows = [
        [charts.symbol(i) + escape(name), _answer(probability, example.label)]
        for i, (name, probability) in enumerate(example.probabilities.items())
    ]
    first, *rest = (_strip(example, name) for name in example.strips)
    names = " and ".join(map(escape, list(example.strips)[1:]))
    more = f"<details><summary>{names}</summary>{''.join(rest)}</details>" if rest else ""
    return (
        f'<div class="sentence">&ldquo;{escape(example.sentence)}&rdquo;</div>'
        f'<div class="quiet">{escape(example.family)} &middot; in truth: <b>{str(example.label).lower()}</b></div>'
        f'<div class="answers">{html.table(["model", "answer"], rows)}</div>{first}{more}'
    )


def _answer(probability: float, label: bool) -> str:
    prediction = probability > 0.5
    confidence = max(probability, 1 - probability)
    return f"{html.answer(str(prediction).lower(), prediction == label)} {confidence:.0%}"


def _strip(example: Example, name: str) -> str:
    words = html.word_states([(word, state.name) for word, state in example.words.get(name, ())])
    return f'<div class="model">{escape(name)}</div>{words}{html.strip_image(name, example.strips[name])}'
