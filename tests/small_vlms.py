"""Small vision-language models of transformers, and prompts for them: images, one text after the other, padded at the left."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from small_models import images, scrambled
from torch import Tensor

import vltprune as vp

IMAGE_ID, VOCAB = 110, 120
STEPS = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Vlm:
    """A dense model, and what makes its inputs.

    Attributes:
        model: The dense model.
        rows: Visual tokens of an image.
        first: The position that a tower's trace gives the first of them.
        draw: Makes pixels and what goes with them, for a number of images.
    """

    model: Any
    rows: int
    first: int
    draw: Callable[[int], dict[str, Tensor]]

    def prompts(self, *texts: tuple[int, ...]) -> dict[str, Tensor]:
        """Inputs for prompts, padded at the left. Each is numbers of words, between which images stand: (3, 4) has one."""
        ids = [self._ids(words) for words in texts]
        longest = max(map(len, ids))
        mask = torch.stack([torch.arange(longest) >= longest - len(one) for one in ids]).long()
        padded = torch.stack([torch.cat([torch.zeros(longest - len(one), dtype=torch.int64), one]) for one in ids])
        number = sum(len(words) - 1 for words in texts)
        return {"input_ids": padded, "attention_mask": mask, **(self.draw(number) if number else {})}

    def _ids(self, words: tuple[int, ...]) -> Tensor:
        parts = [torch.randint(1, IMAGE_ID, (words[0],))]
        for number in words[1:]:
            parts += [torch.full((self.rows,), IMAGE_ID), torch.randint(1, IMAGE_ID, (number,))]
        return torch.cat(parts)

    def pruned(self, preset: str = "divprune", **parts: Any) -> Any:
        return vp.prune(self.model, preset, **parts)

    def visible(self, inputs: dict[str, Tensor], trace: vp.PruneTrace) -> Tensor:
        """The attention mask [batch, length] of the dense model that hides what a pruned tower dropped."""
        tokens, ids = trace.output_tokens, inputs["input_ids"]
        kept = torch.zeros(tokens.layout.batch, self.first + self.rows, dtype=torch.int64)
        kept[tokens.layout.instance, tokens.position] = 1
        return inputs["attention_mask"].masked_scatter(ids == IMAGE_ID, kept[:, self.first :].flatten())

    def positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """The positions of the whole prompt, as `generate` of the dense model counts them."""
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def ready(model: Any) -> Any:
    """The model with random weights, that generates as many tokens as it is asked for."""
    scrambled(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def llava(implementation: str = "sdpa", tower: str = "clip", **options: Any) -> Vlm:
    config = hf.CLIPVisionConfig(**TOWER) if tower == "clip" else hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    strategy = {"vision_feature_select_strategy": "default" if tower == "clip" else "full", **options}
    config = hf.LlavaConfig(
        vision_config=config,
        text_config=hf.LlamaConfig(**LLAMA),
        image_token_index=IMAGE_ID,
        image_seq_length=16,
        **strategy,
    )
    model = ready(hf.LlavaForConditionalGeneration(config))
    model.set_attn_implementation(implementation)
    is_full = strategy["vision_feature_select_strategy"] == "full"
    has_class = tower == "clip"
    rows = 16 + int(has_class and is_full)
    return Vlm(model, rows, int(has_class and not is_full), lambda number: {"pixel_values": images(number)})


VLMS: dict[str, Callable[[], Vlm]] = {
    "llava": llava,
    "llava eager": functools.partial(llava, "eager"),
    "llava full": functools.partial(llava, vision_feature_select_strategy="full"),
    "llava last": functools.partial(llava, vision_feature_layer=-1),
    "llava siglip": functools.partial(llava, tower="siglip"),
}


@functools.cache
def make(name: str) -> Vlm:
    torch.manual_seed(0)
    return VLMS[name]()
