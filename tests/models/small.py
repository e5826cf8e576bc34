"""Small BLIPs for all tasks, ours and transformers', with the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vltprune as vp

VOCABULARY, BOS, ENC, EOS, PAD = 42, 40, 41, 2, 0
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 48,
    "vision_depth": 3,
    "vision_heads": 4,
    "text_width": 32,
    "text_depth": 3,
    "text_heads": 4,
    "vocab_size": VOCABULARY,
    "max_positions": 16,
}
PROMPT = (5, 6, 7)
OWN = {
    "caption": {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "prompt": PROMPT},
    "vqa": {"bos_id": BOS, "enc_id": ENC, "eos_id": EOS, "pad_id": PAD},
    "retrieval": {"enc_id": ENC, "embed_dim": 24},
}


def build(task: str, pretrained: bool | Path = False, **sizes: Any) -> Any:
    """Our model of a task, in eval mode; with weights that say something unless they are read."""
    model = vp.create_model(f"blip_{task}_tiny", pretrained=pretrained, **{**SIZES, **OWN[task], **sizes})
    return model if pretrained else randomize(model)


def randomize(model: nn.Module) -> nn.Module:
    """Every parameter away from where it was born, so that no option is without effect and sentences differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temperature":
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() <= 1 else 0.3))
    return model.eval()


def theirs(kind: str, **text: Any) -> Any:
    """transformers' BLIP of the same sizes, random. Its image tower's norms get the epsilon of Salesforce's."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BlipConfig(
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "encoder_hidden_size": 48,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "bos_token_id": BOS,
            "sep_token_id": EOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **text,
        },
        image_text_hidden_size=24,
    )
    return randomize(getattr(transformers, kind)(config))


def ours(task: str, model: nn.Module, folder: Path) -> Any:
    """Our model with the weights of theirs, by way of a file; both then count in double precision."""
    file = folder / "theirs.safetensors"
    save_file({key: value.clone().contiguous() for key, value in model.state_dict().items()}, file)
    model.double()
    return build(task, file).double()


def images(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    contrast = torch.tensor([0.5, 1.0, 2.0]).repeat(batch)[:batch]
    return torch.randn(batch, 3, 32, 32, dtype=dtype) * contrast.view(-1, 1, 1, 1)


def words(rows: int, length: int = 9) -> tuple[Tensor, Tensor]:
    """Sentences of several lengths, their ids and mask [rows, length]."""
    ends = torch.arange(rows) % 3 * 2 + length - 4
    mask = (torch.arange(length) < ends[:, None]).long()
    return torch.randint(3, 40, (rows, length)) * mask, mask
