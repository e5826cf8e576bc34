"""Small models of timm's VisionTransformer and Eva, one for each option that a host has to honour."""

from __future__ import annotations

import torch
from checks import Case, randomize
from timm.layers import SwiGLUPacked
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

VIT = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 1.0},
    "registers": {"reg_tokens": 4},
    "registers, no_embed_class": {"reg_tokens": 4, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no class token, registers": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    "avg": {"global_pool": "avg"},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax"},
    "avg with prefix": {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True},
    "max with prefix": {"global_pool": "max", "reg_tokens": 2, "pool_include_prefix": True},
    "unpooled": {"global_pool": ""},
    "unpooled, no head": {"global_pool": "", "num_classes": 0},
    "siglip": {"class_token": False, "global_pool": "map"},
    "map": {"global_pool": "map", "reg_tokens": 2},
    "map with prefix": {"global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True},
    "clip": {"pre_norm": True},
    "clip, avg before norm": {"pre_norm": True, "global_pool": "avg", "fc_norm": False},
    "token, fc_norm": {"fc_norm": True},
    "no final norm": {"final_norm": False},
    "no_embed_class": {"no_embed_class": True},
    "no pos_embed": {"pos_embed": "none"},
    "dynamic": {"dynamic_img_size": True},
    "res_post": {"block_fn": ResPostBlock, "init_values": 1.0},
    "res_post, qk_norm": {"block_fn": ResPostBlock, "qk_norm": True},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "swiglu": {"mlp_layer": SwiGLUPacked},
    "dinov2 giant": {"mlp_layer": SwiGLUPacked, "init_values": 1.0, "reg_tokens": 4, "no_embed_class": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "patch_drop": {"patch_drop_rate": 0.25},
    "gated": {"gated": True},
    "gated, res_post": {"block_fn": ResPostBlock, "gated": True},
}
ROPE = {"use_rot_pos_emb": True}
GROUPED = {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2, "qk_norm": True}
EVA = {
    "default": {},
    "token": {"global_pool": "token"},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax"},
    "unpooled": {"global_pool": ""},
    "map": {"global_pool": "map", "num_reg_tokens": 2},
    "rope": {**ROPE, "global_pool": "token"},
    "rope only": {**ROPE, "use_abs_pos_emb": False},
    "rope half": {**ROPE, "rope_rotate_half": True},
    "rope reference": {**ROPE, "ref_feat_shape": (8, 8), "rope_grid_offset": 0.5, "rope_grid_indexing": "xy"},
    "rope mixed": {**ROPE, "rope_type": "mixed"},
    "rope dinov3": {**ROPE, "rope_type": "dinov3", "num_reg_tokens": 4, "no_embed_class": True, "init_values": 1.0},
    "mrope": {**ROPE, "rope_type": "mrope", "rope_mrope_section": (2, 1, 1)},
    "rope dynamic": {**ROPE, "dynamic_img_size": True},
    "rope mixed, dynamic": {**ROPE, "rope_type": "mixed", "dynamic_img_size": True},
    "unfused": {"qkv_fused": False},
    "no qkv bias": {"qkv_bias": False},
    "post_norm": {"use_post_norm": True},
    "post_norm, rope": {**ROPE, "use_post_norm": True, "attn_type": "rope", "scale_attn_inner": True},
    "scale_attn_inner": {"scale_attn_inner": True},
    "swiglu": {"swiglu_mlp": True},
    "swiglu, norm": {"swiglu_mlp": True, "scale_mlp": True},
    "swiglu, aligned": {"swiglu_mlp": True, "swiglu_align_to": 16},
    "scale_mlp": {"scale_mlp": True},
    "eva02": {**ROPE, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True},
    "rope attention": {**ROPE, "attn_type": "rope"},
    "grouped": {**ROPE, **GROUPED},
    "grouped per block": {**ROPE, **GROUPED, "num_kv_heads": (1, 4)},
    "layer_scale": {"init_values": 1.0},
    "attn_only_layer_scale": {"init_values": 1.0, "attn_only_layer_scale": True},
    "registers": {"num_reg_tokens": 4},
    "no class token": {"class_token": False},
    "no class token, rope": {**ROPE, "class_token": False, "global_pool": "max"},
    "perception": {**ROPE, "global_pool": "map", "use_pre_transformer_norm": True, "use_post_transformer_norm": True},
    "qk_norm": {"qk_norm": True},
    "gated": {"gated": True},
    "gated, grouped": {**ROPE, **GROUPED, "gated": True},
    "gated, post_norm": {"use_post_norm": True, "gated": True},
}
NAMES = [f"vit: {name}" for name in VIT] + [f"eva: {name}" for name in EVA]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}


def make(name: str, **more) -> Case:
    family, _, option = name.partition(": ")
    options = {**SIZES, **(VIT if family == "vit" else EVA)[option], **more}
    gated = options.pop("gated", False)
    model = (VisionTransformer if family == "vit" else Eva)(**options)
    if gated:
        open_gates(model)
    height, width = (48, 40) if model.dynamic_img_size else (32, 32)
    return Case(
        randomize(model),
        (torch.randn(3, 3, height, width) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1),),
        {"image": [range(model.num_prefix_tokens)] * 3},
        summary=model.cls_token is not None,
        idle=("k_proj.bias", "k_norm.bias"),  # they move all logits of a query alike
    )


def open_gates(model):
    """Attention with a gate: timm builds it for single models only."""
    for block in model.blocks:
        old, options = block.attn, {"gated": True, "qkv_bias": True, "norm_layer": nn.LayerNorm}
        if type(old) is AttentionRope:
            options |= {"qkv_fused": False, "num_kv_heads": old.num_kv_heads, "qk_norm": True}
        if type(old) is EvaAttention:
            options |= {"scale_norm": False}
        block.attn = type(old)(32, num_heads=4, **options)
