"""PrunedVlm: a vision-language model that prunes visual tokens, called and generated from as the dense model is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ....pruning.model import get_pruning
from .prompt import visual_tokens
from .turns import remember
from .whole_prompt import WholeLogits, WholePrompt, WholeStreamer, whole_prompt, with_whole_prompts

# what wrappers, hooks and `compile` set on a model itself, bound to it: its calls
_CALLS = ("forward", "generate", "_compiled_call_impl")
_LENGTHS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
_REPEATS = ("num_beams", "num_return_sequences")


class Shortens(Protocol):
    """What prunes the inputs of a call: a `VlmComposite`."""

    def shorten(
        self, model: PrunedVlm, given: Mapping[str, Any], generating: bool = False, repeats: int = 1
    ) -> Any: ...

    def look(self, model: PrunedVlm, given: dict[str, Any]) -> Mapping[str, Any]: ...

    def runnable(self, model: PrunedVlm, call: Any) -> Any: ...


class PrunedVlm(nn.Module):
    """A copy of a vision-language model with pruned towers; beside it, the class of the dense model is a base of its class.

    `forward` and `generate` take what those of the dense model take. They look at the images, prune, shorten the prompts and
    then run the dense class' own code.

    Attributes:
        dense_class: The class of the dense model.
        composite: How its towers are run.
    """

    dense_class: ClassVar[type[nn.Module]]
    # transformers evaluates the annotations of a model's class: names of `TYPE_CHECKING` are not there
    composite: Any

    def as_dense(self) -> Any:
        """This model, with all it has, seen as its dense class: its `forward` and `generate` take what is pruned already.

        They are those of the class, whatever was set on this model itself.
        """
        view, own = self.dense_class.__new__(self.dense_class), vars(self)
        is_wrapped = any(name in own for name in _CALLS)
        view.__dict__ = {name: value for name, value in own.items() if name not in _CALLS} if is_wrapped else own
        return view

    def forward(self, *args: Any, **named: Any) -> Any:
        """Run the dense model's `forward` on what stays of the prompt.

        Args:
            *args: As in the dense model.
            **named: As in the dense model; those that are one value per token are of the whole prompt.

        Returns:
            What the dense model returns. The loss is of the tokens that stay. Logits are of the whole prompt: where a token is
            gone stand those of the last one that is left before it. All else that is one row per token is of those that stay.

        Raises:
            ValueError: For inputs that do not fit the model or each other.
        """
        owner, model = _generating.get()
        if owner is self:
            # `generate` has pruned, and calls what wraps this method
            return self.dense_class.forward(model, *args, **named)
        given = _bound(MethodType(self.dense_class.forward, self), *args, **named)
        call = self.composite.shorten(self, given)
        short = call.inputs
        if call.visual is not None and call.visual.keep_prob is not None:
            # a cache does not know that tokens are there in part
            short["use_cache"] = False
        whole = _whole_logits(call, given)
        config: Any = self.config
        is_tuple = whole is not None and not _first(given.get("return_dict"), config.return_dict)
        if whole is not None:
            short["logits_to_keep"] = whole.number
        if is_tuple:
            short["return_dict"] = True
        with visual_tokens(call.visual):
            out = self.composite.runnable(self, call).forward(**short)
        remember(call.cached, short.get("cache"), out)
        if whole is not None:
            out.logits = whole.expand(out.logits)
        return out.to_tuple() if is_tuple else out

    def get_image_features(self, *args: Any, **named: Any) -> Any:
        """The visual tokens that stay, as the dense model's `get_image_features` returns all of them.

        Args:
            *args: As in the dense model.
            **named: As in the dense model.

        Returns:
            An output whose `pooler_output` has the visual tokens.

        Raises:
            ValueError: In soft training, which keeps tokens in part.
        """
        return self._features("image", *args, **named)

    def _features(self, modality: str, *args: Any, **named: Any) -> Any:
        """What stays of images or videos, from the arguments of the dense model's `get_image_features` or its like."""
        self._refuse_soft(f"get_{modality}_features")
        given = _bound(getattr(self.as_dense(), f"get_{modality}_features"), *args, **named)
        given = {name: value for name, value in given.items() if value is not None}
        return self.composite.look(self, given)[modality].output

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **named: Any) -> Any:
        """Generate as the dense model does.

        Args:
            inputs: Token ids, where `input_ids` is not given.
            generation_config: As in the dense model.
            **named: All that the dense model's `generate` takes.

        Returns:
            The prompt as it was given, followed by the new tokens.

        Raises:
            ValueError: For inputs that do not fit the model or each other, for assisted decoding, and in soft training.
        """
        self._refuse_soft("generate")
        if inputs is not None:
            named["input_ids"] = inputs
        if named.get("assistant_model") is not None:
            raise ValueError(
                "assistant_model= drafts with a model that reads the whole prompt, and this one reads a part: leave it out"
            )
        language = get_pruning(self).towers.get("language")
        looks_up = self._setting("prompt_lookup_num_tokens", generation_config, named)
        if looks_up and language is not None and len(language.pruners):
            raise ValueError(
                "prompt_lookup_num_tokens= takes drafts out of the cache again, and layers that drop tokens have caches of "
                "different lengths: leave it out, or prune before the language model, place='output'"
            )
        prompt = named.get("input_ids")
        if prompt is not None:
            named |= self._new_lengths(prompt.shape[1], generation_config, named)
        beams, samples = (self._setting(name, generation_config, named) or 1 for name in _REPEATS)
        call = self.composite.shorten(self, named, generating=True, repeats=max(beams, samples))
        short, whole = call.inputs, None
        if max(beams, samples) > 1:
            self._check_repeats(short)
        if prompt is not None and not torch.equal(prompt, short["input_ids"]):
            whole = WholePrompt.from_short(
                prompt, short["input_ids"].shape[1], call.cached.prompt, call.cached.is_token
            )
            if short.get("streamer") is not None:
                short["streamer"] = WholeStreamer(short["streamer"], whole)
        with visual_tokens(call.visual), whole_prompt(whole):
            model = with_whole_prompts(self.composite.runnable(self, call))
            with _through_wrappers(self, model):
                out = model.generate(generation_config=generation_config, **short)
        # a search with beams leaves its last beams in the cache, and not those that it returns
        remember(call.cached if beams == 1 else None, short.get("cache"), out)
        if whole is None:
            return out
        if isinstance(out, Tensor):
            return whole.extend(out)
        out.sequences = whole.extend(out.sequences)
        return out

    def _refuse_soft(self, method: str) -> None:
        """ValueError in soft training, for a method that takes each token for whole."""
        if any(tower.decides_softly for tower in get_pruning(self).towers.values()):
            raise ValueError(
                f"{method} takes tokens for whole, and soft training keeps some in part: call model.eval() first"
            )

    def _new_lengths(self, length: int, generation_config: Any, named: dict[str, Any]) -> dict[str, int | None]:
        """Limits of the whole length, as numbers of new tokens behind a prompt of this length."""
        found: dict[str, int | None] = {}
        for whole, new in _LENGTHS.items():
            given = self._setting(whole, generation_config, named)
            if given and self._setting(new, generation_config, named) is None:
                found[new] = max(given - length, 0)
                named.pop(whole, None)
        return found

    def _setting(self, name: str, generation_config: Any, named: dict[str, Any]) -> Any:
        """A setting of `generate`: an argument, else that of the configuration given, else of the model's own."""
        values = (named.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name, None))
        return _first(*values)

    def _check_repeats(self, short: Mapping[str, Any]) -> None:
        """ValueError where transformers would repeat the features of one prompt for another."""
        outputs = [output["pooler_output"] for output in short.get("mm_encoder_outputs", {}).values()]
        joined = any(isinstance(features, Tensor) and len(features) == 1 for features in outputs)
        if joined and len(short["input_ids"]) > 1:
            raise ValueError(
                f"a {type(self).__name__} cannot repeat prompts whose images keep different numbers of tokens: generate from "
                "one prompt at a time, keep a fixed number, keep='count(...)', or leave num_beams and num_return_sequences out"
            )


_generating: ContextVar[tuple[PrunedVlm | None, Any]] = ContextVar("generating", default=(None, None))


@contextmanager
def _through_wrappers(pruned: PrunedVlm, model: nn.Module) -> Iterator[None]:
    """Have each step of `model.generate` call what wraps the `forward` of a pruned model: autocast, hooks, what is compiled.

    Args:
        pruned: The pruned model, to which wrappers are bound.
        model: It as its dense class. Within the `with` block, `pruned.forward` runs it.
    """
    wrappers = {name: value for name, value in vars(pruned).items() if name in _CALLS and name != "generate"}
    if wrappers:
        vars(model).update(wrappers)
    token = _generating.set((pruned, model))
    try:
        yield
    finally:
        _generating.reset(token)


def _bound(call: Callable[..., Any], *args: Any, **named: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = inspect.signature(call).bind(*args, **named).arguments
    further = bound.pop("kwargs", {})
    return {**bound, **further}


def _first(*values: Any) -> Any:
    """The first of values that is not None; None if all are."""
    return next((value for value in values if value is not None), None)


def _whole_logits(call: Any, given: Mapping[str, Any]) -> WholeLogits | None:
    """Where the logits of a shortened call stand in the prompts that were given; None where they are those already."""
    if not call.is_short:
        return None
    length, short = (_first(of.get("input_ids"), of.get("inputs_embeds")).shape[1] for of in (given, call.inputs))
    keep = call.inputs.get("logits_to_keep", 0)
    return WholeLogits.from_prompt(call.cached.prompt, call.cached.is_token[:, -short:], length, keep)


@functools.cache
def pruned_class(dense: type[nn.Module]) -> type[PrunedVlm]:
    """The class of pruned models of a dense class. It has the dense name, which files of transformers hold."""

    @functools.wraps(dense.forward)
    def forward(self: PrunedVlm, *args: Any, **named: Any) -> Any:
        return PrunedVlm.forward(self, *args, **named)

    # accelerate's `unwrap_model` would go on to what is wrapped, the dense forward
    del forward.__wrapped__
    vars(forward)["__signature__"] = inspect.signature(dense.forward)
    body: dict[str, Any] = {"dense_class": dense, "forward": forward}
    body |= {"__module__": dense.__module__, "__reduce_ex__": _reduce}
    if hasattr(dense, "get_video_features"):
        body["get_video_features"] = functools.partialmethod(PrunedVlm._features, "video")
    return type(dense.__name__, (PrunedVlm, dense), body)


def pruned_copy(model: nn.Module, composite: Shortens) -> PrunedVlm:
    """A model as a PrunedVlm, with the same children, parameters and attributes.

    Args:
        model: A copy of the dense model, with pruned towers.
        composite: How these are run.

    Returns:
        The pruned model.

    Raises:
        TypeError: For a `generate` that was set on the model itself: it would run the dense model.
    """
    if "generate" in vars(model):
        raise TypeError(
            f"the generate of this {type(model).__name__} was replaced on the object itself, bound to it: write "
            "`del model.generate`, prune, and replace that of the pruned model"
        )
    cls = pruned_class(type(model))
    pruned = cls.__new__(cls)
    pruned.__dict__ = {**model.__dict__, "composite": composite}
    return pruned


def _reduce(pruned: PrunedVlm, protocol: object) -> tuple[Any, ...]:
    """For pickle and copy: the class is made of the dense one again."""
    return _empty, (pruned.dense_class,), pruned.__dict__


def _empty(dense: type[nn.Module]) -> PrunedVlm:
    cls = pruned_class(dense)
    return cls.__new__(cls)
