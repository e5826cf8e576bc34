"""Host of open_clip's HFTextEncoder, a text tower that is an encoder of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MaxPooler, MeanPooler
from torch import Tensor, nn

from ..core import segments
from ..core.checks import is_recorded
from ..core.tokens import PackedTokens
from ..pruning.encoder import PrunedEncoder
from ..registry import hosts
from .attributes import forward_attributes
from .ops import weighted_mean
from .soft import refuse_soft_tokens
from .wrapper import WrapperHost

_FIRST = (ClsPooler, ClsLastHiddenStatePooler)
_POOLERS = (MeanPooler, MaxPooler, *_FIRST)


@forward_attributes(
    "config", "context_length", "vocab_size", "output_dim", "output_tokens", "lock", "set_grad_checkpointing"
)
class PrunedHfText(PrunedEncoder):
    """A pruned HFTextEncoder of open_clip.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """


@hosts.register("open_clip.hf_model.HFTextEncoder")
class HFTextEncoderHost(WrapperHost):
    """Host of HFTextEncoder: an encoder of transformers, open_clip's pooler, and a projection.

    Padding, known by its id, never enters. Poolers act on the kept tokens: a mean weighs a merged token by how many it stands
    for, and the first token is protected where the pooler takes it. With `output_tokens` the tokens are the kept ones, in their
    order, and zeros behind them.
    """

    name: ClassVar = "transformer"
    tower = "text"
    pruned_class = PrunedHfText

    def check(self, tower: Any) -> None:
        if type(tower.pooler) not in _POOLERS:
            raise TypeError(
                f"cannot prune this HFTextEncoder: no host knows its pooler, a {type(tower.pooler).__name__}. Supported: "
                + ", ".join(pooler.__name__ for pooler in _POOLERS)
            )
        if tower.config.pad_token_id is None:
            raise TypeError(
                "cannot prune this HFTextEncoder: its config has no pad_token_id, by which padding is known; set one"
            )

    def embed(self, tower: Any, text: Tensor) -> tuple[PackedTokens, tuple[Any, ...]]:
        padding = tower.config.pad_token_id
        real = text != padding
        if text.dim() == 2 and not is_recorded() and not real[:, :1].all():
            sentence = int((~real[:, 0]).nonzero()[0])
            raise ValueError(f"text: sentence {sentence} begins with padding (id {padding}): pad on the right")
        tokens, block_inputs = super().embed(tower, text, real)
        if type(tower.pooler) in _FIRST:
            protected = tokens.protected | (tokens.position == 0)
            tokens = replace(tokens, protected=protected, number_protected=None, protected_lead=False)
        return tokens, block_inputs

    def head(self, tower: HFTextEncoder, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> Any:
        out = self.inner.head(self.inner_tower(tower), tokens, block_inputs)
        hidden = out.last_hidden_state
        features = tower.proj(_pooled(tower.pooler, out, tokens.with_x(segments.unpad(hidden, tokens.layout))))
        if not tower.output_tokens:
            return features
        return features, hidden[:, 1:] if type(tower.pooler) is ClsPooler else hidden


def _pooled(pooler: nn.Module, out: Any, tokens: PackedTokens) -> Tensor:
    """The pooler's [batch, dim], from the encoder's output `out` and its last hidden states, packed."""
    if type(pooler) is MeanPooler:
        return weighted_mean(tokens, torch.ones_like(tokens.protected))
    if type(pooler) is MaxPooler:
        refuse_soft_tokens(tokens, "the pooler 'max_pooler'", "pool by 'mean_pooler' or 'cls_pooler'")
        return segments.pad(tokens.x, tokens.layout, float("-inf")).amax(1)
    return pooler(out, None)
