"""Tasks of the leaderboard: a dense model, inputs to calibrate on, inputs to measure, and a score of the model's outputs.

    from leaderboard_tasks import TASKS        # beside this file; `leaderboard.py` describes the folders

`train_retrieval` makes the model of the retrieval task: two projections, of the frozen image encoder and of frozen sentence
embeddings, are trained contrastively. The features that they project, and those that the k-nearest-neighbor classifier
compares with, are computed once.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from embeddings import hits, mean_pooled, of_one_length, shared_neighbors
from photo_towers import MINILM, image_encoder, sentence_encoder
from torch import Tensor, nn

import vltprune as vp
from vltprune.data import captions
from vltprune.data.images import list_images, load_tensor
from vltprune.evaluation.tasks import Nlvr

SIZE = 98  # of photographs, in pixels: a grid of 7 x 7 patches
NEIGHBORS, _SHARPNESS = (
    20,
    1 / 0.07,
)  # votes of the k-nearest-neighbor classifier, weighted by exp(similarity * sharpness)
_PAIRS, _PHOTOGRAPHS, _PER_CLASS = 200, 150, 20  # measured
_DESCRIBED, _TEXTS = 200, 3  # photographs, and captions of each, that are measured as sentences
_BATCH = 10  # pairs or photographs
_LENGTHS = 6  # of captions that set the cost, the commonest ones
_CALIBRATED = 10  # pairs and photographs that set the cost, the first two alone where these suffice
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
        resized: The part of the patches that enters to a dense model for smaller images, and what it measures; None for texts.
    """

    dense: nn.Module
    calibration: Sequence[Any]
    batches: Sequence[Any]
    embed: Callable[[nn.Module, Any], Tensor]
    score: Callable[[Tensor], dict[str, Tensor]]
    resized: Callable[[float], tuple[nn.Module, Sequence[Any]]] | None = None


def nlvr(options: argparse.Namespace) -> Task:
    """Synthetic NLVR by the packaged dense `blip_nlvr_tiny`: is a sentence true of two images?"""
    dense = vp.create_model("blip_nlvr_tiny", pretrained=True).eval()
    task, prepare = Nlvr.from_model(dense), vp.transforms(dense)
    records = list(Nlvr.load_records(f"synthetic:val:{_PAIRS + _CALIBRATED}", ""))

    def batch(part: Sequence[Any]) -> tuple[Tensor, ...]:
        return torch.stack([record.load_tensor(prepare) for record in part]), *task.tokenize(part)[0]

    batches, rest = [batch(part) for part in _batched(records[:_PAIRS], _BATCH)], records[_PAIRS:]
    calibration = [batch(rest[:2]), batch(rest[2:])]
    labels = torch.tensor([record.label for record in records[:_PAIRS]])

    def accuracy(logits: Tensor) -> dict[str, Tensor]:
        return {"accuracy": logits.argmax(-1) == labels}

    def resized(ratio: float) -> tuple[nn.Module, Sequence[Any]]:
        small: Any = copy.deepcopy(dense)
        small.visual = vp.resized(small.visual, ratio)
        return small, [(_shrunk(images, small.visual.patch_embed.img_size), *text) for images, *text in batches]

    return Task(dense, calibration, batches, lambda model, batch: model(*batch), accuracy, resized)


def retrieval(options: argparse.Namespace) -> Task:
    """Flickr8k's dev split by the ViT-S/14: retrieval with fixed embeddings of captions.

    Recall is of trained projections of the image encoder and of sentence embeddings.
    """
    train_retrieval(options)
    dense, heads = image_encoder(options.real, SIZE), _heads()
    heads.load_state_dict(torch.load(_trained(options.work), weights_only=True))
    records = captions(options.flickr / "dev.json", options.flickr)[: _PHOTOGRAPHS + _CALIBRATED]
    images = _photographs(dense, [record.load_tensor for record in records])
    measured = records[:_PHOTOGRAPHS]
    texts = _sentence_features(options.real, [text for record in measured for text in record.captions])
    with torch.no_grad():
        texts = F.normalize(heads["text"](texts), dim=-1)
    owners = torch.tensor([owner for owner, record in enumerate(measured) for _ in record.captions])

    def recall(features: Tensor) -> dict[str, Tensor]:
        similarity = F.normalize(heads["image"](features), dim=-1) @ texts.T
        own = torch.arange(len(features))
        by_text = _by_owner((similarity.topk(10, 0).indices == owners).any(0), owners)
        by_image = (owners[similarity.topk(10, 1).indices] == own[:, None]).any(1)
        return {"r10": (by_text + by_image) / 2}

    return _of_photographs(dense, images[:_PHOTOGRAPHS], images[_PHOTOGRAPHS:], recall)


def neighbors(options: argparse.Namespace) -> Task:
    """CIFAR-10 by the ViT-S/14: classes by a vote of the nearest training images, which the dense model embedded."""
    dense = image_encoder(options.real, SIZE)
    gallery = _cached(options.work / "gallery.pt", lambda: _class_tokens(dense, _by_class(options.cifar / "train")[0]))
    gallery = F.normalize(gallery, dim=-1)
    classes = F.one_hot(_by_class(options.cifar / "train")[1]).float()
    loaders, labels = _by_class(options.cifar / "dev", _PER_CLASS + 1)
    images = _photographs(dense, loaders).unflatten(0, (-1, _PER_CLASS + 1))
    labels = labels.unflatten(0, (-1, _PER_CLASS + 1))[:, :-1].flatten()

    def accuracy(features: Tensor) -> dict[str, Tensor]:
        similarity, nearest = (features @ gallery.T).topk(NEIGHBORS)
        votes = ((similarity * _SHARPNESS).exp()[..., None] * classes[nearest]).sum(1)
        return {"accuracy": votes.argmax(-1) == labels}

    return _of_photographs(dense, images[:, :-1].flatten(0, 1), images[:, -1], accuracy)


def _of_photographs(
    dense: nn.Module, images: Tensor, rest: Tensor, score: Callable[[Tensor], dict[str, Tensor]]
) -> Task:
    """A task of an image encoder of timm: a score of normalized class tokens, and their cosine to the dense model's."""
    batches = images.split(_BATCH)
    before = _outputs(dense, batches, _normalized)

    def scores(features: Tensor) -> dict[str, Tensor]:
        return {**score(features), "cosine": (before * features).sum(-1)}

    def resized(ratio: float) -> tuple[nn.Module, Sequence[Any]]:
        return vp.resized(dense, ratio), batches

    return Task(dense, [rest[:2], rest[2:]], batches, _normalized, scores, resized)


def sentences(options: argparse.Namespace) -> Task:
    """Captions by all-MiniLM-L6-v2: how often the nearest other caption is of the same photograph."""
    from transformers import AutoTokenizer

    tokenizer, dense = AutoTokenizer.from_pretrained(options.real / MINILM), sentence_encoder(options.real)
    records = captions(options.flickr / "dev.json", options.flickr)[: _DESCRIBED + _CALIBRATED]
    texts = [(owner, text) for owner, record in enumerate(records) for text in record.captions[:_TEXTS]]
    owned = [(owner, ids) for (owner, _), ids in zip(texts, tokenizer([t for _, t in texts]).input_ids, strict=True)]
    batches = list(of_one_length(owned[: _DESCRIBED * _TEXTS], 64))
    calibration = [ids for _, ids in of_one_length(owned[_DESCRIBED * _TEXTS :], 64)]
    calibration = sorted(calibration, key=lambda ids: -len(ids))[:_LENGTHS]
    owners, ids = torch.cat([owners for owners, _ in batches]), [ids for _, ids in batches]
    before = _outputs(dense, ids, _pooled)

    def recall(features: Tensor) -> dict[str, Tensor]:
        found = {"r1": hits(features, owners), "neighbors": shared_neighbors(before, features)}
        found["cosine"] = (before * features).sum(-1)
        return {name: _by_owner(values, owners) for name, values in found.items()}

    return Task(dense, calibration, ids, _pooled, recall)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "nlvr": nlvr,
    "retrieval": retrieval,
    "neighbors": neighbors,
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
        return _class_tokens(image_encoder(options.real, SIZE), [record.load_tensor for record in records])

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


def _by_class(folder: Path, count: int | None = None) -> tuple[list[Callable[[Any], Tensor]], Tensor]:
    """Images of a folder that has one folder a class, the first `count` of each, and their classes [images]."""
    folders = sorted(one for one in folder.iterdir() if one.is_dir())
    files = [(label, file) for label, one in enumerate(folders) for file in list_images(one)[:count]]
    loaders = [partial(_loaded, file) for _, file in files]
    return loaders, torch.tensor([label for label, _ in files])


def _loaded(file: Path, prepare: Any) -> Tensor:
    """[1, 3, height, width], as records of photographs load it."""
    return load_tensor(file, prepare)[None]


def _class_tokens(model: nn.Module, loaders: Sequence[Callable[[Any], Tensor]]) -> Tensor:
    """[photographs, dim]: class tokens of many photographs, without normalization."""
    parts = (_photographs(model, part) for part in _batched(loaders, 50))
    return _outputs(model, parts, lambda model, batch: model(batch))


def _shrunk(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images [..., channels, height, width] resized to a smaller height and width, bicubic and antialiased."""
    small = F.interpolate(images.flatten(0, -4), tuple(size), mode="bicubic", antialias=True)
    return small.unflatten(0, images.shape[:-3])


def _photographs(model: nn.Module, loaders: Sequence[Callable[[Any], Tensor]]) -> Tensor:
    """[photographs, 3, height, width], preprocessed as the model wants them."""
    prepare = vp.transforms(model)
    return torch.cat([load(prepare) for load in loaders])


@torch.no_grad()
def _outputs(model: nn.Module, batches: Iterable[Any], embed: Callable[[Any, Any], Tensor]) -> Tensor:
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
