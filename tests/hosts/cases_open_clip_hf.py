"""Small text towers of open_clip that are encoders of transformers, with every pooler; and CLIPs that have one."""

from __future__ import annotations

import open_clip
import transformers as hf
from checks import Case, randomize
from open_clip.hf_model import HFTextEncoder
from transformers_parts import ENDS, IDLE, MASK, SPECIAL, STILL, TEXT, images, words

PADDING = {"bert": 0, "roberta": 1, "xlm roberta": 1, "distilbert": 0, "mpnet": 1, "modernbert": 1}
OPTIONS = {
    "mean": {"pooler_type": "mean_pooler", "proj_type": "linear"},
    "mean, mlp": {"pooler_type": "mean_pooler", "proj_type": "mlp"},
    "mean, unprojected": {"pooler_type": "mean_pooler", "output_dim": 32},
    "mean, tokens": {"pooler_type": "mean_pooler", "proj_type": "linear", "output_tokens": True},
    "max": {"pooler_type": "max_pooler", "proj_type": "linear"},
    "max, tokens": {"pooler_type": "max_pooler", "proj_type": "linear", "output_tokens": True},
    "cls": {"pooler_type": "cls_pooler", "proj_type": "linear"},
    "cls, tokens": {"pooler_type": "cls_pooler", "proj_type": "linear", "output_tokens": True},
    "cls state": {"pooler_type": "cls_last_hidden_state_pooler", "proj_type": "linear"},
    "cls state, tokens": {"pooler_type": "cls_last_hidden_state_pooler", "proj_type": "mlp", "output_tokens": True},
}
NAMES = [f"bert: {option}" for option in OPTIONS]
NAMES += ["xlm roberta: mean", "roberta: mean", "roberta: cls", "distilbert: mean", "distilbert: cls, tokens"]
NAMES += ["mpnet: mean", "modernbert: mean, mlp", "modernbert: max"]
NAMES += ["clip", "clip, dict"]
ENCODERS = [name for name in NAMES if ":" in name]


def text_tower(family: str, option: str, layers: int = 2) -> HFTextEncoder:
    sizes = {**TEXT, **STILL, "max_position_embeddings": 20, "num_hidden_layers": layers}
    kinds = {"roberta": hf.RobertaConfig, "xlm roberta": hf.XLMRobertaConfig}
    config = kinds.get(family, hf.BertConfig)(**sizes, pad_token_id=PADDING[family])
    tower = HFTextEncoder("", config=config, **{"output_dim": 24, **OPTIONS[option]})
    if option.startswith("max"):
        tower.pooler.forward = maximum
    if family in ("distilbert", "mpnet", "modernbert"):  # which open_clip's table of encoders lacks
        tower.transformer = encoder(family, layers)
    return tower


def encoder(family: str, layers: int):
    """One that open_clip cannot build itself."""
    sizes = {**TEXT, "num_hidden_layers": layers, "max_position_embeddings": 20}
    if family == "distilbert":
        sizes = {"vocab_size": 60, "dim": 32, "n_layers": layers, "n_heads": 4, "hidden_dim": 64}
        sizes |= {"dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 20}
        return hf.DistilBertModel(hf.DistilBertConfig(**sizes))
    if family == "mpnet":
        return hf.MPNetModel(hf.MPNetConfig(**sizes, **STILL), add_pooling_layer=False)
    sizes["num_hidden_layers"] = 3  # one sees all words, the others their neighbors
    return hf.ModernBertModel(hf.ModernBertConfig(**sizes, **SPECIAL, local_attention=4))


def sentences(padding: int):
    """Ids [3, length], padded behind the sentences."""
    return words().masked_fill(~MASK.bool(), padding)


def maximum(out, attention_mask):
    """What open_clip's MaxPooler is meant to give: 3.3 fails on a mask of integers, and one of bools would hide the words."""
    return out.last_hidden_state.masked_fill(~attention_mask.bool()[..., None], float("-inf")).amax(1)


def hiding(tower):
    """The tower, with zeros for tokens that are padding."""

    def dense(ids):
        features, tokens = tower(ids)
        return features, tokens * MASK[:, -tokens.shape[1] :, None]

    return dense if tower.output_tokens else tower


def text_case(family: str, option: str) -> Case:
    tower, ids = randomize(text_tower(family, option)), sentences(PADDING[family])
    reads_pooler = option.startswith("cls") and "state" not in option
    return Case(
        tower,
        (ids,),
        {"text": [[0]] * 3},
        dense=hiding(tower),
        alone=lambda i: (ids[i : i + 1, : ENDS[i]],),
        idle=IDLE if reads_pooler else (*IDLE, "transformer.pooler"),
    )


def clip_case(name: str) -> Case:
    """open_clip's own image tower, and a text tower of transformers."""
    text = {"layers": 1, "width": 32, "heads": 4, "context_length": 12, "vocab_size": 60}
    vision = {"layers": 2, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 32}
    model = open_clip.CustomTextCLIP(24, vision, text, output_dict="dict" in name)
    model.text = text_tower("bert", "mean, mlp" if "dict" in name else "mean", layers=2)
    protected = {"image": [[0]] * 3, "text": [[0]] * 3}
    idle = (*IDLE, "text.transformer.pooler")
    return Case(randomize(model), (images(), sentences(0)), protected, idle=idle)


def make(name: str) -> Case:
    family, _, option = name.partition(": ")
    return text_case(family, option) if option else clip_case(name)
