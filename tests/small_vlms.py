"""Small vision-language models of transformers, and prompts for them: images, one text after the other, padded at the left."""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
        draw: Makes pixels and what goes with them, from the number of images in each prompt.
        types: The name of the input that tells visual tokens apart; None for models without one.
    """

    model: Any
    rows: int
    first: int
    draw: Callable[[list[int]], dict[str, Tensor]]
    types: str | None = None

    def prompts(self, *texts: tuple[int, ...]) -> dict[str, Tensor]:
        """Inputs for prompts, padded at the left. Each is numbers of words, between which images stand: (3, 4) has one."""
        ids = [self._ids(words) for words in texts]
        longest = max(map(len, ids))
        mask = torch.stack([torch.arange(longest) >= longest - len(one) for one in ids]).long()
        padded = torch.stack([torch.cat([torch.zeros(longest - len(one), dtype=torch.int64), one]) for one in ids])
        numbers = [len(words) - 1 for words in texts]
        inputs = {"input_ids": padded, "attention_mask": mask, **(self.draw(numbers) if sum(numbers) else {})}
        return inputs if self.types is None else {**inputs, self.types: (padded == IMAGE_ID).long()}

    def _ids(self, words: tuple[int, ...]) -> Tensor:
        parts = [torch.randint(1, IMAGE_ID, (words[0],))]
        for number in words[1:]:
            parts += [torch.full((self.rows,), IMAGE_ID), torch.randint(1, IMAGE_ID, (number,))]
        return torch.cat(parts)

    def pruned(self, preset: str = "divprune", **parts: Any) -> Any:
        return vp.prune(self.model, preset, **parts)

    def visible(self, inputs: dict[str, Tensor], trace: vp.PruneTrace) -> Tensor:
        """The attention mask [batch, length] of the dense model that hides what a pruned tower dropped."""
        before, tokens = trace.input_tokens, trace.output_tokens
        kept = torch.zeros(before.layout.total, dtype=torch.int64)
        kept[before.layout.starts[tokens.layout.instance] + tokens.position] = 1
        return inputs["attention_mask"].masked_scatter(
            inputs["input_ids"] == IMAGE_ID, kept[before.position >= self.first]
        )

    def positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """The positions of the whole prompt, as `generate` of the dense model counts them."""
        return self.model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))


class ShuffledVlm(Vlm):
    """One whose image tower has a class token, which no token behind its projector is."""

    def visible(self, inputs: dict[str, Tensor], trace: vp.PruneTrace) -> Tensor:
        first = trace.input_tokens.layout.longest - self.rows
        return dataclasses.replace(Vlm(**vars(self)), first=first).visible(inputs, trace)


class TiledVlm(Vlm):
    """One whose image tower sees three tiles of each image, of 16 patches each."""

    def visible(self, inputs: dict[str, Tensor], trace: vp.PruneTrace) -> Tensor:
        if trace.input_tokens.layout.batch != 3 * len(inputs["image_sizes"]):
            return super().visible(inputs, trace)
        patches = torch.zeros(trace.input_tokens.layout.batch, trace.input_tokens.layout.longest, 1)
        patches[trace.output_tokens.layout.instance, trace.output_tokens.position] = 1
        options = {"image_sizes": inputs["image_sizes"], "image_newline": torch.ones(1)}
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
            if name in inspect.signature(self.model.base_model.pack_image_features).parameters:
                options[name] = getattr(self.model.config, name)
        rows = torch.cat(self.model.base_model.pack_image_features(patches[:, -16:].split(3), **options)[0])
        return inputs["attention_mask"].masked_scatter(inputs["input_ids"] == IMAGE_ID, rows[:, 0].long())


def ready(model: Any) -> Any:
    """The model with random weights, that generates as many tokens as it is asked for."""
    scrambled(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def pixels(numbers: list[int]) -> dict[str, Tensor]:
    return {"pixel_values": images(sum(numbers))}


def samples(numbers: list[int]) -> dict[str, Tensor]:
    """The images of each prompt in a row, and empty ones behind them."""
    there = torch.arange(max(numbers)) < torch.tensor(numbers)[:, None]
    return {"pixel_values": images(len(numbers), max(numbers)) * there[..., None, None, None]}


def llava(implementation: str = "sdpa", tower: str = "clip", text: Any = None, **options: Any) -> Vlm:
    config = hf.CLIPVisionConfig(**TOWER) if tower == "clip" else hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    strategy = {"vision_feature_select_strategy": "default" if tower == "clip" else "full", **options}
    config = hf.LlavaConfig(
        vision_config=config,
        text_config=hf.LlamaConfig(**LLAMA) if text is None else text,
        image_token_index=IMAGE_ID,
        image_seq_length=16,
        **strategy,
    )
    model = ready(hf.LlavaForConditionalGeneration(config))
    model.set_attn_implementation(implementation)
    is_full = strategy["vision_feature_select_strategy"] == "full"
    has_class = tower == "clip"
    rows = 16 + int(has_class and is_full)
    return Vlm(model, rows, int(has_class and not is_full), pixels)


ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
QWEN_TEXT = {**LLAMA, "rope_parameters": ROPE}
QWEN_IDS = {"image_token_id": IMAGE_ID, "video_token_id": 111, "vision_start_token_id": 112, "vision_end_token_id": 113}
QWEN_TOWER = {"num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def grids(numbers: list[int]) -> dict[str, Tensor]:
    """Patches of images of 4 x 6, of which 2 x 2 become a visual token."""
    number = sum(numbers)
    return {"pixel_values": torch.randn(24 * number, 96), "image_grid_thw": torch.tensor([[1, 4, 6]] * number)}


def qwen2() -> Vlm:
    vision = {**QWEN_TOWER, "depth": 2, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return Vlm(ready(hf.Qwen2VLForConditionalGeneration(config)), 6, 0, grids, "mm_token_type_ids")


def qwen2_5() -> Vlm:
    vision = {**QWEN_TOWER, "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return Vlm(ready(hf.Qwen2_5_VLForConditionalGeneration(config)), 6, 0, grids, "mm_token_type_ids")


def qwen3() -> Vlm:
    vision = {**QWEN_TOWER, "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = {**QWEN_TEXT, "head_dim": 12, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return Vlm(ready(hf.Qwen3VLForConditionalGeneration(config)), 6, 0, grids, "mm_token_type_ids")


def internvl() -> Vlm:
    vision = {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}
    text = {**LLAMA, "model_type": "qwen2"}
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, image_seq_length=4)
    model = ready(hf.InternVLForConditionalGeneration(config))
    return ShuffledVlm(model, 4, 0, pixels)


def smolvlm(kind: str = "SmolVLM") -> Vlm:
    text = {**LLAMA, "model_type": "llama"}
    config = getattr(hf, f"{kind}Config")(
        vision_config=TOWER, text_config=text, image_token_id=IMAGE_ID, scale_factor=2
    )
    model = ready(getattr(hf, f"{kind}ForConditionalGeneration")(config))
    return Vlm(model, 4, 0, samples)


def paligemma(**options: Any) -> Vlm:
    vision = {**TOWER, "projection_dim": 48, "vision_use_head": False}
    text = {**LLAMA, "model_type": "gemma", "head_dim": 12, **options}
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, projection_dim=48)
    return Vlm(ready(hf.PaliGemmaForConditionalGeneration(config)), 16, 0, pixels, "token_type_ids")


def gemma3(window: int = 64) -> Vlm:
    text = {**LLAMA, "head_dim": 12, "sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {**TOWER, "vision_use_head": False}
    config = hf.Gemma3Config(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, mm_tokens_per_image=4)
    return Vlm(ready(hf.Gemma3ForConditionalGeneration(config)), 4, 0, pixels, "token_type_ids")


def tiles(numbers: list[int]) -> dict[str, Tensor]:
    """Images of 32 x 64: two tiles each, and the whole one scaled down."""
    number = sum(numbers)
    return {"pixel_values": images(number, 3), "image_sizes": torch.tensor([[32, 64]] * number)}


def llava_next() -> Vlm:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER),
        text_config=hf.LlamaConfig(**LLAMA),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    return TiledVlm(ready(hf.LlavaNextForConditionalGeneration(config)), 16 + 4 * 9, 0, tiles)


def llava_onevision() -> Vlm:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=hf.Qwen2Config(**LLAMA),
        image_token_index=IMAGE_ID,
        video_token_index=111,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        vision_feature_layer=-1,
    )
    return TiledVlm(ready(hf.LlavaOnevisionForConditionalGeneration(config)), 16 + 4 * 9, 0, tiles)


VLMS: dict[str, Callable[[], Vlm]] = {
    "llava": llava,
    "llava eager": functools.partial(llava, "eager"),
    "llava full": functools.partial(llava, vision_feature_select_strategy="full"),
    "llava last": functools.partial(llava, vision_feature_layer=-1),
    "llava siglip": functools.partial(llava, tower="siglip"),
    "qwen2": qwen2,
    "qwen2.5": qwen2_5,
    "qwen3": qwen3,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "idefics3": functools.partial(smolvlm, "Idefics3"),
    "paligemma": paligemma,
    "gemma3": gemma3,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
}
# presets and parts that run inside towers whose patches become visual tokens in groups
INSIDE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tome", {}),
    ("divprune", {"place": "block", "at": (0,)}),
    ("hiprune", {}),
    ("random", {"scorer": "column_attention", "reducer": "fuse", "at": (0, 1)}),
    ("madtp", {"scorer": "alignment", "at": (1,)}),
    ("pooling", {}),
)
QWEN2_WINDOW = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
# language models with sliding windows that are shorter than prompts
WINDOWED: dict[str, Callable[[], Vlm]] = {
    "gemma3 window": functools.partial(gemma3, 7),
    "mistral window": lambda: llava(text=hf.MistralConfig(**LLAMA, sliding_window=12)),
    "mistral window eager": lambda: llava("eager", text=hf.MistralConfig(**LLAMA, sliding_window=12)),
    "qwen2 window": lambda: llava(text=hf.Qwen2Config(**LLAMA, **QWEN2_WINDOW)),
    "paligemma2 window": functools.partial(paligemma, model_type="gemma2", sliding_window=9),
}


@functools.cache
def make(name: str) -> Vlm:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (VLMS | WINDOWED)[name]()
