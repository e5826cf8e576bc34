"""Small towers and models of open_clip, one for each option that a host has to honour."""

from __future__ import annotations

import open_clip
import torch
from checks import Case, randomize
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer

EOT, EOS, PAD = 59, 7, 0
LENGTH = 14
ENDS = (4, 13, 9)  # where each sentence ends; one fills all places
CUSTOM = {
    "qk_norm": {"qk_norm": True},
    "scale_heads": {"scale_heads": True},
    "scale_attn_inner": {"scale_attn_inner": True},
    "scale_attn": {"scale_attn": True},
    "scale_fc": {"scale_fc": True},
    "custom": {"block_type": "custom"},
    "all scales": {
        "qk_norm": True,
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
    },
    "layer_scale": {"ls_init_value": 1.0},
}
POOLER = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2}
IMAGE = {
    "tok": {},
    "avg": {"pool_type": "avg"},
    "none": {"pool_type": "none"},
    "ln after tok": {"final_ln_after_pool": True},
    "ln after avg": {"final_ln_after_pool": True, "pool_type": "avg"},
    "no_ln_pre": {"no_ln_pre": True},
    "sin_cos": {"pos_embed_type": "sin_cos_2d"},
    "output_tokens": {"output_tokens": True},
    "avg, output_tokens": {"output_tokens": True, "pool_type": "avg"},
    "ln after tok, output_tokens": {"output_tokens": True, "final_ln_after_pool": True},
    "pooler": POOLER,
    "pooler, avg": {**POOLER, "pool_type": "avg"},
    "pooler, output_tokens": {**POOLER, "output_tokens": True},
    "pooler, parallel": {**POOLER, "attentional_pool": "parallel"},
    "pooler, cascade": {**POOLER, "attentional_pool": "cascade", "output_tokens": True},
    "patch_dropout": {"patch_dropout": 0.25},
    **CUSTOM,
}
TEXT = {
    "argmax": {},
    "eos": {"pool_type": "eos", "eos_id": EOS},
    "last": {"pool_type": "last"},
    "no_causal_mask": {"no_causal_mask": True},
    "no_causal_mask, eos": {"no_causal_mask": True, "pool_type": "eos", "eos_id": EOS},
    "no_causal_mask, first": {"no_causal_mask": True, "pool_type": "first"},
    "siglip": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "pad mask": {"no_causal_mask": True, "use_pad_mask": True},
    "pad mask, first": {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "first"},
    "pad mask, eos, scales": {**CUSTOM["all scales"], "no_causal_mask": True, "use_pad_mask": True, "pool_type": "eos"},
    "pad mask of causal": {"use_pad_mask": True},  # open_clip ignores it there
    "proj_bias": {"proj_bias": True},
    "no projection": {"proj_type": "none"},
    "output_tokens": {"output_tokens": True},
    **CUSTOM,
}
TIMM = {
    "token, linear": {"pool": "token"},
    "avg, mlp": {"pool": "avg", "proj": "mlp", "proj_bias": True},
    "trunk's head": {"pool": "token", "proj": ""},
    "no head": {"pool": "token", "proj": "none"},
}
NAMES = [f"image: {n}" for n in IMAGE] + [f"text: {n}" for n in TEXT] + [f"timm: {n}" for n in TIMM]
NAMES += ["clip", "clip, eos", "clip, dict", "custom clip", "custom clip, dict"]
WIDTH = 32

TEXT_SIZE = {"context_length": LENGTH, "vocab_size": 60, "width": WIDTH, "heads": 4, "layers": 2, "output_dim": 24}


def images(size: int = 32):
    return torch.randn(3, 3, size, size) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)


def sentences(end: int = EOT, length: int = LENGTH):
    """Ids [3, length] with `end` at ENDS and padding behind it; no other token is as large as EOT."""
    ids = torch.randint(10, 50, (3, length))
    for row, place in zip(ids, ENDS, strict=True):
        row[place] = end
        row[place + 1 :] = PAD
    return ids


def image_case(option: str) -> Case:
    pooler = IMAGE[option].get("attentional_pool")
    size = {"image_size": 32, "patch_size": 8, "width": WIDTH, "layers": 2, "heads": 4, "mlp_ratio": 2.0}
    model = VisionTransformer(**size, output_dim=WIDTH if isinstance(pooler, str) else 24, **IMAGE[option])
    idle = ("ln_k.bias", "attn_pool") if pooler else ("ln_k.bias",)
    return Case(randomize(model), (images(),), {"image": [[0]] * 3}, idle=idle)


def text_case(option: str) -> Case:
    options = {"eos_id": EOS, **TEXT[option]}
    model = TextTransformer(**TEXT_SIZE, **options)
    by_eos = options.get("pool_type") == "eos"
    ids = sentences(EOS if by_eos else EOT)
    places = {"first": (0, 0, 0), "last": (LENGTH - 1,) * 3}.get(model.pool_type, ENDS)
    return Case(
        randomize(model),
        (ids,),
        {"text": [[place] for place in places]},
        idle=("ln_k.bias",),
        alone=lambda i: (trimmed(model, ids[i : i + 1], ENDS[i]),),
    )


def trimmed(model, ids, end):
    """Without the places behind the end, where they make no difference."""
    counted = model.attn_mask is None and not model.use_pad_mask
    return ids if counted or model.pool_type == "last" or model.output_tokens else ids[:, : end + 1]


def timm_case(option: str) -> Case:
    model = TimmModel("test_vit", 24, image_size=160, **{"proj": "linear", **TIMM[option]})
    return Case(randomize(model), (images(160),), {"image": [[0]] * 3})


def clip_case(name: str) -> Case:
    pool = {"pool_type": "eos", "eos_id": EOS} if "eos" in name else {}
    kind = open_clip.CustomTextCLIP if name.startswith("custom") else open_clip.CLIP
    model = kind(
        24,
        {"layers": 2, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 32},
        {"layers": 2, "width": 32, "heads": 4, "context_length": LENGTH, "vocab_size": 60, **pool},
        output_dict="dict" in name,
    )
    protected = {"image": [[0]] * 3, "text": [[end] for end in ENDS]}
    return Case(randomize(model), (images(), sentences(EOS if pool else EOT)), protected)


def make(name: str) -> Case:
    family, _, option = name.partition(": ")
    return {"image": image_case, "text": text_case, "timm": timm_case}[family](option) if option else clip_case(name)
