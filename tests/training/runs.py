"""What the training tests share: small data sets of every task, drawn, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vltprune as vp
from vltprune.training import CompressConfig

WORDS = "a above are at below blue both circle circles contain"
_MORE = "what color is the star red two and"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split(), *_MORE.split()]


def write_images(folder: Path, n: int = 8) -> list[str]:
    """Noise of n kinds, 40 pixels a side."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(n)]


def annotations(task: str, folder: Path, n: int = 8) -> str:
    """The file of a task's n records, and beside it the images and the vocabulary."""
    names, words = write_images(folder, n), WORDS.split()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    said = [" ".join(words[(i + j) % len(words)] for j in range(1 + i % 4)) for i in range(n)]
    entries: dict[str, Any] = {
        "nlvr": [
            {"images": [names[i], names[-1 - i]], "sentence": said[i], "label": str(bool(i % 2))} for i in range(n)
        ],
        "caption": [{"image": names[i], "caption": [said[i], said[-1 - i]], "image_id": i} for i in range(n)],
        "retrieval": [{"image": names[i], "caption": [said[i], said[-1 - i]], "image_id": i} for i in range(n)],
        "vqa": [
            {
                "image": names[i],
                "question": f"what color is the {said[i]}",
                "question_id": i,
                "dataset": "vqa",
                "answer": ["red"] * 7 + ["blue"] * 3,
            }
            for i in range(n)
        ],
    }
    (folder / f"{task}.json").write_text(json.dumps(entries[task]))
    return str(folder / f"{task}.json")


SIZES = {
    "image_size": 32,
    "patch_size": 4,
    "vision_width": 32,
    "vision_depth": 2,
    "vision_heads": 2,
    "text_width": 32,
    "text_depth": 2,
    "text_heads": 2,
    "max_positions": 24,
}
_IDS = {"enc_id": 23, "bos_id": 22, "eos_id": 3}
_OWN: dict[str, dict[str, Any]] = {
    "nlvr": {"merge_from": 1},
    "caption": {"bos_id": 22, "eos_id": 3, "prompt": (4, 5)},
    "vqa": _IDS,
    "retrieval": {"enc_id": 23, "embed_dim": 16},
}
SHORT = {  # a step without a teacher, of a budget whose knob needs no first search, and two records to evaluate
    "parts": {"guide": "codebook(anchors=4)", "keep": "learned(threshold=-0.5)"},
    "budget": "learned",
    "saliency": 0.0,
    "steps": 1,
    "val_limit": 2,
    "k_test": 2,
}


def config(task: str, folder: Path, **changes: Any) -> CompressConfig:
    """A few steps of a tiny model on the task's records, from random weights."""
    data = annotations(task, folder)
    common: dict[str, Any] = {
        "task": task,
        "model": f"blip_{task}_tiny",
        "data": data,
        "val": data,
        "model_args": {**SIZES, "vocab_size": len(VOCABULARY) + 2, **_OWN[task]},
        "vocabulary": str(folder / "vocab.txt"),
        "parts": {"guide": "codebook(anchors=4)", "keep": "ratio(ratio=0.7)"},
        "reduction": 0.3,
        "steps": 4,
        "batch_size": 4,
        "lr": 1e-3,
        "checkpoint_every": 2,
        "log_every": 1,
        "workers": 0,
    }
    return CompressConfig.from_dict({**common, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the model that a run in a folder has written."""
    return vp.load(folder / "model").state_dict()
