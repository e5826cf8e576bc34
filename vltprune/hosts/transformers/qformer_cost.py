"""What stands behind the image tower of BLIP-2 and InstructBLIP: hooks record what it computes, for its MACs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...pruning.decode_stats import DecodeStats
from ...pruning.trace import report_decode_stats
from ...utils.modes import evaluating
from ..linear_maps import linear_macs, measure_macs

_PROJECTIONS = ("language_projection", "vision_projection", "text_projection", "itm_head")


@dataclass(frozen=True)
class PartStats(DecodeStats):
    """What one part behind the image tower did in a call.

    Attributes:
        tokens, words, pairs, memories, dense, visual, expected_visual, gathered: As in `DecodeStats`.
        part: Its name, as `_parts` has it.
        looks: Those of its tokens that attended to a memory.
        memory: Tokens of each such memory; None for the image tower's.
    """

    part: str = ""
    looks: int = 0
    memory: int | None = None


@dataclass(frozen=True)
class PartCost:
    """MACs of one part behind the image tower.

    Attributes:
        token: Per token.
        pair: Per pair of tokens of a row.
        look: Per token that attends to a memory, in addition.
        key: Per token of a memory whose keys and values are computed.
        match: Per pair of a token that attends to a memory and a token of it.
    """

    token: float
    pair: float = 0.0
    look: float = 0.0
    key: float = 0.0
    match: float = 0.0

    def macs(self, call: PartStats, memory: int) -> float:
        """Compute the MACs of a call.

        Args:
            call: What the part did.
            memory: Tokens of each image that the image tower left, padding included.

        Returns:
            The MACs.
        """
        memory = memory if call.memory is None else call.memory
        own = self.token * call.tokens + self.pair * call.pairs + self.look * call.looks
        return own + (self.key * call.memories + self.match * call.looks) * memory


def _parts(model: Any) -> dict[str, Any]:
    """The parts behind the image tower of a model, dense or pruned."""
    found = {name: getattr(model, name) for name in ("qformer", *_PROJECTIONS) if hasattr(model, name)}
    if hasattr(model, "language_model"):
        language = model.language_model
        if language.config.is_encoder_decoder:
            found["encoder"] = language.get_encoder()
        found |= {"decoder": language.get_decoder(), "words": language.get_output_embeddings()}
    return {name: part for name, part in found.items() if part is not None}


def add_hooks(model: nn.Module) -> None:
    """Have the parts behind the image tower report what they compute.

    Args:
        model: A model whose parts are copies.
    """
    for name, part in _parts(model).items():
        if name == "qformer":
            part.register_forward_hook(_record_queries, with_kwargs=True)
        elif name in ("encoder", "decoder"):
            part.register_forward_hook(partial(_record_tokens, name), with_kwargs=True)
        else:
            part.register_forward_hook(partial(_record_rows, name))


def _record_queries(qformer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
    """Hook after a Q-Former: only its queries attend to the image, not the text behind them."""
    rows, tokens = out[0].shape[:2]
    queries = 0
    if named.get("encoder_hidden_states") is not None:
        length = named.get("query_length")
        queries = named["query_embeds"].shape[1] if length is None else length
    memories = rows if queries else 0
    stats = PartStats(rows * tokens, pairs=rows * tokens**2, memories=memories, part="qformer", looks=rows * queries)
    report_decode_stats(stats)


def _record_tokens(name: str, stack: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
    """Hook after a stack of layers of a language model, whose cache holds the new tokens already."""
    rows, new = out[0].shape[:2]
    cache, memory = named.get("cache"), named.get("encoder_hidden_states")
    seen = new if cache is None else int(cache.get_seq_length())
    stats = PartStats(rows * new, pairs=rows * new * seen, part=name)
    if memory is not None:
        # a cache keeps the keys and values of the first call
        memories = rows if seen == new else 0
        stats = replace(stats, memories=memories, looks=rows * new, memory=memory.shape[1])
    report_decode_stats(stats)


def _record_rows(name: str, linear: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    """Hook after a linear layer."""
    report_decode_stats(PartStats(out.numel() // out.shape[-1], part=name))


def measure_parts(model: nn.Module) -> dict[str, PartCost]:
    """Measure what the parts behind the image tower cost, by their own calls on few tokens.

    Args:
        model: The dense model.

    Returns:
        The cost of each part, by its name.
    """
    parts = _parts(model)
    with evaluating(model):
        costs = {name: PartCost(linear_macs(part)) for name, part in parts.items()}
        for name in costs.keys() & {"encoder", "decoder"}:
            reads = name == "decoder" and "encoder" in parts
            costs[name] = _measure(partial(_run_stack, parts[name], reads))
        costs["qformer"] = _qformer_cost(parts["qformer"])
    return costs


def _qformer_cost(qformer: Any) -> PartCost:
    crosses = [layer.crossattention for layer in qformer.encoder.layer if layer.has_cross_attention]
    look = sum(linear_macs(cross.attention.query) + linear_macs(cross.output) for cross in crosses)
    cost = _measure(partial(_run_qformer, qformer))
    return replace(cost, token=cost.token - look, look=look)


def _run_qformer(qformer: Any, queries: int, memory: int) -> object:
    config, like = qformer.config, next(qformer.parameters())
    # InstructBLIP's embeds a text itself
    text = {"input_ids": None} if hasattr(qformer, "embeddings") else {}
    images = like.new_zeros(1, memory, config.encoder_hidden_size)
    return qformer(query_embeds=like.new_zeros(1, queries, config.hidden_size), encoder_hidden_states=images, **text)


def _run_stack(stack: Any, reads: bool, tokens: int, memory: int) -> object:
    weight = stack.get_input_embeddings().weight
    blank = weight.new_zeros(1, max(tokens, memory), weight.shape[1])
    beside = {"encoder_hidden_states": blank[:, :memory]} if reads else {}
    return stack(inputs_embeds=blank[:, :tokens], use_cache=False, **beside)


def _measure(run: Callable[[int, int], object]) -> PartCost:
    """The cost of a part that run(tokens, memory) calls on one row, all of whose tokens attend to the memory."""
    one, two, three = (measure_macs(run, tokens, 1) for tokens in (1, 2, 3))
    more, both = measure_macs(run, 1, 2), measure_macs(run, 2, 2)
    pair, match = (three - 2 * two + one) / 2, both - two - more + one
    return PartCost(two - one - 3 * pair - match, pair, key=more - one - match, match=match)
