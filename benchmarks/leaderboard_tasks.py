"""Tasks of the leaderboard: a dense model, inputs to calibrate on, inputs to measure, and a score of the model's outputs.

    from leaderboard_tasks import TASKS        # beside this file; `leaderboard.py` describes the folders

`train_retrieval` makes the model of the retrieval task: two projections, of the frozen image encoder and of frozen sentence
embeddings, are trained contrastively. The features that they project are computed once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from embeddings import hits, mean_pooled, of_one_length, shared_neighbors
from photo_towers import MINILM, image_encoder, sentence_encoder
from torch import Tensor, nn

import vltprune as vp
from vltprune.data import captions
from vltprune.evaluation.tasks import Nlvr

SIZE = 112  # of photographs, in pixels
_PAIRS, _PHOTOGRAPHS, _CAPTIONS = 80, 64, 250  # measured
_CALIBRATED = 10  # pairs and photographs that set the cost, the first two alone where these suffice
_CALIBRATED_CAPTIONS = 25
_WIDTH, _TRAIN_PHOTOGRAPHS, _TRAIN_CAPTIONS = 256, 3000, 2
_EPOCHS, _PER_STEP, _LR = 10, 100, 3e-3


@dataclass(frozen=True)
class Task:
    """A dense model with what the leaderboard needs to prune, calibrate and score it.

    Attributes:
        dense: The dense model.
        calibration: Inputs of the model that set the cost and fit guides.
        batches: Inputs that are measured.
        embed: A dense or pruned model and one batch to outputs [batch, width].
        score: Outputs of all measured inputs to scores by name, one share of 1 for each instance; the first one ranks.
    """

    dense: nn.Module
    calibration: Sequence[Any]
    batches: Sequence[Any]
    embed: Callable[[nn.Module, Any], Tensor]
    score: Callable[[Tensor], dict[str, Tensor]]


def nlvr(options: argparse.Namespace) -> Task:
    """Synthetic NLVR by the packaged dense `blip_nlvr_tiny`: is a sentence true of two images?"""
    dense = vp.create_model("blip_nlvr_tiny", pretrained=True).eval()
    task, prepare = Nlvr.from_model(dense), vp.transforms(dense)
    records = list(Nlvr.load_records(f"synthetic:val:{_PAIRS + _CALIBRATED}", ""))

    def batch(part: Sequence[Any]) -> tuple[Tensor, ...]:
        return torch.stack([record.load_tensor(prepare) for record in part]), *task.tokenize(part)[0]

    batches, rest = [batch(part) for part in _batched(records[:_PAIRS], 20)], records[_PAIRS:]
    calibration = [batch(rest[:2]), batch(rest[2:])]
    labels = torch.tensor([record.label for record in records[:_PAIRS]])

    def accuracy(logits: Tensor) -> dict[str, Tensor]:
        return {"accuracy": logits.argmax(-1) == labels}

    return Task(dense, calibration, batches, lambda model, batch: model(*batch), accuracy)


def photographs(options: argparse.Namespace) -> Task:
    """Flickr8k's dev split by the ViT-S/14: retrieval with fixed embeddings of captions, and neighbors in a dense gallery.

    Recall is of trained projections of the image encoder and of sentence embeddings. Neighbors are ten of the photographs that
    the projections were trained on, by features without projection.
    """
    dense, heads = image_encoder(options.real, SIZE), _heads()
    heads.load_state_dict(torch.load(_trained(options.work), weights_only=True))
    records = captions(options.flickr / "dev.json", options.flickr)[: _PHOTOGRAPHS + _CALIBRATED]
    images = _photographs(dense, [record.load_tensor for record in records])
    measured = records[:_PHOTOGRAPHS]
    texts = _sentence_features(options.real, [text for record in measured for text in record.captions])
    with torch.no_grad():
        texts = F.normalize(heads["text"](texts), dim=-1)
    owners = torch.tensor([owner for owner, record in enumerate(measured) for _ in record.captions])

    gallery, _ = (F.normalize(features, dim=-1) for features in _training_data(options))
    batches = images[:_PHOTOGRAPHS].split(8)
    before = _outputs(dense, batches, _normalized)
    near = (before @ gallery.T).topk(10).indices

    def scores(features: Tensor) -> dict[str, Tensor]:
        similarity = F.normalize(heads["image"](features), dim=-1) @ texts.T
        own = torch.arange(len(features))
        by_text = _by_owner((similarity.topk(10, 0).indices == owners).any(0), owners)
        by_image = (owners[similarity.topk(10, 1).indices] == own[:, None]).any(1)
        found = (features @ gallery.T).topk(10).indices
        neighbors = (near[:, :, None] == found[:, None]).any(-1).float().mean(-1)
        return {"r10": (by_text + by_image) / 2, "neighbors": neighbors, "cosine": (before * features).sum(-1)}

    rest = images[_PHOTOGRAPHS:]
    return Task(dense, [rest[:2], rest[2:]], batches, _normalized, scores)


def sentences(options: argparse.Namespace) -> Task:
    """Captions by all-MiniLM-L6-v2: how often the nearest other caption is of the same photograph."""
    from transformers import AutoTokenizer

    tokenizer, dense = AutoTokenizer.from_pretrained(options.real / MINILM), sentence_encoder(options.real)
    records = captions(options.flickr / "dev.json", options.flickr)
    texts = [(owner, text) for owner, record in enumerate(records) for text in record.captions]
    texts = texts[: _CAPTIONS + _CALIBRATED_CAPTIONS]
    owned = [(owner, ids) for (owner, _), ids in zip(texts, tokenizer([t for _, t in texts]).input_ids, strict=True)]
    batches = list(of_one_length(owned[:_CAPTIONS], 64))
    calibration = [ids for _, ids in of_one_length(owned[_CAPTIONS:], 64)]
    calibration.sort(key=lambda ids: -len(ids))  # of the commonest length first
    owners, ids = torch.cat([owners for owners, _ in batches]), [ids for _, ids in batches]
    before = _outputs(dense, ids, _pooled)

    def recall(features: Tensor) -> dict[str, Tensor]:
        found = {"r1": hits(features, owners), "neighbors": shared_neighbors(before, features)}
        found["cosine"] = (before * features).sum(-1)
        return {name: _by_owner(values, owners) for name, values in found.items()}

    return Task(dense, calibration, ids, _pooled, recall)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "photographs": photographs,
    "nlvr": nlvr,
    "sentences": sentences,
}


def train_retrieval(options: argparse.Namespace) -> None:
    """Trains the projections of the retrieval task with CLIP's loss, unless they are there; seconds on cached features."""
    file = _trained(options.work)
    if file.exists():
        return
    torch.manual_seed(0)
    images, texts = _training_data(options)
    heads, scale = _heads(), nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    steps = _EPOCHS * (len(images) // _PER_STEP)
    optimizer = torch.optim.AdamW([*heads.parameters(), scale], lr=_LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    for step in range(steps):
        if step % (len(images) // _PER_STEP) == 0:
            order = torch.randperm(len(images)).split(_PER_STEP)
        chosen = order[step % (len(images) // _PER_STEP)]
        loss = _contrastive(heads, scale, images[chosen], texts[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"trained the projections of retrieval: last loss {loss.item():.3f}", flush=True)
    torch.save(heads.state_dict(), file)


def _contrastive(heads: Any, scale: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """CLIP's loss of images [batch, dim] and of each of their captions [batch, captions, dim]."""
    images = F.normalize(heads["image"](images), dim=-1)
    texts = F.normalize(heads["text"](texts), dim=-1)
    labels = torch.arange(len(images))
    logits = [scale.exp() * images @ one.T for one in texts.unbind(1)]
    both = [F.cross_entropy(one, labels) + F.cross_entropy(one.T, labels) for one in logits]
    return sum(both[1:], both[0]) / (2 * len(both))


def _training_data(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Features of training photographs [photographs, dim], and of their captions [photographs, captions, dim]."""
    records = captions(options.flickr / "train.json", options.flickr)[:_TRAIN_PHOTOGRAPHS]

    def images() -> Tensor:
        model = image_encoder(options.real, SIZE)
        parts = [_photographs(model, [record.load_tensor for record in part]) for part in _batched(records, 50)]
        return _outputs(model, parts, lambda model, batch: model(batch))

    def texts() -> Tensor:
        several = [text for record in records for text in record.captions[:_TRAIN_CAPTIONS]]
        return _sentence_features(options.real, several).unflatten(0, (-1, _TRAIN_CAPTIONS))

    return _cached(options.work / "train_images.pt", images), _cached(options.work / "train_texts.pt", texts)


def _heads() -> Any:
    """Projections of the image encoder's class token and of sentence embeddings."""
    return nn.ModuleDict({name: nn.Linear(384, _WIDTH, bias=False) for name in ("image", "text")})


def _trained(work: Path) -> Path:
    return work / "retrieval.pt"


def _sentence_features(real: Path, texts: Sequence[str]) -> Tensor:
    """[texts, dim]: embeddings by all-MiniLM-L6-v2."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(real / MINILM), sentence_encoder(real)
    numbered = list(enumerate(tokenizer(list(texts)).input_ids))
    features = torch.empty(len(texts), 384)
    for indices, ids in of_one_length(numbered, 64):
        features[indices] = _outputs(model, [ids], _pooled)
    return features


def _photographs(model: nn.Module, loaders: Sequence[Callable[[Any], Tensor]]) -> Tensor:
    """[photographs, 3, height, width], preprocessed as the model wants them."""
    prepare = vp.transforms(model)
    return torch.cat([load(prepare) for load in loaders])


@torch.no_grad()
def _outputs(model: nn.Module, batches: Sequence[Any], embed: Callable[[Any, Any], Tensor]) -> Tensor:
    return torch.cat([embed(model, batch) for batch in batches])


def _pooled(model: nn.Module, ids: Tensor) -> Tensor:
    return F.normalize(mean_pooled(model, ids), dim=-1)


def _normalized(model: nn.Module, images: Tensor) -> Tensor:
    return F.normalize(model(images), dim=-1)


def _by_owner(values: Tensor, owners: Tensor) -> Tensor:
    """[photographs]: means of the values [captions] of each photograph, which are no independent instances."""
    return torch.stack([part.float().mean() for part in _parts(values, owners)])


def _parts(values: Tensor, owners: Tensor) -> Iterator[Tensor]:
    for owner in owners.unique():
        yield values[owners == owner]


def _batched(several: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(several), size):
        yield several[start : start + size]


def _cached(file: Path, build: Callable[[], Tensor]) -> Tensor:
    """What `build` returns, from a file where it was saved before."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(build(), partial)
        partial.rename(file)
    return torch.load(file, weights_only=True)
