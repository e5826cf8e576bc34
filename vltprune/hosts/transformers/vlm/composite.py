"""VlmComposite: composite of an image tower and a language model, between which visual tokens are pruned."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....core.tokens import PackedTokens
from ....layers import current_query
from ....pruning.decode_stats import DecodeStats
from ....pruning.encoder import PrunedEncoder
from ....pruning.model import get_pruning
from ....pruning.trace import active_collectors
from ...base import Composite, Host, LanguageCost
from ...find import lookup_host
from ...graft import with_descendant
from ...soft import refuse_soft_tokens
from ..saving import with_pruning_saved
from .call_inputs import PIXELS, check_inputs, check_mask, mask_of, refuse_pixels
from .language_cost import measure_language, report_prompts
from .placed_rows import PlacedRows
from .prompt import ShortPrompt, VisualTokens, last_before_answer, text_positions
from .pruned import PrunedVlm, pruned_copy
from .texts import PromptTexts, read_texts
from .turns import CachedPrompt, Turn, memory_of, recall
from .visual_rows import VisualRows
from .windows import with_whole_windows


@dataclass(frozen=True)
class ShortCall:
    """A call with pruned visual tokens.

    Attributes:
        inputs: The inputs of the dense model.
        visual: Which of its tokens are visual; None for a call without images.
        cached: What its cache will remember; None where there are no tokens.
    """

    inputs: dict[str, Any]
    visual: VisualTokens | None
    cached: CachedPrompt | None

    @property
    def is_short(self) -> bool:
        """Whether tokens are gone, of this call or of those that a cache holds."""
        return self.cached is not None and not self.cached.prompt.is_whole


class VlmComposite(Composite):
    """Composite of an image tower and a language model. The latter is pruned where `at` names it, and needs a host only there.

    Args:
        places: The name of each tower -> its dotted name in the model.

    Attributes:
        is_block_exempt: Whether tokens of a prompt that see each other both ways do so across sliding windows.
        first_position: The position of a prompt's first token in `forward`; in `generate` it is 0.
        key: Tells caches of this pruned model from others.
    """

    is_block_exempt: ClassVar[bool] = False
    first_position: ClassVar[int] = 0

    def __init__(self, places: Mapping[str, str]):
        self.places = places
        self.key = uuid.uuid4().hex
        self._cost: LanguageCost | None = None

    @abstractmethod
    def image_tower(self, model: nn.Module) -> tuple[nn.Module, Host]:
        """The image tower and its host."""

    @abstractmethod
    def look(self, model: PrunedVlm, given: dict[str, Any]) -> dict[str, VisualRows]:
        """Run the pruned image tower.

        Args:
            model: The pruned model.
            given: All inputs of a call; what only the tower reads is taken out.

        Returns:
            The rows that stay, by modality.
        """

    def positions(self, model: PrunedVlm, given: Mapping[str, Any], mask: Tensor, generating: bool) -> Tensor:
        """The positions that the dense model gives the tokens of the whole prompt.

        Args:
            model: The pruned model.
            given: All inputs of the call.
            mask: [batch, length], nonzero on tokens.
            generating: Whether `generate` is called.

        Returns:
            [batch, length] int64, or [axes, batch, length].
        """
        return text_positions(mask, counts_padding=not generating) + (0 if generating else self.first_position)

    def towers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Host]]:
        found = {"image": self.image_tower(model)}
        language = model.get_submodule(self.places["language"])
        host = lookup_host(language)
        if host is not None:
            found["language"] = (language, host)
        return found

    def why_without(self, model: nn.Module, tower: str) -> str:
        if tower != "language":
            return ""
        language: Any = model.get_submodule(self.places["language"])
        kinds = getattr(language.config.get_text_config(), "layer_types", None) or ()
        reason = "which no host runs"
        if any("linear" in kind or "conv" in kind for kind in kinds):
            reason = "whose recurrent layers keep what they have read of tokens that go"
        return f". Its language model is a {type(language).__name__}, {reason}: prune before it, with place='output'"

    def exported_alone(self, model: nn.Module) -> dict[str, str]:
        return {}

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        for tower, new in towers.items():
            # a language model that no stage prunes stays the dense one: stock caches and kernels
            if not (tower == "language" and isinstance(new, PrunedEncoder) and not len(new.pruners)):
                model = with_descendant(model, self.places[tower], new)
        base: Any = model.base_model
        if base is not model:
            base.register_forward_pre_hook(refuse_pixels, with_kwargs=True)
        return with_pruning_saved(pruned_copy(model, self))

    def language_tower(self, model: PrunedVlm, visual: VisualTokens | None) -> PrunedEncoder | None:
        """The language model where its host runs it, and not its own code.

        That is so where it is pruned, where it reads tokens that are there in part, and where a guide aligns it with images: in
        a call with gradients that somebody collects.

        Args:
            model: The pruned model.
            visual: The visual tokens of the prompt; None for a text.
        """
        encoder = get_pruning(model).towers.get("language")
        if encoder is None or len(encoder.pruners):
            return encoder
        aligns = encoder.guide is not None and not encoder.guide.queried
        aligns = aligns and torch.is_grad_enabled() and bool(active_collectors())
        is_soft = visual is not None and visual.keep_prob is not None
        return encoder if is_soft or (aligns and visual is not None) else None

    def runnable(self, model: PrunedVlm, call: ShortCall) -> Any:
        """The model as its dense class, with the language model that `language_tower` says and windows of the whole prompts.

        Args:
            model: The pruned model.
            call: What `shorten` returned.

        Returns:
            What takes its inputs.
        """
        view, encoder = model.as_dense(), self.language_tower(model, call.visual)
        language = inside = model.get_submodule(self.places["language"])
        if encoder is not None and not len(encoder.pruners):
            encoder.training = model.training  # no child of the model, whose modes it has
            language = encoder
        if call.cached is not None and call.is_short:
            language = with_whole_windows(language, model.config, call.cached.prompt, self.is_block_exempt)
        return view if language is inside else with_descendant(view, self.places["language"], language)

    def check_weighs(self, model: PrunedVlm, tokens: PackedTokens) -> None:
        """Check that the language model can weigh tokens.

        Args:
            model: The pruned model.
            tokens: What enters it.

        Raises:
            ValueError: For tokens that are kept in part, where no host runs the language model.
        """
        if "language" not in get_pruning(model).towers:
            refuse_soft_tokens(
                tokens, "a language model without a host", "prune a model whose language model docs/supported.md lists"
            )

    def shorten(
        self, model: PrunedVlm, given: Mapping[str, Any], generating: bool = False, repeats: int = 1
    ) -> ShortCall:
        """Prune the visual tokens of a call. The tokens that a cache holds are not pruned again, and their images not read.

        Args:
            model: The pruned model.
            given: Inputs of `forward` or `generate` by name.
            generating: Whether it is `generate`.
            repeats: How many times that repeats each prompt.

        Returns:
            The call of the dense model.

        Raises:
            ValueError: For images and prompts that do not fit each other, and for caches that another model filled.
        """
        named = {name: value for name, value in given.items() if value is not None}
        if "past_key_values" in named:
            named["cache"] = named.pop("past_key_values")
        has_images = any(pixels in named for pixels in PIXELS.values())
        turn = self._turn(model, named, generating, repeats)
        read = named if turn is None else turn.inputs
        placeholders = self.placeholders(model)
        check_inputs(type(model).__name__, read, placeholders, turn is not None)
        if turn is None and not has_images:
            return ShortCall(named, None, self._cached_text(model, named, generating))
        mask = mask_of(model, read, generating)
        # the mask says which of the prompt is text
        rest: dict[str, Any] = {**read, "attention_mask": mask}
        rows = self.look(model, rest) if has_images else {}
        all_again = turn is not None and self._fits_whole(model, rows, turn)
        if turn is not None and all_again:
            rows = self._of_new(model, rows, turn)
        ids = read.get("input_ids", mask)  # a text may come as embeddings
        placed = PlacedRows.from_ids(ids, rows, placeholders)
        positions = self._positions(model, read, mask, generating, turn, all_again)
        stays = placed.is_kept()
        if not stays.all():
            stays = stays & (mask != 0)
        # transformers drops a mask without padding, and would then take gaps of positions for ends of sequences
        extra = int(generating and named.get("use_cache") is False)
        prompt = ShortPrompt.from_mask(stays, bool((mask[:, -1] == 0).any()), extra, in_place=turn is not None)
        short = prompt.inputs(rest, self.pad_id(model))
        short["position_ids"] = prompt.gather(positions)
        cached = memory_of(self.key, prompt, positions - (0 if generating else self.first_position), turn)
        kept = None
        if has_images:
            kept = self._kept(model, prompt, placed, mask, short)
            if kept.keep_prob is not None and "cache" in named:
                raise ValueError(
                    "a cache cannot hold tokens that soft training keeps in part: give the prompt without a cache"
                )
            last = generating or named.get("logits_to_keep") == 1
            # behind a prompt a host reports nothing
            has_trace = turn is None and self.language_tower(model, kept) is not None
            before = None if turn is None else turn.counts()
            seen = prompt.gather(mask) != 0, prompt.gather(placed.is_visual())
            report_prompts(seen, (mask != 0, placed.is_visual()), last, has_trace, kept.expected, before)
        if turn is not None:
            short = {**turn.joined(short, self.pad_id(model), list(placeholders.values())), "cache": named["cache"]}
        return ShortCall(short, kept, cached)

    def _kept(
        self, model: PrunedVlm, prompt: ShortPrompt, placed: PlacedRows, mask: Tensor, short: dict[str, Any]
    ) -> VisualTokens:
        """Which tokens of a short prompt are visual. Their features are added to its inputs."""
        short["mm_encoder_outputs"] = {
            modality: found.output for modality, found in placed.rows.items() if len(found.output["pooler_output"])
        }
        is_visual = prompt.gather(placed.is_visual())
        grid, labels = placed.grid() if self._reads_grid(model) else None, short.get("labels")
        is_text = (prompt.gather(mask) != 0) & ~is_visual
        source = placed.source()
        return VisualTokens(
            is_visual & prompt.gather(placed.is_free()),
            *(prompt.gather(weight, 1) for weight in placed.weights()),
            grid=None if grid is None else prompt.gather(grid, -1),
            last=None if labels is None else last_before_answer(labels, is_text),
            source=None if source is None else prompt.gather(source, -1),
        )

    def _turn(self, model: PrunedVlm, named: Mapping[str, Any], generating: bool, repeats: int) -> Turn | None:
        """A call on a filled cache, split; None for another. ValueError for one that cannot be."""
        past = int(named["cache"].get_seq_length()) if "cache" in named else 0
        if not past:
            return None
        name = "input_ids" if generating or "input_ids" in named else "inputs_embeds"
        if name not in named:
            raise ValueError(f"the cache holds {past} tokens, and {name} is missing: give the tokens of the prompt")
        mask = named.get("attention_mask")
        check_mask(mask)
        found = recall(named["cache"], self.key, len(named[name]), repeats)
        if mask is None and generating:
            mask = mask_of(model, named, generating)
        return Turn.from_call(found, past, named, mask, generating)

    def _fits_whole(self, model: PrunedVlm, rows: Mapping[str, VisualRows], turn: Turn) -> bool:
        """Whether images are those of the whole prompts, and not of the new tokens alone."""

        placeholders = self.placeholders(model)

        def fits(ids: Tensor) -> bool:
            return all((ids == placeholders[one]).sum() == len(found.kept) for one, found in rows.items())

        return turn.is_whole and not fits(turn.inputs["input_ids"]) and fits(turn.given["input_ids"])

    def _of_new(self, model: PrunedVlm, rows: Mapping[str, VisualRows], turn: Turn) -> dict[str, VisualRows]:
        """The rows of new tokens, of those of the whole prompts."""
        ids, placeholders = turn.given["input_ids"], self.placeholders(model)
        return {one: found.select(turn.is_new(ids == placeholders[one])) for one, found in rows.items()}

    def _positions(
        self,
        model: PrunedVlm,
        read: Mapping[str, Any],
        mask: Tensor,
        generating: bool,
        turn: Turn | None,
        all_again: bool,
    ) -> Tensor:
        """The positions of the tokens that a call reads, [batch, length] or [axes, batch, length]."""
        positions = read.get("position_ids")
        if positions is not None:
            positions = positions[..., -mask.shape[1] :]
            return positions.expand(*positions.shape[:-2], *mask.shape)
        if turn is None:
            return self.positions(model, read, mask, generating)
        if all_again:
            return self.positions(model, turn.given, turn.mask, generating)[..., -turn.new :]
        return self.positions(model, read, mask, generating) + turn.start[:, None]

    def _cached_text(self, model: PrunedVlm, named: Mapping[str, Any], generating: bool) -> CachedPrompt | None:
        """What a cache remembers of prompts without images."""
        tokens, mask = named.get("input_ids", named.get("inputs_embeds")), named.get("attention_mask")
        if tokens is None:
            return None
        every = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is None and "input_ids" in named:
            mask = mask_of(model, named, generating)
        if mask is None or getattr(mask, "shape", None) != every.shape:
            mask = every
        positions = named.get("position_ids")
        if positions is None:
            positions = text_positions(mask, counts_padding=not generating)
        elif not generating:
            positions = positions - self.first_position
        positions = positions.expand(*positions.shape[:-2], *every.shape)
        return memory_of(self.key, ShortPrompt.from_mask(every), positions)

    def _reads_grid(self, model: PrunedVlm) -> bool:
        """Whether layers of the language model ask where visual tokens stand in their images."""
        language = get_pruning(model).towers.get("language")
        return language is not None and any(getattr(one, "reads_grid", False) for one in language.pruners.values())

    def texts(self, model: PrunedVlm, given: Mapping[str, Any], modality: str) -> PromptTexts | None:
        """The texts of the prompts of a call, where parts compare visual tokens with a text and the caller gave none.

        Args:
            model: The pruned model.
            given: All inputs of the call.
            modality: "image" or "video".
        """
        pruning = get_pruning(model)
        reads = pruning.guide is not None and pruning.guide.queried and bool(pruning.towers["image"].pruners)
        if not reads or "input_ids" not in given or current_query() is not None:
            return None
        embed: Any = pruning.host.get_input_embeddings
        return read_texts(embed(), given, self.placeholders(model), modality)

    def language_cost(self, model: nn.Module) -> LanguageCost:
        if self._cost is None:
            cost = measure_language(model, model.get_submodule(self.places["language"]))
            self._cost = replace(cost, row=self.projector_macs(model))
        return self._cost

    def projector_macs(self, model: nn.Module) -> float:
        """MACs of the projector per visual token, where they are not counted with the image tower."""
        return 0.0

    def decoder_macs(self, model: nn.Module, decoded: Iterable[DecodeStats], memory: int) -> float | Tensor:
        cost = self.language_cost(model)
        return sum(
            cost.token * call.tokens + cost.pair * call.pairs + cost.word * call.words + cost.row * call.rows
            for call in decoded
        )

    def placeholders(self, model: Any) -> dict[str, int]:
        """The ids of placeholders, by modality.

        Args:
            model: The model, dense or pruned.
        """
        ids = {modality: getattr(model.config, f"{modality}_token_id", None) for modality in PIXELS}
        return {modality: one for modality, one in ids.items() if one is not None}

    def pad_id(self, model: Any) -> int:
        """An id for padding: any that is no placeholder."""
        pad = model.config.get_text_config().pad_token_id
        return 0 if pad is None or pad < 0 else pad
