"""Pruned towers of timm, with the attributes and methods that timm expects of a model."""

from __future__ import annotations

from typing import Any

from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..io.model_files import IN_ARGUMENTS
from ..io.recipe import check_whole
from ..io.saved_pruning import config_to_save
from ..pruning.encoder import PrunedEncoder
from ..pruning.model import is_pruned
from ..pruning.trace import collect
from .attributes import forward_attributes, host_names


@forward_attributes(
    "pretrained_cfg", "default_cfg", "num_classes", "num_features", "head_hidden_size", "embed_dim", "in_chans"
)
@forward_attributes(
    "global_pool", "num_prefix_tokens", "feature_info", "patch_embed", "dynamic_img_size", "grad_checkpointing"
)
@forward_attributes("set_grad_checkpointing", "get_classifier", "reset_classifier", "set_input_size", "_traits")
class PrunedTimm(PrunedEncoder):
    """A pruned VisionTransformer or Eva of timm.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """

    host: VisionTransformer | Eva

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments that timm's `save_for_hf` and `push_to_hf_hub` write of a model: the dense tower's, and the pruning.

        `vltprune.load` builds the pruned model from them. `timm.create_model` fails at the name of the pruning instead of
        building a dense model from them.
        """
        arguments = dict(getattr(self.host, "_model_args", {}))
        if is_pruned(self):
            check_whole(self)
            arguments[IN_ARGUMENTS] = config_to_save(self, {}).to_dict()
        return arguments

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that get no weight decay."""
        return host_names(self.host.no_weight_decay())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names for layer-wise learning rate decay, as timm's; guide and pruners are in no group."""
        return {group: _prefixed(patterns) for group, patterns in self.host.group_matcher(coarse).items()}

    def forward_features(self, images: Tensor) -> Tensor:
        """The kept tokens after the final norm [batch, longest, dim], in their order, prefix tokens first, and zeros behind."""
        tokens, _ = self.encode(images)
        return tokens.with_x(self.host.norm(tokens.x)).unpack()[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Run the head on what `forward_features` returned, for towers that pool the class token.

        Args:
            x: Tokens [batch, longest, dim], the class token first.
            pre_logits: Whether to stop before the classifier.

        Returns:
            Logits [batch, num_classes], or features [batch, dim] with `pre_logits`.

        Raises:
            TypeError: For other pooling: `x` does not say how many tokens were kept, and what was merged into them.
        """
        if self.host.global_pool != "token" or self.host.attn_pool is not None:
            raise TypeError(
                f"a pruned tower with global_pool={self.host.global_pool!r} pools within its call: write model(images), with "
                "model.reset_classifier(0) before it for features"
            )
        return self.host.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Tokens behind single blocks, as timm's method: [batch, longest there, dim], in their order, and zeros behind.

        `vltprune.collect(tokens=True)` also has their positions.

        Args:
            x: Images [batch, 3, H, W].
            indices: Blocks, as in timm.
            return_prefix_tokens: Whether to return the prefix tokens too, apart.
            norm: Whether to apply the final norm.
            stop_early: Ignored: all blocks run.
            output_fmt: "NLC".
            intermediates_only: Whether to leave out the final tokens.

        Returns:
            The tokens behind each chosen block, as pairs with the prefix tokens where they are asked for. Without
            `intermediates_only`, the final normed tokens, then that list.

        Raises:
            ValueError: If `output_fmt` is not "NLC": kept tokens fill no grid.
        """
        if output_fmt != "NLC":
            raise ValueError(
                f"output_fmt={output_fmt!r}: the kept tokens of an image fill no grid; write output_fmt='NLC', and see "
                "LayerTrace.position of vltprune.collect(tokens=True) for their positions"
            )
        taken, _ = feature_take_indices(len(self.host.blocks), indices)
        with collect(tokens=True, threads=False) as traces:
            last, _ = self.encode(x)
        outputs = [step.tokens for depth, step in enumerate(traces[-1].layers) if depth in taken]
        padded = [t.with_x(self.host.norm(t.x) if norm else t.x).unpack()[0] for t in outputs if t is not None]
        prefix = self.host.num_prefix_tokens
        parts: list[Any] = [each[:, prefix:] for each in padded]
        if return_prefix_tokens and prefix:
            parts = [(part, each[:, :prefix]) for part, each in zip(parts, padded, strict=True)]
        return parts if intermediates_only else (last.with_x(self.host.norm(last.x)).unpack()[0], parts)


def _prefixed(patterns: Any) -> Any:
    """A pattern of timm's, or a list of them in pairs with what they stand for, for names that begin with "self.host."."""
    if isinstance(patterns, str):
        return rf"^host\.(?:{patterns.replace('^', '')})"
    return [(_prefixed(pattern), value) for pattern, value in patterns]
