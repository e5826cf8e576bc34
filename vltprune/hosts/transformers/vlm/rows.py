"""Visual tokens pruned as they enter a language model: for models whose projector joins patches, or places them anew."""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from ....core.checks import check_finite
from ....core.layout import Layout
from ....core.statistics import AttentionStats, Stat
from ....core.tokens import PackedTokens
from ....layers import BlockSpec, BoundGuide
from ....layers.grid import COLUMN as GRID
from ....pruning.config import PruneConfig
from ....pruning.encoder import PrunedEncoder, apply_decisions
from ....pruning.pruner import Pruner
from ....pruning.trace import LayerTrace
from ...base import Host
from .call_inputs import PIXELS
from .composite import VlmComposite
from .texts import PromptTexts, compared
from .visual_rows import VisualRows, split_by_image, square_grid

# the column of the features that later layers of the language model add to visual tokens
_LEVELS = "deepstack"


class PrunedRows(PrunedEncoder):
    """Prunes the visual tokens of images behind a model's projector, at the place "output" alone.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """

    adapter: RowsHost

    @property
    def needs(self) -> Stat:
        """The attention statistics that its pruners read."""
        needed = (pruner.needs for pruner in self.pruners.values() if isinstance(pruner, Pruner))
        return functools.reduce(operator.or_, needed, Stat.NONE)

    def build_pruners(self, config: PruneConfig) -> nn.ModuleDict:
        model = type(self.host).__name__
        for stage in config.stages:
            if stage.place != "output" and stage.names(self.tower):
                raise ValueError(
                    f"place={stage.place!r} prunes inside the image tower, and a {model} is pruned behind its projector alone: "
                    "write place='output' (and leave `at` out), or prune layers of the language "
                    "model, at={'language': ...}"
                )
        pruners = super().build_pruners(config)
        for pruner in pruners.values():
            assert isinstance(pruner, Pruner)
            given = Stat.FROM_QUERY if self.adapter.has_attention else pruner.needs
            if pruner.needs & given:
                raise ValueError(
                    f"a part reads {pruner.needs & given} of the image tower's attention, and in a {model} visual tokens are "
                    "pruned behind the projector, where there is none: choose parts that read contents, as the presets "
                    "divprune, cdpruner, scissor, pooling and random do"
                )
        return pruners

    def _bind_guide(self) -> BoundGuide | None:
        # which text an image has is known once it is known how many visual tokens it has
        return None

    def _fit_guide(
        self, guide: BoundGuide | None, tokens: PackedTokens, block_inputs: tuple[Any, ...]
    ) -> BoundGuide | None:
        ((_, _, texts),) = block_inputs
        # the tokens are in the language model's space already
        with compared(texts, tokens.layout.lengths, lambda x: x):
            guide = super()._bind_guide()
        return super()._fit_guide(guide, tokens, block_inputs)

    def _block(
        self, depth: int, block: nn.Module, tokens: PackedTokens, block_input: Any, guide: BoundGuide | None
    ) -> tuple[PackedTokens, LayerTrace]:
        _, stats, _ = block_input
        decisions, guidance = self._decide(self.pruners_at(depth), tokens, stats, guide)
        tokens, steps = apply_decisions(decisions, tokens, "block")
        relate = None if guidance is None else lambda: guidance
        return tokens, LayerTrace(tokens.position, tokens.protected, tokens.layout, steps, False, relate)


class RowsHost(Host):
    """Host of the visual tokens that enter a language model, as a tower without blocks.

    Attributes:
        has_attention: Whether `attention` gives statistics.
        is_square: Whether the visual tokens of an image are a square grid.
    """

    pruned_class = PrunedRows
    has_attention: ClassVar[bool] = False
    is_square: ClassVar[bool] = False

    def features(self, tower: Any, modality: str, **inputs: Any) -> Any:
        """Run the dense model's image tower and projector.

        Args:
            tower: The dense model.
            modality: "image" or "video".
            **inputs: What these read.

        Returns:
            The dense model's own output.
        """
        return getattr(tower.base_model, f"get_{modality}_features")(**inputs, return_dict=True)

    def attention(self, tower: Any, modality: str, needs: Stat, **inputs: Any) -> tuple[Any, AttentionStats]:
        """Run image tower and projector, and compute statistics of the tower's attention.

        Args:
            tower: The dense model.
            modality: "image" or "video".
            needs: The statistics.
            **inputs: What tower and projector read.

        Returns:
            What `features` returns, and the statistics of each visual token.
        """
        raise TypeError(f"no host computes the attention of a {type(tower).__name__}'s image tower")

    def check_pixels(self, tower: Any, modality: str, inputs: Mapping[str, Any]) -> None:
        """Check images before anything runs. Where their shape is not known, only that they are finite.

        Args:
            tower: The dense model.
            modality: "image" or "video".
            inputs: What image tower and projector read.

        Raises:
            ValueError: For images that the model cannot take.
        """
        check_finite(inputs[PIXELS[modality]], PIXELS[modality])

    def blocks(self, tower: Any) -> Sequence[nn.Module]:
        # parts get the dtype and the device of what visual tokens stand between
        return (tower.get_input_embeddings(),)

    def spec(self, tower: Any, depth: int, name: str) -> BlockSpec:
        text = tower.config.get_text_config()
        return BlockSpec(name, depth, 1, text.hidden_size, text.num_attention_heads, has_summary=False)

    def embed(
        self,
        tower: Any,
        modality: str,
        needs: Stat,
        texts: PromptTexts | None,
        names: Sequence[str],
        *values: Any,
    ) -> tuple[PackedTokens, tuple[Any, ...]]:
        # what belongs to no token, the form of the output, goes where a block's other input does
        inputs, stats = dict(zip(names, values, strict=True)), AttentionStats()
        self.check_pixels(tower, modality, inputs)
        if needs:
            output, stats = self.attention(tower, modality, needs, **inputs)
        else:
            output = self.features(tower, modality, **inputs)
        rows, lengths, levels = _rows(tower, output)
        newline, layout = getattr(tower.base_model, "image_newline", None), Layout(lengths, rows.device)
        protected = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
        if newline is not None:
            protected = (rows == newline.to(rows)).all(-1)
        tokens = PackedTokens(rows, layout, layout.slot, protected)
        if self.is_square:
            side = math.isqrt(layout.longest)
            tokens = tokens.with_column(GRID, square_grid(1, side, side, rows.device).repeat(layout.batch, 1))
        return tokens if levels is None else tokens.with_column(_LEVELS, levels), ((output, stats, texts),)

    def qkv(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> tuple[Tensor, Tensor, Tensor]:
        # no heads: visual tokens behind a projector do not attend to each other, which costs nothing
        none = tokens.x[:, None, :0]
        return none, none, none

    def scale(self, block: nn.Module) -> float:
        return 1.0

    def project(self, block: nn.Module, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return tokens

    def feed_forward(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> PackedTokens:
        return tokens

    def head(self, tower: nn.Module, tokens: PackedTokens, block_inputs: tuple[Any, ...]) -> PackedTokens:
        return tokens


class RowsComposite(VlmComposite):
    """Composite of any model that takes `mm_encoder_outputs`, of images and videos, each a list of visual tokens.

    Args:
        model: The dense model.

    Attributes:
        host: The host of its visual tokens.
        image: The name of what is pruned before the language model, beside that.
    """

    host: ClassVar[type[RowsHost]] = RowsHost
    image: ClassVar[str] = "visual_rows"

    def __init__(self, model: PreTrainedModel):
        # some models have no other inside them
        base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
        language = next(name for name in ("language_model", "text_model") if hasattr(model.base_model, name))
        super().__init__({"image": f"{base}{self.image}", "language": f"{base}{language}"})

    @classmethod
    def from_module(cls, module: Any) -> RowsComposite:
        return cls(module)

    def image_tower(self, model: nn.Module) -> tuple[nn.Module, Host]:
        return model, self.host()

    def look(self, model: Any, given: dict[str, Any]) -> dict[str, VisualRows]:
        found, read = {}, set()
        for modality, pixels in PIXELS.items():
            call = getattr(model.base_model, f"get_{modality}_features", None)
            if pixels not in given or call is None:
                continue
            takes = inspect.signature(call).parameters
            for name, parameter in takes.items():
                # Qwen's default of its grid is None, which it cannot take
                needed = parameter.default is inspect.Parameter.empty or name.endswith("_grid_thw")
                if needed and name not in given and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                    raise ValueError(
                        f"{pixels} is given without {name}: give both, as this model's processor makes them"
                    )
            names = tuple(name for name in takes if name in given)
            texts = self.texts(model, given, modality)
            found[modality] = self._prune(model, modality, texts, names, *(given[name] for name in names))
            read |= set(names)
        for name in read:
            del given[name]
        return found

    def positions(self, model: Any, given: Mapping[str, Any], mask: Tensor, generating: bool) -> Tensor:
        named = {**given, "attention_mask": mask}
        if "input_ids" not in given:
            return super().positions(model, given, mask, generating)
        if generating:
            named.pop("cache", None)
            return model._prepare_position_ids_for_generation(given["input_ids"], named)
        compute = getattr(model.base_model, "compute_3d_position_ids", None)
        if compute is not None:
            takes = inspect.signature(compute).parameters
            named = {name: named.get(name) for name in takes if name != "kwargs"}
            positions = compute(**named)
            if positions is not None:
                return positions
        return super().positions(model, given, mask, generating)

    def _prune(
        self, model: Any, modality: str, texts: PromptTexts | None, names: tuple[str, ...], *inputs: Any
    ) -> VisualRows:
        """The rows that stay of those that the dense model computes of images or videos."""
        encoder = model.base_model.visual_rows
        tokens, ((output, *_),) = encoder.encode(modality, encoder.needs, texts, names, *inputs)
        self.check_weighs(model, tokens)
        dense = Layout([len(one) for one in output.pooler_output], tokens.x.device)
        kept, protected = torch.zeros(2, dense.total, dtype=torch.bool, device=tokens.x.device)
        row = tokens.layout.spread(dense.starts) + tokens.position
        kept[row], protected[row] = True, tokens.protected
        grid, side = None, math.isqrt(dense.longest)
        if self.host.is_square:
            grid = square_grid(dense.batch, side, side, kept.device)
        return VisualRows(_output(output, tokens), kept, protected, tokens.keep_prob, tokens.counted_prob, grid)


def generic_composite(model: nn.Module) -> RowsComposite | None:
    """The composite of a vision-language model of transformers that has none of its own; None for another model."""
    is_own = type(model).__module__.startswith("transformers.models.")
    if not is_own or not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        return None
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return None
    reason = None
    if model.config.is_encoder_decoder:
        reason = "its text decoder attends to the visual tokens of an encoder"
    elif not any(hasattr(model.base_model, name) for name in ("language_model", "text_model")):
        reason = "it has no language model that visual tokens enter"
    elif getattr(type(model), "generate", None) is not GenerationMixin.generate:
        reason = "its `generate` is its own, and reads pixels"
    if reason is not None:
        raise TypeError(f"cannot prune a {type(model).__name__}: {reason}. Its image tower by itself may have a host")
    return RowsComposite(model)


def _rows(model: nn.Module, output: Any) -> tuple[Tensor, list[int], Tensor | None]:
    """The rows of all images [rows, dim], how many each has, and further levels [rows, levels, dim], or None.

    TypeError for a model that gives something else.
    """
    pooled, levels = output.pooler_output, getattr(output, "deepstack_features", None)
    if not all(isinstance(one, Tensor) and one.dim() == 2 for one in pooled):
        raise TypeError(f"the images of a {type(model).__name__} give no list of visual tokens, and cannot be pruned")
    stacked = None
    if levels is not None:
        if not all(isinstance(one, Tensor) for level in levels for one in level):
            raise TypeError(
                f"a {type(model).__name__} has deeper features in a form that is not known: it cannot be pruned"
            )
        stacked = torch.stack([torch.cat(list(level)) for level in levels], 1)
    return torch.cat(list(pooled)), [len(one) for one in pooled], stacked


def _output(output: Any, tokens: PackedTokens) -> ModelOutput:
    """What stays, in the form in which the dense model gave all: a list of images, or one tensor."""
    levels = tokens.columns[_LEVELS].unbind(1) if _LEVELS in tokens.columns else None
    short = split_by_image(type(output), tokens.x, tokens.layout.lengths, levels)
    if isinstance(output.pooler_output, Tensor):
        short["pooler_output"] = tokens.unpack()[0] if tokens.layout.is_uniform else tokens.x[None]
    return short
