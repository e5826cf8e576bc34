"""What the small models of transformers are made of: sizes, inputs, and the dense model without its padding."""

from __future__ import annotations

import torch

LENGTH = 12
ENDS = (5, 12, 8)  # tokens of each sentence; one fills all places
MASK = (torch.arange(LENGTH) < torch.tensor(ENDS)[:, None]).long()
EOT, PAD = 59, 1
TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), PAD)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 48, "intermediate_size": 64}
IDLE = (
    "k_proj.bias",
    "key.bias",
    "k_lin.bias",
    "attn.k.bias",
    "mask_token",
)  # the former move all logits of a query alike


def images(height: int = 32, width: int = 32):
    return torch.randn(3, 3, height, width) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)


def words():
    return torch.randint(3, 50, (3, LENGTH))


def hiding(model, mask, tower=None):
    """The model, with zeros for the tokens that the mask hides; `tower`: in which part of its output."""

    def dense(*inputs):
        out = model(*inputs)
        own = out if tower is None else out[f"{tower}_model_output"]
        own.last_hidden_state = own.last_hidden_state * mask[..., None]
        return out

    return dense
