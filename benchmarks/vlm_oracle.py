"""Prints where vision-language models can be pruned, and how far each is from the dense model with the same tokens masked.

    python benchmarks/vlm_oracle.py > benchmarks/results/vlm_oracle.md

It runs for a minute on one core. Models are those of the tests: tiny and random, two layers of language model. Those named
"window" have sliding windows that are shorter than the prompts. Each preset prunes a batch of three prompts, with one image,
two and none, and generates four tokens. Prompts of models with a Q-Former have one image each, or one video. The dense model
gets the same prompts with the tokens hidden that the pruned one dropped, in each layer. A cell is the largest difference of
logits, relative to the largest logit, and the number of presets that ran; expected are rounding errors, below 1e-5. Behind it
are refusals, each with its reason.

Image tokens that are merged, or that a pruned tower computed, are given to the dense language model as they are: what is
compared is all that follows. In BLIP-2 and its kin the Q-Former follows: tokens are hidden from it, and given to it. In the
language model tokens are dropped alone: there is no dense model of one that merges them.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vltprune as vp
from vltprune.layers.guides.text import TextGuide

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "hosts")]
import language_models as lm  # noqa: E402
import small_qformers  # noqa: E402
import small_vlms  # noqa: E402
from small_qformers import WithQFormer  # noqa: E402
from small_vlms import IMAGE_ID, STEPS, Vlm  # noqa: E402

VLMS = [*small_vlms.VLMS, *small_vlms.WINDOWED]
MODELS = [*VLMS, *small_qformers.SPEAKING]

PROMPTS = ((3, 4), (2, 3, 5), (4,))
# in place of words that begin and end an image, which a text may not have
HOW = {**STEPS, "max_new_tokens": 4, "suppress_tokens": [110, 111, 112, 113]}
COUNTS = {"keep": "random_ratio(mean=0.5, half_width=0.4)"}
LAYERS = {**COUNTS, "reducer": "drop", "at": {"language": (0, 1)}}
BETWEEN = {"place": "output", "at": None}
TOKENS = (
    "fastervlm",
    "visionzip",
    "prumerge",
    "vispruner",
    "divprune",
    "cdpruner",
    "hiprune",
    "vscan",
    "dart",
    "scissor",
)
# trips, which needs a text besides the prompt, is left out
BLOCKS = (
    "algm",
    "asvit",
    "ats",
    "avit",
    "diffrate",
    "dynamicvit",
    "ltp",
    "madtp",
    "madtp_decay",
    "mctf",
    "powerbert",
    "pumer",
    "tofu",
    "tome",
)
# by default these would keep all of an image's six visual tokens, or of its sixteen
LESS = {
    "attention": "distortion(error=0.3)",
    "crossget": "ratio(ratio=0.6)",
    "dymu": "fitted_threshold(threshold=0.4)",
    "flowcut": "entropy(count=6)",
    "pitome": "ratio(ratio=0.6)",
    "zero_tprune": "ratio(ratio=0.6)",
}

# place -> names of presets, with what `prune` is called with besides
PLACES: dict[str, dict[str, dict[str, Any]]] = {
    "in the image tower": {
        "random": {**COUNTS, "at": {"image": 0}},
        "evit": {"at": {"image": 0}},
        **{preset: {} for preset in BLOCKS},
        **{preset: {"keep": keep} for preset, keep in LESS.items()},
    },
    "between tower and language model": {
        **{preset: {} for preset in TOKENS},
        "fastervlm by column_attention": {"preset": "fastervlm", "scorer": "column_attention"},
        "visionzip by column_attention": {"preset": "visionzip", "scorer": "column_attention"},
        "random": {**COUNTS, **BETWEEN},
        "pooling": {**BETWEEN},
    },
    "before a layer": {"pyramiddrop": {}, "vtw": {}, "random": {**LAYERS, "place": "before"}},
    "in a layer": {"fastv": {"at": {"language": 0}}, "sparsevlm": {"reducer": "drop"}, "random": {**LAYERS}},
    "behind a layer": {"random": {**LAYERS, "place": "block"}},
}


@dataclass(frozen=True)
class Result:
    """One preset at one place of one model.

    Attributes:
        model: the model's name.
        place: a key of PLACES.
        preset: what was run, as PLACES names it.
        deviation: the largest difference of logits, relative to the largest; None where it was refused.
        reason: why it was refused; empty where it ran.
    """

    model: str
    place: str
    preset: str
    deviation: float | None
    reason: str = ""


def results(models: Iterable[str], places: Mapping[str, Mapping[str, dict[str, Any]]] = PLACES) -> Iterator[Result]:
    """Runs all presets at all places of models.

    Args:
        models: names of MODELS.
        places: as PLACES.

    Yields:
        One Result for each, in order.
    """
    for model in models:
        case: Any = (small_vlms if model in VLMS else small_qformers).make(model)
        torch.manual_seed(1)
        inputs = case.prompts(*PROMPTS) if model in VLMS else case.prompts()
        for place, presets in places.items():
            compare = image_deviation if place in list(PLACES)[:2] else language_deviation
            compare = compare if model in VLMS else qformer_deviation
            for preset, parts in presets.items():
                try:
                    pruned = case.pruned(**{"preset": preset, **parts})
                except (ValueError, TypeError) as error:
                    yield Result(model, place, preset, None, str(error))
                else:
                    yield Result(model, place, preset, compare(case, pruned, inputs))


def image_deviation(case: Vlm, pruned: Any, inputs: dict[str, Tensor]) -> float:
    """How far a model that is pruned before its language model is from the dense language model on the same tokens.

    Args:
        case: the dense model.
        pruned: the pruned one.
        inputs: prompts with images.

    Returns:
        The largest difference of logits, relative to the largest.
    """
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **HOW)
    visible, positions = case.visible(inputs, traces[0]), case.positions(inputs)
    pixels = {name: inputs[name] for name in case.draw([1]).keys() & inputs.keys()}
    kept = visible[inputs["input_ids"] == IMAGE_ID].bool()
    features = case.model.base_model.get_image_features(**pixels, return_dict=True)
    # parts that compare with a prompt keep other tokens without one; such presets drop, which leaves features as they are
    if not any(isinstance(guide, TextGuide) for guide in pruned.modules()):
        left = pruned.get_image_features(**pixels)
        features["pooler_output"] = placed(features["pooler_output"], left["pooler_output"], kept)
        if features.get("deepstack_features") is not None:
            levels = zip(features["deepstack_features"], left["deepstack_features"], strict=True)
            features["deepstack_features"] = [placed(whole, short, kept) for whole, short in levels]
    others = {name: value for name, value in inputs.items() if name not in pixels}
    hidden = {**others, "attention_mask": visible, "position_ids": positions, "mm_encoder_outputs": {"image": features}}
    want = case.model.generate(**hidden, **HOW)
    return apart(torch.stack(got.logits, 1), torch.stack(want.logits, 1))


def placed(whole: Any, short: Any, kept: Tensor) -> Any:
    """Features of all image tokens, with those of a pruned model at the places of what it kept.

    Args:
        whole: of the dense model, a tensor or a list of tensors, one an image.
        short: of the pruned model, likewise.
        kept: [rows] bool, which rows it kept.

    Returns:
        The features, in the form of `whole`.
    """
    rows = torch.cat([one.flatten(0, -2) for one in whole])
    rows[kept] = torch.cat([one.flatten(0, -2) for one in short])
    if isinstance(whole, Tensor):
        return rows.view_as(whole)
    return [
        part.view_as(one) for part, one in zip(rows.split([one[..., 0].numel() for one in whole]), whole, strict=True)
    ]


def language_deviation(case: Vlm, pruned: Any, inputs: dict[str, Tensor]) -> float:
    """How far a model whose language model is pruned is from the dense one, in whose layers the same tokens are masked.

    Args:
        case: the dense model.
        pruned: the pruned one.
        inputs: prompts with images.

    Returns:
        The largest difference of logits, relative to the largest.
    """
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **HOW)
    (trace,) = (trace for trace in traces if trace.tower == "language")
    gone = lm.gone(trace, inputs["attention_mask"].bool())
    return apart(torch.stack(got.logits, 1), lm.dense_logits(case, inputs, got.sequences, gone))


def qformer_deviation(case: WithQFormer, pruned: Any, inputs: dict[str, Tensor]) -> float:
    """How far a model with a Q-Former is from the dense one, whose Q-Former reads what the pruned image tower left.

    Args:
        case: the dense model.
        pruned: the pruned one.
        inputs: prompts with an image or a video each.

    Returns:
        The largest difference of logits, relative to the largest.
    """
    features = []
    hook = pruned.qformer.register_forward_pre_hook(
        lambda qformer, args, named: features.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    with hook, vp.collect() as traces:
        got = pruned.generate(**inputs, **HOW)
    with case.masked(traces[0], features[0]):
        want = case.model.generate(**inputs, **HOW)
    return apart(torch.stack(got.logits, 1), torch.stack(want.logits, 1))


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite entries, of words that are ruled out, do not count."""
    there = got.isfinite() & want.isfinite()
    return float((got - want)[there].abs().max() / want[there].abs().max())


def tables(found: Sequence[Result]) -> str:
    """The two tables in Markdown: places of each model, and refusals.

    Args:
        found: all results.

    Returns:
        The text.
    """
    models, places = (list(dict.fromkeys(getattr(one, name) for one in found)) for name in ("model", "place"))
    lines = ["| model | " + " | ".join(places) + " |", "|---" * (len(places) + 1) + "|"]
    for model in models:
        cells = []
        for place in places:
            here = [one.deviation for one in found if (one.model, one.place) == (model, place)]
            ran = [one for one in here if one is not None]
            refused = f", {len(here) - len(ran)} refused" if len(ran) < len(here) else ""
            cells.append(f"{max(ran):.0e} ({len(ran)}{refused})" if ran else "refused")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    lines += ["", "| refused | of | why |", "|---|---|---|"]
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in found:
        if one.deviation is None:
            by_model = reasons.setdefault((one.place, shortened(one.reason)), {})
            by_model.setdefault(one.model, []).append(one.preset)
    for (place, reason), by_model in reasons.items():
        presets = ", ".join(dict.fromkeys(preset for names in by_model.values() for preset in names))
        lines.append(f"| {presets}, {place} | {', '.join(by_model)} | {reason} |")
    return "\n".join(lines)


def shortened(reason: str) -> str:
    """An error's reason without what to write instead, and without the name of the model's class."""
    reason = re.sub(r"\b\w+ForConditionalGeneration\b", "model of this class", reason)
    reason = re.sub(r"^place='\w+' prunes", "it prunes", reason)
    reason = re.sub(r"^at=\{.*?\} names", "it names", reason)
    return re.split(r": (?:write|choose|prune)", reason)[0].replace("|", "/")


def main() -> None:
    """Runs all, and prints the tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", vp.UntrainedGuideWarning)
    with torch.no_grad():
        print(tables([*results(MODELS)]))


if __name__ == "__main__":
    main()
