"""Training of `BlipRetrieval`: momentum distillation, feature queues, hard negatives.

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


class Momentum(nn.Module):
    """A slow copy of a BlipRetrieval, dense or pruned, and queues of its features. Called, it gives the training losses.

    queue: features of how many pairs are kept, of which none are there at first; momentum: how much of itself the copy
    keeps each time it follows. It has no trainable parameters; its state belongs in a training checkpoint, not in a model.
    """

    images: Tensor
    texts: Tensor
    ids: Tensor
    written: Tensor

    def __init__(self, model: BlipRetrieval, queue: int = 57600, momentum: float = 0.995):
        super().__init__()
        self.slow = copy.deepcopy(model).requires_grad_(False)
        self.queue, self.momentum = queue, momentum
        for name in ("images", "texts"):
            self.register_buffer(name, torch.zeros(queue, model.text_projection.out_features))
        self.register_buffer("ids", torch.zeros(queue, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        model: BlipRetrieval,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        alpha: float = 0.4,
    ) -> tuple[Tensor, Tensor]:
        """The losses of contrast (ITC) and of matching (ITM), two scalars, on a batch of pairs.

        images [batch, 3, H, W]; input_ids, attention_mask [batch, length], on all ranks equally long; image_ids [batch]
        int64: pairs of one image are no negatives of each other. alpha: how much of the targets are the slow copy's own
        similarities. The copy follows the model, and its features enter the queues. The model's towers run first, each
        once, and so the first two traces are those that `losses.alignment` compares. ValueError for a batch of one image.
        """
        memory = model.visual(images)
        image, text = model.features_of(memory), model.text_features(input_ids, attention_mask)
        temperature = model.temperature.clamp(0.001, 0.5)

        self.follow(model)
        slow_image, slow_text = self._slow_features(images, input_ids, attention_mask)
        all_images, all_texts, all_ids = self._with_queues(slow_image, slow_text, image_ids)
        same = (image_ids[:, None] == all_ids).to(image.dtype)
        truth = same / same.sum(1, keepdim=True)
        of_images = _contrast(image, slow_image, all_texts, truth, temperature, alpha)
        of_texts = _contrast(text, slow_text, all_images, truth, temperature, alpha)
        self.enqueue(slow_image, slow_text, image_ids)

        negatives = _hard_negatives(image.detach(), text.detach(), image_ids, temperature.detach())
        matching = _matching(model, memory, input_ids, attention_mask, *negatives)
        return (of_images + of_texts) / 2, matching

    @torch.no_grad()
    def follow(self, model: BlipRetrieval) -> None:
        """The copy moves towards the model, by 1 - momentum of the way."""
        for slow, fast in zip(self.slow.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, image_ids: Tensor) -> None:
        """Features [batch, embed_dim] and ids [batch] of all ranks take the places of the oldest."""
        image, text, image_ids = everyones(image), everyones(text), everyones(image_ids)
        if len(image) > self.queue:
            raise ValueError(f"queue={self.queue} cannot hold the {len(image)} pairs of one batch: give a longer one")
        place = (self.written + torch.arange(len(image), device=image.device)) % self.queue
        self.images[place], self.texts[place] = (
            image.to(self.images),
            text.to(self.texts),
        )  # autocast may have made them half
        self.ids[place] = image_ids
        self.written += len(image)

    @torch.no_grad()
    def _slow_features(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.slow.image_features(images), self.slow.text_features(input_ids, attention_mask)

    def _with_queues(self, image: Tensor, text: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the batch is compared with: itself, then what the queues hold."""
        there = min(int(self.written), self.queue)
        pairs = ((image, self.images), (text, self.texts), (image_ids, self.ids))
        image, text, image_ids = (torch.cat([new, old[:there]]) for new, old in pairs)
        return image, text, image_ids


def _contrast(
    features: Tensor, slow: Tensor, others: Tensor, truth: Tensor, temperature: Tensor, alpha: float
) -> Tensor:
    """Cross-entropy of features [batch, dim] against others [all, dim]. Targets: truth [batch, all], softened by `slow`."""
    with torch.no_grad():
        targets = alpha * (slow @ others.T / temperature).softmax(1) + (1 - alpha) * truth
    return F.cross_entropy(features @ others.T / temperature, targets)


def _hard_negatives(image: Tensor, text: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair a text that its image, and an image that its text, is likely to be taken for: [batch] each.

    Drawn from the pairs of all ranks by similarity, those of the same image left out.
    """
    same = ids[:, None] == everyones(ids)
    if same.all(1).any():
        raise ValueError(
            "the batch has pairs of one image only, and so no negatives: draw pairs of at least two images"
        )
    drawn = []
    for features, others in ((image, everyones(text)), (text, everyones(image))):
        chances = (features @ others.T / temperature).masked_fill(same, -torch.inf).softmax(1)
        legible = chances.isfinite().all(
            1, keepdim=True
        )  # features may be NaN: the loss is then, and it is skipped as such
        drawn.append(torch.multinomial(torch.where(legible, chances, (~same).to(chances)), 1).squeeze(1))
    return drawn[0], drawn[1]


def _matching(
    model: BlipRetrieval,
    memory: Tensor | PackedTokens,
    input_ids: Tensor,
    attention_mask: Tensor,
    negative_text: Tensor,
    negative_image: Tensor,
) -> Tensor:
    """Cross-entropy of the matching head on each pair, each image with another text, and each text with another image."""
    others = _everyones_memory(memory)
    other = others.of(negative_image.tolist()) if isinstance(others, PackedTokens) else others[negative_image]
    texts = everyones(input_ids)[negative_text], everyones(attention_mask)[negative_text]
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


def everyones(x: Tensor) -> Tensor:
    """x [batch, ...] of all ranks, one after another, with gradients; x itself in a single process."""
    return torch.cat(all_gather(x.contiguous())) if _is_distributed() else x


def _everyones_memory(memory: Tensor | PackedTokens) -> Tensor | PackedTokens:
    """The image tokens of all ranks. Packed ones travel padded, since ranks hold differently many."""
    if not _is_distributed():
        return memory
    if not isinstance(memory, PackedTokens):
        return everyones(memory)
    layout = memory.layout
    longest = torch.tensor(layout.longest, device=layout.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    room = (0, int(longest) - layout.longest)
    real = everyones(F.pad(layout.real, room))

    def of_all(column: Tensor | None) -> Tensor | None:
        return None if column is None else everyones(F.pad(segments.pad(column, layout), room))[real]

    tokens = PackedTokens.pack(everyones(F.pad(memory.unpack()[0], (0, 0, *room))), real)
    return replace(tokens, keep_prob=of_all(memory.keep_prob), counted_prob=of_all(memory.counted_prob))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
