"""Objectives: the training loss of each task."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Captioned, Question, Record, Statement
from ...data.llava import prompt_ids
from ...evaluation.tasks import Caption, Nlvr, Retrieval, Task, Vqa
from ...evaluation.tasks.base import dense
from ...evaluation.tasks.nlvr import PromptedNlvr
from ...models.decoder import next_token_losses
from ...models.momentum import MomentumDistillation, gather_ranks
from ...models.wordpiece import clean_caption

_LABEL_SMOOTHING = 0.1  # of next words, as BLIP trains
_CAPTION_WORDS = 30  # captions are cut there, as BLIP's are
_ANSWER = 2  # tokens of "true" or "false" and the end

Text = TypeVar("Text")


@dataclass(frozen=True)
class Loss:
    """Loss of a batch.

    Args:
        total: [] sum over units.
        count: [] number of units: sentences, words, pairs.
        outputs: [rows, classes] logits to distill; None where there are none to compare.
    """

    total: Tensor
    count: Tensor
    outputs: Tensor | None = None


class Objective(nn.Module, ABC):
    """Training loss of one task.

    `forward` runs each tower of the model first, and once: alignment compares these traces. What is drawn at random, such
    as a caption of several, depends on seed, step and record alone.

    Args:
        task: the task, made for the model.
        model: the model, pruned or dense.
        seed: the run's seed.
    """

    images_per_text: ClassVar[int] = 1

    def __init__(self, task: Task[Any], model: Any, seed: int = 0):
        super().__init__()
        # of the class that the objective is for
        self.task: Any = task
        self.seed = seed

    @abstractmethod
    def forward(self, model: Any, records: Sequence[Any], images: Tensor, step: int) -> Loss:
        """Loss of the records' labels.

        Args:
            model: the model that is trained, or the teacher.
            records: of the batch.
            images: [batch, images a record, 3, height, width].
            step: of the run.

        Returns:
            The sum of the loss, its units, and the logits to distill.
        """

    @abstractmethod
    def check(self, record: Any) -> None:
        """Checks that something can be learned from a record.

        Raises:
            ValueError: its texts have no token ids, or it has none.
        """

    def teacher_logits(self, model: Any, records: Sequence[Any], images: Tensor, step: int) -> Tensor | None:
        """Logits of a teacher for the same batch, as `Loss.outputs`.

        Args:
            model: the teacher.
            records: of the batch.
            images: [batch, images a record, 3, height, width].
            step: of the run; random choices are those of `forward` at this step.

        Returns:
            [rows, classes]; None where there are none to compare.
        """
        return self(model, records, images, step).outputs

    def choose_text(self, record: Record, texts: Sequence[Text], step: int) -> Text:
        """One of several texts of a record, drawn by seed, step and the record's index.

        Args:
            record: whose index is used.
            texts: at least one, with its label or without; of a single one nothing is drawn.
            step: of the run.

        Returns:
            The text.
        """
        if len(texts) == 1:
            return texts[0]
        rng = np.random.default_rng((self.seed, step, record.index))
        return texts[int(rng.integers(len(texts)))]


def _tokenize(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [texts, length] each."""
    ids, mask = tokenizer.encode(texts)
    return ids.to(device), mask.to(device)


class NlvrObjective(Objective):
    """Cross-entropy of true and false (NLVR2); a record's further sentences count like its first.

    Args:
        task, model, seed: as of `Objective`.
    """

    images_per_text = 2

    def check(self, record: Statement) -> None:
        self.task.tokenizer.encode([record.sentence, *(sentence for sentence, _ in record.more)])

    def forward(self, model: Any, records: Sequence[Statement], images: Tensor, step: int) -> Loss:
        labeled = [one for record in records for one in ((record.sentence, record.label), *record.more)]
        ids, mask = _tokenize(self.task.tokenizer, [sentence for sentence, _ in labeled], images.device)
        labels = torch.tensor([label for _, label in labeled], device=images.device)
        logits = model(images, ids, mask)
        return Loss(F.cross_entropy(logits, labels, reduction="sum"), _count(len(labeled), images), logits)


class PromptedNlvrObjective(NlvrObjective):
    """Cross-entropy of the answer behind the prompt, a word and the end, of one of a record's sentences.

    Args:
        task, model, seed: as of `Objective`.
    """

    def forward(self, model: Any, records: Sequence[Statement], images: Tensor, step: int) -> Loss:
        chosen = [self.choose_text(record, ((record.sentence, record.label), *record.more), step) for record in records]
        sentences, answers = zip(*chosen, strict=True)
        ids, mask = (one.to(images.device) for one in prompt_ids(sentences, self.task.rows, answers))
        asked = torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - _ANSWER
        out = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=images.flatten(0, 1),
            labels=ids.masked_fill(asked, -100),
        )
        count = _ANSWER * len(records)
        return Loss(out.loss * count, _count(count, images), out.logits[:, -1 - _ANSWER])


class CaptionObjective(Objective):
    """Cross-entropy of each next word of one of an image's captions, behind the prompt.

    Args:
        task, model, seed: as of `Objective`.
    """

    def __init__(self, task: Task[Any], model: Any, seed: int = 0):
        super().__init__(task, model, seed)
        self.longest = dense(model).decoder.body.position.num_embeddings

    def check(self, record: Captioned) -> None:
        ids, _ = self.task.tokenizer.encode([clean_caption(text, _CAPTION_WORDS) for text in record.captions])
        length = ids.shape[1] + self.task.prompt - 1  # the prompt's first token is the caption's own
        if length > self.longest:
            raise ValueError(
                f"a caption takes {length} positions behind the prompt, and the decoder has {self.longest}"
            )

    def forward(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> Loss:
        texts = [clean_caption(self.choose_text(record, record.captions, step), _CAPTION_WORDS) for record in records]
        ids, mask = _tokenize(self.task.tokenizer, texts, images.device)
        prompt = torch.tensor(dense(model).prompt[1:], device=images.device).expand(len(ids), -1)
        ids, mask = (
            torch.cat([one[:, :1], new, one[:, 1:]], 1) for one, new in ((ids, prompt), (mask, torch.ones_like(prompt)))
        )
        logits = model(images[:, 0], ids, mask)
        costs, counts = next_token_losses(logits, ids, mask, self.task.prompt, _LABEL_SMOOTHING)
        return Loss(costs.sum(), counts.sum(), _next_word_logits(logits, mask, self.task.prompt))


class VqaObjective(Objective):
    """Cross-entropy of the answers that people gave, each weighed by how many did; answers that belong together are one.

    Args:
        task, model, seed: as of `Objective`.
    """

    def check(self, record: Question) -> None:
        if not record.answers:
            raise ValueError("its answers are held back: there is nothing to learn")
        self.task.tokenizer.encode([record.question])
        self.task.answer_tokenizer.encode([*_answers(record)])

    def forward(self, model: Any, records: Sequence[Question], images: Tensor, step: int) -> Loss:
        ids, mask = _tokenize(self.task.tokenizer, [record.question for record in records], images.device)
        rows = [(i, answer, w) for i, record in enumerate(records) for answer, w in _answers(record).items()]
        question, answers, shares = zip(*rows, strict=True)
        answer_ids, answer_mask = _tokenize(self.task.answer_tokenizer, answers, images.device)
        about = torch.tensor(question, device=images.device)
        logits = model(images[:, 0], ids, mask, answer_ids, answer_mask, about)
        costs, _ = next_token_losses(logits, answer_ids, answer_mask, label_smoothing=_LABEL_SMOOTHING)
        total = (costs * torch.tensor(shares, device=images.device)).sum()
        return Loss(total, _count(len(records), images), _next_word_logits(logits, answer_mask, 1))


class ContrastObjective(Objective):
    """Symmetrical cross-entropy of images against texts and back, over the pairs of all processes (CLIP, arXiv 2103.00020).

    Pairs of one image are all right for each other.

    Args:
        task, model, seed: as of `Objective`.
    """

    def check(self, record: Captioned) -> None:
        self.task.encode(record.captions)

    def forward(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> Loss:
        image, text = self._features(model, records, images, step)
        image_ids = _image_ids(records, images)
        truth = (image_ids[:, None] == gather_ranks(image_ids)).to(image.dtype)
        truth = truth / truth.sum(1, keepdim=True)
        logits = self._logits(model, image, text)
        total = F.cross_entropy(logits, truth.repeat(2, 1), reduction="sum") / 2
        return Loss(total, _count(len(records), images), logits)

    def _logits(self, model: Any, image: Tensor, text: Tensor) -> Tensor:
        """Logits of each image's texts, then of each text's images: [2 pairs, pairs of all processes]."""
        return torch.cat([image @ gather_ranks(text).T, text @ gather_ranks(image).T]) * self._scale(model)

    def _scale(self, model: Any) -> Tensor:
        return model.logit_scale.exp()

    def _features(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        texts = self.task.encode([self.choose_text(record, record.captions, step) for record in records])
        image = self.task.image_features(model, images[:, 0])
        return image, self.task.text_features(model, *(part.to(images.device) for part in texts))


class MomentumObjective(ContrastObjective):
    """BLIP's (arXiv 2201.12086, section 3.2): contrast with queues of an EMA model's features, and matching.

    Targets are softened by the EMA model's similarities; `alpha` rises linearly over the first `warmup_steps`.

    Args:
        task, model, seed: as of `Objective`.
    """

    warmup_steps: int = 1000
    alpha: float = 0.4

    def __init__(self, task: Task[Any], model: Any, seed: int = 0):
        super().__init__(task, model, seed)
        self.momentum = MomentumDistillation(model)

    def forward(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> Loss:
        texts = self.task.encode([self.choose_text(record, record.captions, step) for record in records])
        ids, mask = (_pad_to_longest_rank(part.to(images.device)) for part in texts)
        alpha = self.alpha * min(step / self.warmup_steps, 1.0)
        image_ids = _image_ids(records, images)
        contrast, matching = self.momentum(model, images[:, 0], ids, mask, image_ids, alpha)
        return Loss((contrast + matching) * len(records), _count(len(records), images))

    def teacher_logits(self, model: Any, records: Sequence[Captioned], images: Tensor, step: int) -> Tensor:
        """The contrast's logits, for saliency. They are not distilled: this loss has none to compare.

        Args:
            model: the teacher.
            records: of the batch.
            images: [batch, 1, 3, height, width].
            step: of the run; each record's caption is that of `forward` at this step.

        Returns:
            [2 pairs, pairs of all processes]: of each image's texts, then of each text's images.
        """
        return self._logits(model, *self._features(model, records, images, step))

    def _scale(self, model: Any) -> Tensor:
        return 1 / dense(model).temperature


OBJECTIVES: Mapping[type, type[Objective]] = {
    Nlvr: NlvrObjective,
    PromptedNlvr: PromptedNlvrObjective,
    Caption: CaptionObjective,
    Vqa: VqaObjective,
    Retrieval: ContrastObjective,
}


def build_objective(task: Task[Any], model: nn.Module, seed: int = 0) -> Objective:
    """Builds the objective of a task that is made for a model.

    Args:
        task: the task, made for the model; a `Retrieval` whose model has a head gets BLIP's objective.
        model: the model, pruned or dense.
        seed: the run's seed.

    Returns:
        The objective.

    Raises:
        TypeError: the task cannot be trained.
    """
    kind = OBJECTIVES.get(type(task))
    if kind is None:
        can = ", ".join(one.__name__.lower() for one in OBJECTIVES if one is not PromptedNlvr)
        raise TypeError(f"a {type(task).__name__} cannot be trained: {can} can")
    if isinstance(task, Retrieval) and task.has_head:
        kind = MomentumObjective
    return kind(task, model, seed)


def _answers(record: Question) -> Mapping[str, float]:
    """Answers to learn, and how much each counts."""
    return {", ".join(record.answers): record.weight} if record.is_answer_set else record.answer_weights


def _count(n: int, like: Tensor) -> Tensor:
    return torch.tensor(n, device=like.device)


def _image_ids(records: Sequence[Captioned], like: Tensor) -> Tensor:
    """[batch] int64, equal for records of one image (training files of COCO and Flickr30k have an entry a caption)."""
    names = (record.image_name.encode("utf-8", "surrogatepass") for record in records)
    digests = (hashlib.blake2s(name, digest_size=7).digest() for name in names)
    return torch.tensor([int.from_bytes(digest, "big") for digest in digests], device=like.device)


def _pad_to_longest_rank(ids: Tensor) -> Tensor:
    """[texts, length], padded with zeros to the longest of all processes."""
    longest = gather_ranks(torch.tensor([ids.shape[1]], device=ids.device)).amax()
    return F.pad(ids, (0, int(longest) - ids.shape[1]))


def _next_word_logits(logits: Tensor, mask: Tensor, given: int) -> Tensor:
    """The logits [words, vocab_size] of the words behind the first `given`."""
    position = torch.arange(mask.shape[1], device=mask.device)
    return logits[:, :-1][(mask.bool() & (position >= given))[:, 1:]]
