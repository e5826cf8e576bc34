"""Pruned towers of open_clip and its pruned CLIP, with what open_clip's factory, training and tokenizers read of a model."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from ..pruning.encoder import PrunedEncoder
from .attributes import forwards, of_host

_NO_INTERMEDIATES = (
    "a pruned tower of open_clip gives no intermediates, for tokens are gone: call the model within "
    "`with vltprune.collect(tokens=True) as traces:` and read the tokens that left each block from traces[0].layers"
)


@forwards("lock", "set_grad_checkpointing", "output_dim", "output_tokens", "pool_type")
class _PrunedClipTower(PrunedEncoder):
    """A pruned tower of open_clip's own."""

    def no_weight_decay(self) -> set[str]:
        """The parameters that weight decay leaves alone, by their names here."""
        host: Any = self.host
        return of_host(host.no_weight_decay())

    def forward_intermediates(self, *inputs: Any, **named: Any) -> Any:
        """TypeError: open_clip's answer has a grid of tokens, or one for each word, and some of them are gone."""
        raise TypeError(_NO_INTERMEDIATES)


@forwards("image_size", "patch_size", "grid_size", "preprocess_cfg", "image_mean", "image_std")
class PrunedClipVision(_PrunedClipTower):
    """An image tower."""


@forwards("context_length", "vocab_size", "num_pos", "heads", "pad_id", "eos_id", "positional_embedding")
class PrunedClipText(_PrunedClipTower):
    """A text tower."""


@forwards("context_length", "vocab_size")
class PrunedClipOwnText(PrunedEncoder):
    """The text half of a CLIP."""


@forwards("image_size", "preprocess_cfg", "image_mean", "image_std", "lock", "set_grad_checkpointing")
class PrunedTimmModel(PrunedEncoder):
    """A trunk of timm in open_clip."""

    def forward_intermediates(self, *inputs: Any, **named: Any) -> Any:
        """TypeError, as of open_clip's own towers."""
        raise TypeError(_NO_INTERMEDIATES)


class PrunedClip(CLIP):
    """CLIP with pruned towers. It has the parameters of the CLIP it was made from, and `text` beside `visual`."""

    text: PrunedEncoder

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """As open_clip's."""
        host: Any = self.text.host
        host.lock_text_tower(unlocked_layers, freeze_layer_norm)

    def forward_intermediates(self, *inputs: Any, **named: Any) -> Any:
        """TypeError, as of its towers."""
        raise TypeError(_NO_INTERMEDIATES)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """text [batch, length] token ids -> features [batch, embed_dim]."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features
