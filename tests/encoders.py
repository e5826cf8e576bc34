"""Small encoders of transformers as folders, with their words, for models that are built by a folder's name."""

from __future__ import annotations

import json

import transformers as hf

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "caption", "of", "picture", "dog", "star", *"0123456789")
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 40}


def write(folder, kind: str = "bert", weights: bool = False) -> str:
    """config.json of a BERT or RoBERTa, vocab.txt, and weights where asked; the folder's name, for a text_cfg."""
    config = hf.AutoConfig.for_model(kind, **SIZES, pad_token_id=0)
    (hf.AutoModel.from_config(config) if weights else config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return str(folder)


def clip(folder: str, **text) -> dict:
    """The arguments of a small CLIP whose text tower is the encoder of a folder, and whose image tower is timm's."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 64}
    own = {"hf_model_name": folder, "hf_tokenizer_name": folder, "hf_proj_type": "linear", "context_length": 12}
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**own, **text}}
