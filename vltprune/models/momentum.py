"""Momentum distillation: the training losses of `BlipRetrieval`, with an EMA model, feature queues and hard negatives.

Li et al., BLIP, arXiv 2201.12086, section 3.2, after ALBEF (Li et al., arXiv 2107.07651, sections 3.2 and 3.3) and MoCo.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from ..core import segments
from ..core.tokens import PackedTokens
from .retrieval import BlipRetrieval


class MomentumDistillation(nn.Module):
    """The losses of a `BlipRetrieval` against an exponential moving average (EMA) of it and queues of that one's features.

    It has no trainable parameters. Its state belongs in a training checkpoint, not in a model.

    Args:
        model: The model to train, dense or pruned; `ema_model` starts as a copy of it.
        queue_size: How many pairs' features are kept; the queues start empty.
        momentum: Decay of the average: ema = momentum * ema + (1 - momentum) * model, once a step.
    """

    image_queue: Tensor
    text_queue: Tensor
    id_queue: Tensor
    enqueued: Tensor

    def __init__(self, model: BlipRetrieval, queue_size: int = 57600, momentum: float = 0.995):
        super().__init__()
        self.ema_model = copy.deepcopy(model).requires_grad_(False)
        self.queue_size, self.momentum = queue_size, momentum
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, torch.zeros(queue_size, model.text_projection.out_features))
        self.register_buffer("id_queue", torch.zeros(queue_size, dtype=torch.int64))
        # how many pairs were ever enqueued
        self.register_buffer("enqueued", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        model: BlipRetrieval,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        alpha: float = 0.4,
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of image-text contrast (ITC) and matching (ITM); update the EMA model and the queues.

        The model's towers run first, each once: the first two traces are those that `losses.alignment` compares.

        Args:
            model: The model that is trained.
            images: [batch, 3, H, W].
            input_ids: Token ids [batch, length], equally long on all ranks.
            attention_mask: [batch, length], nonzero where a token is real.
            image_ids: [batch] int64; pairs of one image are no negatives of each other.
            alpha: Weight of the EMA model's similarities in the targets, 0 .. 1 (ALBEF, eq. 6).

        Returns:
            The two losses, scalars.

        Raises:
            ValueError: If the batch shows one image only, or is larger than the queues.
        """
        memory = model.visual(images)
        image, text = model.project_image_tokens(memory), model.text_features(input_ids, attention_mask)
        temperature = model.temperature.clamp(0.001, 0.5)

        self.update_ema(model)
        ema_image, ema_text = self._ema_features(images, input_ids, attention_mask)
        all_images, all_texts, all_ids = self._with_queues(ema_image, ema_text, image_ids)
        same = (image_ids[:, None] == all_ids).to(image.dtype)
        targets = same / same.sum(1, keepdim=True)
        image_to_text = _contrastive_loss(image, ema_image, all_texts, targets, temperature, alpha)
        text_to_image = _contrastive_loss(text, ema_text, all_images, targets, temperature, alpha)
        self.enqueue(ema_image, ema_text, image_ids)

        negatives = _hard_negatives(image.detach(), text.detach(), image_ids, temperature.detach())
        matching = _matching_loss(model, memory, input_ids, attention_mask, *negatives)
        return (image_to_text + text_to_image) / 2, matching

    @torch.no_grad()
    def update_ema(self, model: BlipRetrieval) -> None:
        """Move the EMA model's parameters towards the model's, by 1 - momentum of the way."""
        for average, parameter in zip(self.ema_model.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, image_ids: Tensor) -> None:
        """Replace the oldest entries of the queues by the features of all ranks.

        Args:
            image: Image features [batch, embed_dim].
            text: Text features [batch, embed_dim].
            image_ids: [batch] int64.

        Raises:
            ValueError: If the queues are shorter than the batch of all ranks.
        """
        image, text, image_ids = (gather_ranks(x) for x in (image, text, image_ids))
        if len(image) > self.queue_size:
            raise ValueError(
                f"queue_size={self.queue_size} cannot hold the {len(image)} pairs of one batch: give a larger one"
            )
        slots = (self.enqueued + torch.arange(len(image), device=image.device)) % self.queue_size
        # autocast may have made the features half
        self.image_queue[slots] = image.to(self.image_queue)
        self.text_queue[slots] = text.to(self.text_queue)
        self.id_queue[slots] = image_ids
        self.enqueued += len(image)

    @torch.no_grad()
    def _ema_features(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.ema_model.image_features(images), self.ema_model.text_features(input_ids, attention_mask)

    def _with_queues(self, image: Tensor, text: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the batch is compared with: itself, then what the queues hold."""
        filled = min(int(self.enqueued), self.queue_size)
        pairs = ((image, self.image_queue), (text, self.text_queue), (image_ids, self.id_queue))
        image, text, image_ids = (torch.cat([new, old[:filled]]) for new, old in pairs)
        return image, text, image_ids


def _contrastive_loss(
    features: Tensor, ema_features: Tensor, candidates: Tensor, targets: Tensor, temperature: Tensor, alpha: float
) -> Tensor:
    """Cross-entropy of features [batch, dim] over candidates [all, dim].

    Targets [batch, all] are mixed with the EMA model's own similarities (ALBEF, eq. 6).
    """
    with torch.no_grad():
        targets = alpha * (ema_features @ candidates.T / temperature).softmax(1) + (1 - alpha) * targets
    return F.cross_entropy(features @ candidates.T / temperature, targets)


def _hard_negatives(image: Tensor, text: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """A negative text for each image, and a negative image for each text, as rows of all ranks: [batch] each.

    They are drawn by similarity; pairs of the same image are left out.
    """
    same_image = ids[:, None] == gather_ranks(ids)
    if same_image.all(1).any():
        raise ValueError(
            "the batch has pairs of one image only, and so no negatives: draw pairs of at least two images"
        )
    negatives = []
    for features, candidates in ((image, gather_ranks(text)), (text, gather_ranks(image))):
        weights = (features @ candidates.T / temperature).masked_fill(same_image, -torch.inf).softmax(1)
        # features may be NaN: then the loss is NaN too, and the step is skipped for it
        is_finite = weights.isfinite().all(1, keepdim=True)
        weights = torch.where(is_finite, weights, (~same_image).to(weights))
        negatives.append(torch.multinomial(weights, 1).squeeze(1))
    return negatives[0], negatives[1]


def _matching_loss(
    model: BlipRetrieval,
    memory: Tensor | PackedTokens,
    input_ids: Tensor,
    attention_mask: Tensor,
    negative_text: Tensor,
    negative_image: Tensor,
) -> Tensor:
    """Cross-entropy of the matching head on each pair, each image with another text, and each text with another image."""
    memories = _gather_memory(memory)
    other = (
        memories.select_instances(negative_image.tolist())
        if isinstance(memories, PackedTokens)
        else memories[negative_image]
    )
    texts = gather_ranks(input_ids)[negative_text], gather_ranks(attention_mask)[negative_text]
    logits = torch.cat(
        [
            model.match(memory, input_ids, attention_mask),
            model.match(memory, *texts),
            model.match(other, input_ids, attention_mask),
        ]
    )
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels[: len(input_ids)] = 1
    return F.cross_entropy(logits, labels)


def gather_ranks(x: Tensor) -> Tensor:
    """Concatenate x [batch, ...] of all ranks, with gradients: [batch of all ranks, ...]; in a single process, x itself."""
    return torch.cat(all_gather(x.contiguous())) if _is_distributed() else x


def _gather_memory(memory: Tensor | PackedTokens) -> Tensor | PackedTokens:
    """The image tokens of all ranks. Packed ones are padded on the way, since ranks hold differently many."""
    if not _is_distributed():
        return memory
    if not isinstance(memory, PackedTokens):
        return gather_ranks(memory)
    layout = memory.layout
    longest = torch.tensor(layout.longest, device=layout.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padding = (0, int(longest) - layout.longest)
    real = gather_ranks(F.pad(layout.valid, padding))

    def gather_column(column: Tensor | None) -> Tensor | None:
        return None if column is None else gather_ranks(F.pad(segments.pad(column, layout), padding))[real]

    tokens = PackedTokens.pack(gather_ranks(F.pad(memory.unpack()[0], (0, 0, *padding))), real)
    keep_prob, counted_prob = gather_column(memory.keep_prob), gather_column(memory.counted_prob)
    return replace(tokens, keep_prob=keep_prob, counted_prob=counted_prob)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
