"""What every host must say of its tower, how the right host is found, and the few lines that several hosts share."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import precision, segments
from ..attention import PairBias
from ..layers.site import Site
from ..pruner import PrunedEncoder
from ..registry import hosts
from ..tokens import Layout, PackedTokens
from ..traces import Decoded
from .refusals import dotted, refusal

M = TypeVar("M", bound=nn.Module)

# a module, or a top-level package -> module of this package
_ROOMS = {
    "timm": "timm",
    "open_clip": "open_clip",
    "open_clip.hf_model": "open_clip_hf",
    "transformers": "transformers",
    "vltprune": "blip",
}


class Host(ABC):
    """Takes towers of one type apart. Stateless; speaks in the tower's own submodules and leaves them as they are.

    A forward pass is `open`, then for each block `qkv`, attention, `mix`, `feed`, then `close`. `beside` is what a block
    gets besides its tokens: rotary tables, biases, the memory that it cross-attends to, or None. `call` and `answer` stand
    at its two ends, for towers that are called by keywords and answer in more than one form.
    """

    tower: str = "image"
    encoder: ClassVar[type[PrunedEncoder]] = PrunedEncoder  # with what the library reads of such a tower

    @classmethod
    def of(cls, module: nn.Module) -> Host:
        """The host for a module of the registered type."""
        return cls()

    def check(self, tower: nn.Module) -> None:  # noqa: B027  (most towers have nothing more to check)
        """TypeError or ValueError, with what is supported, for a tower of the right type with parts we cannot take apart."""

    def call(self, tower: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        """The positional inputs of `open` for a call tower(*inputs, **named). TypeError for arguments that it lacks.

        A keyword that the dense tower has as well, and that says what it says by default, may be there.
        """
        if named:
            own, dense = (inspect.signature(call).parameters for call in (self.open, tower.forward))
            named = {
                name: value
                for name, value in named.items()
                if name in own or name not in dense or value is not dense[name].default
            }
        bound = inspect.signature(self.open).bind(tower, *inputs, **named)
        bound.apply_defaults()
        return bound.args[1:]

    def answer(self, tower: nn.Module, out: Any, **named: Any) -> Any:
        """What `close` returned, in the form that the call's keywords ask for."""
        return out

    @abstractmethod
    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]: ...

    @abstractmethod
    def site(self, tower: nn.Module, depth: int, name: str) -> Site:
        """The room of block `depth`; `name` is the tower's name in its model."""

    @abstractmethod
    def open(self, tower: nn.Module, *inputs: Any) -> tuple[PackedTokens, tuple[Any, ...]]:
        """All before the first block. Returns the tokens, and one `beside` for each block. ValueError for bad input."""

    @abstractmethod
    def qkv(self, block: nn.Module, tokens: PackedTokens, beside: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value, each [total, heads, head_dim], as they enter the dot product."""

    @abstractmethod
    def scale(self, block: nn.Module) -> float:
        """What the dot products are multiplied by."""

    def pairs(self, block: nn.Module, tokens: PackedTokens, beside: Any) -> PairBias | None:
        """What the dot products get for how far apart two tokens stood; None for nothing."""
        return None

    @abstractmethod
    def mix(self, block: nn.Module, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        """Output projection, scale, drop path, residual (and norm): context [total, heads, head_dim]."""

    @abstractmethod
    def feed(self, block: nn.Module, tokens: PackedTokens, beside: Any) -> PackedTokens:
        """The rest of the block: cross-attention, MLP."""

    @abstractmethod
    def close(self, tower: nn.Module, tokens: PackedTokens, beside: tuple[Any, ...]) -> Any:
        """Final norm and pooling: what tower(*inputs) returns."""

    def padded_length(self, *inputs: Any) -> int | None:
        """Tokens an instance that the dense tower computes on, where its inputs have padding; None where they have none."""
        return None

    def causal(self, tower: nn.Module) -> bool:
        """Whether a token sees only what stands before it."""
        return False

    def pools_free(self, tower: nn.Module) -> bool:
        """Whether what the tower returns is made of unprotected tokens alone, so that one at least must stay."""
        return False

    def recomputes(self, tower: nn.Module) -> bool:
        """Whether the tower was told to save memory in training by recomputing its blocks (gradient checkpointing)."""
        return bool(getattr(tower, "grad_checkpointing", False))

    def mixes_affinely(self, block: nn.Module) -> bool:
        """Whether `mix` is x + A(context) with affine A, so that tokens may be averaged before it."""
        return False

    def attention_dropout(self, block: nn.Module) -> float:
        """Dropout on the attention weights, zero outside training."""
        return 0.0


class Composite(ABC):
    """A model of several towers that share a guide."""

    @classmethod
    def of(cls, module: nn.Module) -> Composite:
        return cls()

    @abstractmethod
    def towers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Host]]:
        """The dense towers by name, each with its host."""

    @abstractmethod
    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        """A model like `model` that runs these towers and shares everything else; `model` stays as it is."""

    def listeners(self, model: nn.Module) -> dict[str, Site]:
        """What the guide aligns with the towers and nobody prunes, by name; one site each."""
        return {}

    def head_macs(self, model: nn.Module) -> float:
        """MACs of what stands behind the towers, once an instance."""
        return 0.0

    def decoder_macs(self, model: nn.Module, decoded: Iterable[Decoded], memory: int) -> float:
        """MACs of a decoder behind the towers that did this, looking at memories of so many tokens, padding included."""
        return 0.0


class WithTowers(Composite):
    """A model that holds its towers as children. `names`: what they are called there, by what the towers are called here."""

    names: ClassVar[Mapping[str, str]]

    def towers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Host]]:
        children = {tower: getattr(model, name) for tower, name in self.names.items()}
        return {tower: (child, find_host(child)) for tower, child in children.items()}

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        for tower, name in self.names.items():
            model = with_submodule(model, name, towers[tower])
        return model


class ImageAndText(WithTowers):
    """A model that holds its towers as `visual` and `text`."""

    names: ClassVar = {"image": "visual", "text": "text"}


def find_host(tower: nn.Module) -> Host:
    """The host of a tower, by exact type. TypeError, with what is supported, for a type or block we cannot take apart."""
    found = _find(tower)
    if not isinstance(found, Host):
        for base in type(tower).__mro__:
            _load_hosts(base)
        raise refusal(tower, _find, supported)
    found.check(tower)
    return found


def find_composite(model: nn.Module) -> Composite | None:
    """The composite of a model of several towers, None for anything else."""
    found = _find(model)
    return found if isinstance(found, Composite) else None


def supported() -> str:
    """The types that have a host, for messages."""
    for room in _ROOMS.values():
        with contextlib.suppress(ImportError):  # a library that is not there, or too old
            importlib.import_module(f"{__package__}.{room}")
    return ", ".join(hosts.names())


def _find(module: nn.Module) -> Host | Composite | None:
    _load_hosts(type(module))
    name = dotted(type(module))
    if name not in hosts:
        return None
    cls: Any = hosts[name]
    return cls.of(module)


def _load_hosts(cls: type) -> None:
    """Register the hosts of the library that a class is from."""
    room = _ROOMS.get(cls.__module__) or _ROOMS.get(cls.__module__.partition(".")[0])
    if room is not None:
        importlib.import_module(f"{__package__}.{room}")


def check_blocks(
    tower: nn.Module, blocks: Iterable[nn.Module], known: Mapping[type, Sequence[type]], attention: str = "attn"
) -> None:
    """TypeError unless each block's type is a key of `known` and its `attention` is of one of the types listed there."""
    for depth, block in enumerate(blocks):
        part: Any = block if type(block) not in known else attrgetter(attention)(block)
        if part is block or type(part) not in known[type(block)]:
            pairs = "; ".join(f"{b.__name__} with {', '.join(a.__name__ for a in attns)}" for b, attns in known.items())
            raise TypeError(
                f"cannot prune this {type(tower).__name__}: block {depth} has a {dotted(type(part))}, which no host takes "
                f"apart. Supported blocks: {pairs}"
            )


def with_submodule(model: M, name: str, new: nn.Module) -> M:
    """The same model with one child exchanged; it shares every parameter, and `model` stays as it is."""
    out = _beside(model)
    out._modules[name] = new
    return out


def sharing(model: M) -> M:
    """A model of the same parameters in modules of its own: what is hooked to them, the modules of `model` do not notice."""
    out = _beside(model)
    for name, child in model._modules.items():
        out._modules[name] = child if child is None else sharing(child)
    return out


def _beside(model: M) -> M:
    """The same module once more, which shares its parameters, buffers and children.

    Parameters and buffers stand in the same tables, so that one that is replaced (`to`, `load_state_dict(assign=True)`) is
    replaced in both.
    """
    out = copy.copy(model)
    shared = ("_parameters", "_buffers")
    out.__dict__ = {
        key: value.copy() if isinstance(value, dict) and key not in shared else value
        for key, value in model.__dict__.items()
    }
    return out


def drop_path(module: nn.Module, branch: Tensor, layout: Layout) -> Tensor:
    """Stochastic depth per instance, on packed tokens: branch [total, dim].

    timm's DropPath drops along the first dimension, which here are tokens; its probability and scaling are read instead.
    """
    probability: Any = getattr(module, "drop_prob", 0.0)
    if not module.training or not probability:
        return branch
    keep = 1 - probability
    mask = branch.new_empty(layout.batch).bernoulli_(keep)
    if getattr(module, "scale_by_keep", True):
        mask = mask / keep
    return branch * mask[layout.instance, None]


def is_affine(projection: nn.Module) -> bool:
    """Whether a projection is certain to be x W^T + b.

    An adapter, a quantized layer or a hook may compute anything, and then tokens are averaged behind it.
    """
    if type(projection) is nn.Identity:
        return True
    if type(projection) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return False
    weight: Any = projection.weight
    return type(weight) is nn.Parameter and not (projection._forward_hooks or projection._forward_pre_hooks)


def weighted_mean(tokens: PackedTokens, counted: Tensor) -> Tensor:
    """Mean over the counted [total] tokens of each instance, [batch, dim]; a merged token weighs as many as it stands for."""
    x = precision.single(tokens.x)  # in half a sum of many tokens overflows
    size = counted.to(x.dtype) * tokens.weight
    mean = segments.sum(x * size[:, None], tokens.layout) / segments.sum(size, tokens.layout)[:, None]
    return mean.to(tokens.x.dtype)


def by_tiles(function: Callable[[Tensor], Tensor], x: Tensor, rows: int = 640) -> Tensor:
    """function(x) for a function that acts row by row, a tile of rows at a time: x [total, dim].

    An MLP's hidden layer then stays in cache, which on CPUs is worth more than the larger matrix product; elsewhere, and
    where autograd records, it is one call.
    """
    if x.device.type != "cpu" or len(x) <= rows or torch.is_grad_enabled():
        return function(x)
    out = torch.empty_like(x)
    tiles = -(-len(x) // rows)
    for tile, space in zip(x.tensor_split(tiles), out.tensor_split(tiles), strict=True):
        space.copy_(function(tile))
    return out
