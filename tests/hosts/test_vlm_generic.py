"""Vision-language models that have no composite of their own: pruned between image tower and language model, by contents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from small_vlms import (
    IMAGE_ID,
    LLAMA,
    QWEN_IDS,
    QWEN_TEXT,
    QWEN_TOWER,
    ROPE,
    STEPS,
    TOWER,
    Vlm,
    grids,
    pixels,
    ready,
    samples,
    tiles,
)
from torch import Tensor

import vltprune as vp

SIGLIP = {**TOWER, "vision_use_head": False}
ROTARY = {**LLAMA, "head_dim": 12, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
MERGED = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48}


def sized(numbers: list[int]) -> dict[str, Tensor]:
    return {**pixels(numbers), "image_sizes": torch.tensor([[32, 32]] * sum(numbers))}


def large(numbers: list[int]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(sum(numbers), 3, 64, 64)}


def merged(numbers: list[int]) -> dict[str, Tensor]:
    drawn = grids(numbers)
    sizes = torch.tensor([2] * sum(numbers))
    return {**drawn, "pixel_values": drawn["pixel_values"][:, :48], "image_merge_sizes": sizes}


def vip_llava() -> Vlm:
    towers = {"vision_config": hf.CLIPVisionConfig(**TOWER), "text_config": hf.LlamaConfig(**LLAMA)}
    config = hf.VipLlavaConfig(
        **towers, image_token_index=IMAGE_ID, image_seq_length=16, vision_feature_layers=[0, 1, 2]
    )
    return Vlm(hf.VipLlavaForConditionalGeneration(config), 16, 0, pixels)


def cohere(kind: str, **options: Any) -> Vlm:
    towers = {"vision_config": hf.SiglipVisionConfig(**SIGLIP)}
    towers |= {"text_config": hf.Cohere2Config(**LLAMA, sliding_window=64)}
    config = getattr(hf, f"{kind}Config")(**towers, image_token_index=IMAGE_ID, downsample_factor=2, **options)
    config.image_token_id = IMAGE_ID
    return Vlm(getattr(hf, f"{kind}ForConditionalGeneration")(config), 4, 0, pixels)


def mistral3() -> Vlm:
    towers = {"vision_config": hf.PixtralVisionConfig(**TOWER), "text_config": hf.MistralConfig(**LLAMA)}
    config = hf.Mistral3Config(**towers, image_token_index=IMAGE_ID, spatial_merge_size=2)
    return Vlm(hf.Mistral3ForConditionalGeneration(config), 4, 0, sized)


def got_ocr2() -> Vlm:
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 64, "patch_size": 4, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 2}
    text = {**LLAMA, "model_type": "qwen2"}
    config = hf.GotOcr2Config(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=16)
    return Vlm(hf.GotOcr2ForConditionalGeneration(config), 16, 0, large)


def llava_next_video() -> Vlm:
    towers = {"vision_config": hf.CLIPVisionConfig(**TOWER), "text_config": hf.LlamaConfig(**LLAMA)}
    ids = {"image_token_index": IMAGE_ID, "video_token_index": 111}
    config = hf.LlavaNextVideoConfig(**towers, **ids, image_grid_pinpoints=[[32, 64], [64, 32]])
    return Vlm(hf.LlavaNextVideoForConditionalGeneration(config), 16 + 4 * 9, 0, tiles)


def qwen3_moe() -> Vlm:
    text = {**QWEN_TEXT, "head_dim": 12, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    text |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    vision = {**QWEN_TOWER, **MERGED, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return Vlm(hf.Qwen3VLMoeForConditionalGeneration(config), 6, 0, grids, "mm_token_type_ids")


def glm4v() -> Vlm:
    names = ("video_token", "image_start_token", "image_end_token", "video_start_token", "video_end_token")
    ids = {f"{name}_id": 111 + index for index, name in enumerate(names)}
    vision = {**MERGED, **QWEN_TOWER, "image_size": 16}
    config = hf.Glm4vConfig(text_config=ROTARY, vision_config=vision, image_token_id=IMAGE_ID, **ids)
    return Vlm(hf.Glm4vForConditionalGeneration(config), 6, 0, grids, "mm_token_type_ids")


def video_llama3() -> Vlm:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.VideoLlama3Config(
        text_config={**LLAMA, "model_type": "qwen2"},
        vision_config={**vision, "patch_size": 4},
        image_token_id=IMAGE_ID,
        video_token_id=111,
    )
    return Vlm(hf.VideoLlama3ForConditionalGeneration(config), 6, 0, merged)


def idefics2() -> Vlm:
    perceiver = {"hidden_size": 48, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 12, "num_key_value_heads": 1}
    config = hf.Idefics2Config(
        vision_config=TOWER,
        text_config={**LLAMA, "model_type": "mistral"},
        perceiver_config=perceiver,
        image_token_id=IMAGE_ID,
    )
    return Vlm(hf.Idefics2ForConditionalGeneration(config), 4, 0, samples)


OTHERS = {
    "VipLlava": vip_llava,
    "AyaVision": lambda: cohere("AyaVision"),
    "Cohere2Vision": lambda: cohere("Cohere2Vision", alignment_intermediate_size=32),
    "Mistral3": mistral3,
    "GotOcr2": got_ocr2,
    "LlavaNextVideo": llava_next_video,
    "Qwen3VLMoe": qwen3_moe,
    "Glm4v": glm4v,
    "VideoLlama3": video_llama3,
    "Idefics2": idefics2,
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_dropping_is_masking_without_a_composite_of_its_own(name):
    torch.manual_seed(0)
    case = OTHERS[name]()
    ready(case.model).eval()
    inputs = case.prompts((3, 4))
    pruned = case.pruned(keep="ratio(ratio=0.5)")
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    masked = inputs | {"attention_mask": case.visible(inputs, traces[0]), "position_ids": case.positions(inputs)}
    want = case.model.generate(**masked, **STEPS)
    whole = case.model.generate(**inputs, **STEPS)
    assert not torch.equal(torch.cat(want.logits), torch.cat(whole.logits))
    same(got.logits, want.logits)
    same(case.pruned(keep="ratio(ratio=1.0)").generate(**inputs, **STEPS).logits, whole.logits)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Logits of all steps are equal to 1e-5 of the largest."""
    largest = max(1.0, *(float(one.abs().max()) for one in want))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * largest)
