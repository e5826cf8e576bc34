"""Training losses of the tasks: records and images in, the loss of their labels out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Captioned, Question, Record, Statement
from ...evaluation.tasks import Caption, Nlvr, Retrieval, Vqa
from ...evaluation.tasks.base import dense
from ...models.decoder import next_token_losses
from ...models.momentum import MomentumDistillation, gather_ranks
from ...models.wordpiece import clean_caption

_SMOOTHING, _WORDS = 0.1, 30  # of the words' labels; what captions are cut at: both as BLIP trains


@dataclass(frozen=True)
class Loss:
    """total: a sum over `count` units (sentences, words, pairs); outputs [rows, classes]: logits that a teacher can teach."""

    total: Tensor
    count: Tensor
    outputs: Tensor | None = None


class Objective(nn.Module, ABC):
    """One task's loss. Its forward runs each tower of the model first, and once: the traces that alignment compares.

    What it draws (a caption of several) depends on seed, step and record alone. `images`: how many a text speaks of.
    """

    images: ClassVar[int] = 1

    def __init__(self, task: Any, model: Any, seed: int = 0):
        super().__init__()
        self.task, self.seed = task, seed

    @abstractmethod
    def forward(self, model: Any, records: Sequence[Any], images: Tensor, step: int) -> Loss:
        """images [batch, images a record, 3, height, width]."""

    @abstractmethod
    def check(self, record: Any) -> None:
        """ValueError for a record that nothing can be learned from: its texts have no token ids, or it has none."""

    def teach(self, model: Any, records: Sequence[Any], images: Tensor, step: int) -> Tensor | None:
        """What a teacher says of the same: logits as `Loss.outputs`."""
        return self(model, records, images, step).outputs

    def choose(self, record: Record, several: Sequence[str], step: int) -> str:
        """One text of several."""
        if len(several) == 1:
            return several[0]
        return several[int(np.random.default_rng((self.seed, step, record.index)).integers(len(several)))]

    def encode(self, words: Any, texts: Sequence[str], like: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = words.encode(texts)
        return ids.to(like.device), mask.to(like.device)


class NlvrObjective(Objective):
    """Cross-entropy of true and false; a record's further sentences count like its first."""

    images = 2

    def check(self, record: Statement) -> None:
        self.task.tokenizer.encode([record.sentence, *(sentence for sentence, _ in record.more)])

    def forward(self, model: Any, records: Sequence[Statement], images: Tensor, step: int) -> Loss:
        said = [one for record in records for one in ((record.sentence, record.label), *record.more)]
        ids, mask = self.encode(self.task.tokenizer, [sentence for sentence, _ in said], images)
        labels = torch.tensor([label for _, label in said], device=images.device)
        logits = model(images, ids, mask)
        return Loss(F.cross_entropy(logits, labels, reduction="sum"), _number(len(said), images), logits)


class CaptionObjective(Objective):
    """Cross-entropy of each next word of one of an image's captions, behind the prompt."""

    def __init__(self, task: Any, model: Any, seed: int = 0):
        super().__init__(task, model, seed)
        self.longest = dense(model).decoder.body.position.num_embeddings

    def check(self, record: Captioned) -> None:
        ids, _ = self.task.tokenizer.encode([clean_caption(text, _WORDS) for text in record.captions])
        length = ids.shape[1] + self.task.prompt - 1  # the prompt's first token is the caption's own
        if length > self.longest:
            raise ValueError(
                f"a caption takes {length} positions behind the prompt, and the decoder has {self.longest}"
            )

    def forward(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> Loss:
        texts = [clean_caption(self.choose(record, record.captions, step), _WORDS) for record in records]
        ids, mask = self.encode(self.task.tokenizer, texts, images)
        prompt = torch.tensor(dense(model).prompt[1:], device=images.device).expand(len(ids), -1)
        ids, mask = (
            torch.cat([one[:, :1], new, one[:, 1:]], 1) for one, new in ((ids, prompt), (mask, torch.ones_like(prompt)))
        )
        logits = model(images[:, 0], ids, mask)
        costs, counts = next_token_losses(logits, ids, mask, self.task.prompt, _SMOOTHING)
        return Loss(costs.sum(), counts.sum(), _asked(logits, mask, self.task.prompt))


class VqaObjective(Objective):
    """Cross-entropy of the answers that people gave, each weighed by how many did; answers that belong together are one."""

    def check(self, record: Question) -> None:
        if not record.answers:
            raise ValueError("its answers are held back: there is nothing to learn")
        self.task.tokenizer.encode([record.question])
        self.task.answer_tokenizer.encode([*_answers(record)])

    def forward(self, model: Any, records: Sequence[Question], images: Tensor, step: int) -> Loss:
        ids, mask = self.encode(self.task.tokenizer, [record.question for record in records], images)
        rows = [(i, answer, w) for i, record in enumerate(records) for answer, w in _answers(record).items()]
        question, answers, shares = zip(*rows, strict=True)
        answer_ids, answer_mask = self.encode(self.task.answer_tokenizer, answers, images)
        about = torch.tensor(question, device=images.device)
        logits = model(images[:, 0], ids, mask, answer_ids, answer_mask, about)
        costs, _ = next_token_losses(logits, answer_ids, answer_mask, label_smoothing=_SMOOTHING)
        total = (costs * torch.tensor(shares, device=images.device)).sum()
        return Loss(total, _number(len(records), images), _asked(logits, answer_mask, 1))


class ContrastObjective(Objective):
    """Symmetrical cross-entropy of images against texts and back, over the pairs of all processes (CLIP, arXiv 2103.00020).

    Pairs of one image are all right for each other.
    """

    def check(self, record: Captioned) -> None:
        self.task.encode(record.captions)

    def forward(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> Loss:
        image, text = self._features(model, records, images, step)
        numbers = _image_numbers(records, images)
        truth = (numbers[:, None] == gather_ranks(numbers)).to(image.dtype)
        truth = truth / truth.sum(1, keepdim=True)
        rows = self._rows(model, image, text)
        total = F.cross_entropy(rows, truth.repeat(2, 1), reduction="sum") / 2
        return Loss(total, _number(len(records), images), rows)

    def _rows(self, model: Any, image: Tensor, text: Tensor) -> Tensor:
        """Logits of each image's texts, then of each text's images: [2 pairs, pairs of all processes]."""
        return torch.cat([image @ gather_ranks(text).T, text @ gather_ranks(image).T]) * self._scale(model)

    def _scale(self, model: Any) -> Tensor:
        return model.logit_scale.exp()

    def _features(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        texts = self.task.encode([self.choose(record, record.captions, step) for record in records])
        image = self.task.image_features(model, images[:, 0])
        return image, self.task.text_features(model, *(part.to(images.device) for part in texts))


class MomentumObjective(ContrastObjective):
    """BLIP's: contrast against a slow copy and its queues, and matching with hard negatives.

    Targets are softened by the slow copy's own similarities, the more the further the first `warm` steps have gone.
    """

    warm: int = 1000
    alpha: float = 0.4

    def __init__(self, task: Any, model: Any, seed: int = 0):
        super().__init__(task, model, seed)
        self.momentum = MomentumDistillation(model)

    def forward(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> Loss:
        texts = self.task.encode([self.choose(record, record.captions, step) for record in records])
        ids, mask = (_pad_to_longest_rank(part.to(images.device)) for part in texts)
        alpha = self.alpha * min(step / self.warm, 1.0)
        numbers = _image_numbers(records, images)
        contrast, matching = self.momentum(model, images[:, 0], ids, mask, numbers, alpha)
        return Loss((contrast + matching) * len(records), _number(len(records), images))

    def teach(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> Tensor:
        """The contrast's logits: what tokens matter to. They are not distilled, for this loss has none to compare."""
        return self._rows(model, *self._features(model, records, images, step))

    def _scale(self, model: Any) -> Tensor:
        return 1 / dense(model).temperature


OBJECTIVES: Mapping[type, type[Objective]] = {
    Nlvr: NlvrObjective,
    Caption: CaptionObjective,
    Vqa: VqaObjective,
    Retrieval: ContrastObjective,
}


def objective_of(task: Any, model: nn.Module, seed: int = 0) -> Objective:
    """The objective of a task that is set to a model. TypeError for a task that cannot be trained."""
    kind = OBJECTIVES.get(type(task))
    if kind is None:
        can = ", ".join(one.__name__.lower() for one in OBJECTIVES)
        raise TypeError(f"a {type(task).__name__} cannot be trained: {can} can")
    if isinstance(task, Retrieval) and task.has_head:
        kind = MomentumObjective
    return kind(task, model, seed)


def _answers(record: Question) -> Mapping[str, float]:
    """What is to be said, and how much each counts."""
    return {", ".join(record.answers): record.weight} if record.is_answer_set else record.answer_weights


def _number(n: int, like: Tensor) -> Tensor:
    return torch.tensor(n, device=like.device)


def _image_numbers(records: Sequence[Captioned], like: Tensor) -> Tensor:
    """[batch] int64, equal for records of one image (training files of COCO and Flickr30k have an entry a caption)."""
    names = (record.image_name.encode("utf-8", "surrogatepass") for record in records)
    digests = (hashlib.blake2s(name, digest_size=7).digest() for name in names)
    return torch.tensor([int.from_bytes(digest, "big") for digest in digests], device=like.device)


def _pad_to_longest_rank(ids: Tensor) -> Tensor:
    """[texts, length], padded with zeros to the longest of all processes."""
    longest = gather_ranks(torch.tensor([ids.shape[1]], device=ids.device)).amax()
    return F.pad(ids, (0, int(longest) - ids.shape[1]))


def _asked(logits: Tensor, mask: Tensor, given: int) -> Tensor:
    """The logits [words, vocab_size] of the words that are asked for."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return logits[:, :-1][(mask.bool() & (place >= given))[:, 1:]]
