"""Texts of prompts, which guides compare with visual tokens before the language model reads both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ....core import precision, segments
from ....core.layout import Layout
from ....layers import set_query


@dataclass(frozen=True)
class PromptTexts:
    """The text of each prompt of a call, and which prompt each visual token of a modality is of.

    Attributes:
        embedding: [prompts, dim], mean of the normalized embeddings of a prompt's words: the cosine to it ranks as the mean
            cosine to the words does.
        prompt: [placeholders] int64, the prompt of each placeholder of the modality.
    """

    embedding: Tensor
    prompt: Tensor

    def of(self, lengths: Sequence[int] | Tensor) -> Tensor:
        """The text of each image.

        Args:
            lengths: Visual tokens of each image before pruning, or of what else is one instance.

        Returns:
            [images, 1, dim]; zeros where prompts have another number of placeholders.
        """
        ends = torch.as_tensor(lengths, device=self.prompt.device).cumsum(0)
        if int(ends[-1]) != len(self.prompt):
            # such inputs are refused where prompts are shortened
            return self.embedding.new_zeros(len(ends), 1, self.embedding.shape[1])
        # of an instance without tokens any
        last = self.prompt[(ends - 1).clamp(min=0)]
        return self.embedding[last][:, None]


def read_texts(embed: Any, given: Mapping[str, Any], placeholders: Mapping[str, int], modality: str) -> PromptTexts:
    """Embed the texts of prompts.

    Words behind which an answer begins are text, and the answer, which labels mark, is not.

    Args:
        embed: The embedding layer of the language model.
        given: The inputs of a call by name: `input_ids` and `attention_mask`, and `labels` where there are any.
        placeholders: The ids of placeholders by modality.
        modality: The modality whose visual tokens are compared.

    Returns:
        The texts.
    """
    ids, labels = given["input_ids"], given.get("labels")
    is_text = given["attention_mask"] != 0
    for place in placeholders.values():
        is_text = is_text & (ids != place)
    if labels is not None:
        asked = is_text & (labels == -100)
        is_text = torch.where(asked.any(1, keepdim=True), asked, is_text)
    layout = Layout(is_text.sum(1).tolist(), ids.device)
    with precision.without_autocast(ids.device):
        words = functional.normalize(precision.single(embed(ids[is_text])), dim=-1)
    total = segments.sum(words, layout)
    return PromptTexts(total / layout.sizes.clamp(min=1)[:, None], (ids == placeholders[modality]).nonzero()[:, 0])


def compared(
    texts: PromptTexts | None, lengths: Sequence[int] | Tensor, project: Callable[[Tensor], Tensor]
) -> AbstractContextManager[None]:
    """Give images the texts of their prompts as queries within the `with` block.

    Args:
        texts: The texts; None leaves the query as it is.
        lengths: As `PromptTexts.of` takes it.
        project: What maps contents of tokens into the space of the language model's embeddings.

    Returns:
        The context.
    """
    return nullcontext() if texts is None else set_query(texts.of(lengths), project)
