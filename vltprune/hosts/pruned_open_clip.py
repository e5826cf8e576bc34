"""Pruned towers of open_clip and its pruned CLIP, with the attributes that open_clip expects of a model."""

from __future__ import annotations

from typing import Any, NoReturn

import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor

from ..pruning.encoder import PrunedEncoder
from .attributes import forward_attributes, host_names

_NO_INTERMEDIATES = (
    "a pruned tower of open_clip has no forward_intermediates, since tokens are pruned: call the model within "
    "`with vltprune.collect(tokens=True) as traces:`, and traces[0].layers has the tokens behind each block"
)


@forward_attributes("lock", "set_grad_checkpointing", "output_dim", "output_tokens", "pool_type")
class _PrunedClipTower(PrunedEncoder):
    """A pruned tower of open_clip's own."""

    host: VisionTransformer | TextTransformer

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that get no weight decay."""
        return host_names(self.host.no_weight_decay())

    def forward_intermediates(self, *inputs: Any, **named: Any) -> NoReturn:
        """Not supported: open_clip returns a grid of tokens, or one for each word, and some of them are pruned.

        Args:
            *inputs: Ignored.
            **named: Ignored.

        Raises:
            TypeError: Always; with what to call instead.
        """
        raise TypeError(_NO_INTERMEDIATES)


@forward_attributes("image_size", "patch_size", "grid_size", "preprocess_cfg", "image_mean", "image_std")
class PrunedClipVision(_PrunedClipTower):
    """A pruned VisionTransformer of open_clip.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """


@forward_attributes("context_length", "vocab_size", "num_pos", "heads", "pad_id", "eos_id", "positional_embedding")
class PrunedClipText(_PrunedClipTower):
    """A pruned TextTransformer of open_clip.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """


@forward_attributes("context_length", "vocab_size")
class PrunedClipOwnText(PrunedEncoder):
    """The pruned text tower of an open_clip CLIP.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """


@forward_attributes("image_size", "preprocess_cfg", "image_mean", "image_std", "lock", "set_grad_checkpointing")
class PrunedTimmModel(PrunedEncoder):
    """A pruned TimmModel of open_clip.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """

    def forward_intermediates(self, *inputs: Any, **named: Any) -> NoReturn:
        """Not supported, as for open_clip's own towers.

        Args:
            *inputs: Ignored.
            **named: Ignored.

        Raises:
            TypeError: Always.
        """
        raise TypeError(_NO_INTERMEDIATES)


class PrunedClip(CLIP):
    """An open_clip CLIP with pruned towers `visual` and `text`. It has the parameters of the CLIP it was made from.

    `prune` copies that CLIP and does not call the constructor, whose arguments are open_clip's.

    Args:
        embed_dim, vision_cfg, text_cfg, quick_gelu, cast_dtype, output_dict: As in open_clip's CLIP.
        init_logit_scale, init_logit_bias, nonscalar_logit_scale: As in open_clip's CLIP.
    """

    text: PrunedEncoder

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower, as open_clip's method.

        Args:
            unlocked_layers: Last layers that stay trainable.
            freeze_layer_norm: Must be true: open_clip freezes norms as other weights.

        Raises:
            AssertionError: For `freeze_layer_norm=False`.
        """
        host: Any = self.text.host
        host.lock_text_tower(unlocked_layers, freeze_layer_norm)

    def forward_intermediates(self, *inputs: Any, **named: Any) -> NoReturn:
        """Not supported, as for its towers.

        Args:
            *inputs: Ignored.
            **named: Ignored.

        Raises:
            TypeError: Always.
        """
        raise TypeError(_NO_INTERMEDIATES)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode texts.

        Args:
            text: Token ids [batch, length].
            normalize: Whether to scale the features to unit length.

        Returns:
            Features [batch, embed_dim].

        Raises:
            ValueError: For ids of another shape or out of range, and for texts longer than the tower's positions.
        """
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features
