"""Small models of transformers with a Q-Former, and prompts for them: queries of an image, and a text behind them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from small_models import images, scrambled
from small_vlms import IMAGE_ID, LLAMA, TOWER, VOCAB
from torch import Tensor

import vltprune as vp

QUERIES, PATCHES, FRAMES = 4, 16, 2
LENGTHS = (6, 3, 5)
QFORMER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
QFORMER |= {"vocab_size": 60, "max_position_embeddings": 32}
ENDLESS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
OPT = hf.OPTConfig(
    **ENDLESS,
    hidden_size=48,
    word_embed_proj_dim=48,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
T5 = hf.T5Config(**ENDLESS, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)


@dataclass(frozen=True)
class WithQFormer:
    """A dense model, and what makes its inputs.

    Attributes:
        model: The dense model.
        instructed: Whether its Q-Former reads a text.
        frames: Images of a prompt.
        labels: Inputs of `forward` that give a loss.
    """

    model: Any
    instructed: bool = False
    frames: int = 1
    labels: dict[str, Tensor] = field(default_factory=dict)

    def prompts(self, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
        """Prompts with texts of these lengths, padded at the left."""
        queries = torch.full((QUERIES * self.frames,), IMAGE_ID)
        ids = [torch.cat([queries, torch.randint(2, IMAGE_ID, (length,))]) for length in lengths]
        shape = (len(lengths),) if self.frames == 1 else (len(lengths), self.frames)
        inputs = {"pixel_values": images(*shape), **_padded(ids)}
        if self.instructed:
            text = _padded([torch.randint(2, 60, (length + 1,)) for length in lengths])
            inputs |= {f"qformer_{name}": value for name, value in text.items()}
        return inputs

    def pruned(self, preset: str = "random", **parts: Any) -> Any:
        return vp.prune(self.model, preset, **parts)

    @contextlib.contextmanager
    def masked(self, trace: vp.PruneTrace, features: Tensor | None = None) -> Iterator[None]:
        """Within the `with` block, the Q-Former of the dense model does not see what a pruned tower dropped behind itself.

        With the `features` [batch, tokens, dim] that the pruned tower made of what stays, it sees these.
        """
        tokens = trace.output_tokens
        kept = torch.zeros(tokens.layout.batch, 1 + PATCHES, dtype=torch.int64)
        instance = tokens.layout.instance
        kept[instance, tokens.position] = 1

        def mask(qformer: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            named = {**named, "encoder_attention_mask": kept}
            if features is not None:
                named["encoder_hidden_states"] = named["encoder_hidden_states"].clone()
                named["encoder_hidden_states"][instance, tokens.position] = features[instance, tokens.layout.slot]
            return args, named

        with self.model.qformer.register_forward_pre_hook(mask, with_kwargs=True):
            yield


def _padded(ids: list[Tensor]) -> dict[str, Tensor]:
    longest = max(map(len, ids))
    mask = torch.stack([torch.arange(longest) >= longest - len(one) for one in ids]).long()
    padded = torch.stack([torch.cat([torch.zeros(longest - len(one), dtype=torch.int64), one]) for one in ids])
    return {"input_ids": padded, "attention_mask": mask}


def build(kind: str, text: Any, instructed: bool = False, frames: int = 1, implementation: str = "sdpa") -> WithQFormer:
    family = kind.removesuffix("ForConditionalGeneration").removesuffix("Model")
    placeholder = "video_token_index" if frames > 1 else "image_token_index"
    config = getattr(hf, f"{family}Config")(
        vision_config=TOWER,
        qformer_config=QFORMER,
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        **{placeholder: IMAGE_ID},
    )
    model = scrambled(getattr(hf, kind)(config))
    model.set_attn_implementation(implementation)
    if hasattr(model.language_model, "generation_config"):
        generation = model.language_model.generation_config
        generation.eos_token_id, generation.pad_token_id = None, 0
    labels = {} if text is not T5 else {"decoder_input_ids": torch.randint(2, IMAGE_ID, (3, 4))}
    return WithQFormer(model, instructed, frames, labels)


MODELS: dict[str, Callable[[], WithQFormer]] = {
    "blip2 opt": functools.partial(build, "Blip2ForConditionalGeneration", OPT),
    "blip2 t5": functools.partial(build, "Blip2ForConditionalGeneration", T5),
    "blip2 eager": functools.partial(build, "Blip2ForConditionalGeneration", OPT, implementation="eager"),
    "blip2 model": functools.partial(build, "Blip2Model", OPT),
    "instruct llama": functools.partial(build, "InstructBlipForConditionalGeneration", hf.LlamaConfig(**LLAMA), True),
    "instruct t5": functools.partial(build, "InstructBlipForConditionalGeneration", T5, True),
    "instruct model": functools.partial(build, "InstructBlipModel", OPT, True),
    "instruct video": functools.partial(
        build, "InstructBlipVideoForConditionalGeneration", hf.LlamaConfig(**LLAMA), True, FRAMES
    ),
}
SPEAKING = [name for name in MODELS if "model" not in name]


@functools.cache
def make(name: str) -> WithQFormer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]()


def matching() -> Any:
    """BLIP-2 for retrieval of images and texts, whose Q-Former reads both."""
    config = hf.Blip2Config(
        vision_config=TOWER,
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scrambled(hf.Blip2ForImageTextRetrieval(config))
