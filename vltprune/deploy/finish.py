"""`finish`: a copy of a model for inference alone, in which what depends on weights alone is computed once."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..layers import AlignmentGuide
from ..pruning.model import find_pruning
from ..pruning.pruner import Pruner
from ..utils.wrappers import unwrapped
from .known_layers import activated_layers, patch_convolution
from .prepacked import Activation, PatchLinear, PrepackedLinear, has_hooks, prepacking_problem, refuse_training

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Finished:
    """The record of what `vltprune.finish` did, which `print(model.finished)` shows in a line.

    Attributes:
        prepacked: the names of linear layers, and of convolutions of patches, whose weights are reordered.
        fused: those among them that compute the activation behind them too.
        left: the names of the other linear layers, each with the reason.
        bytes: the size of the reordered weights.
        keeps_weights: whether the plain weights are there too, which the original has anyway.
    """

    prepacked: tuple[str, ...]
    fused: tuple[str, ...]
    left: Mapping[str, str]
    bytes: int
    keeps_weights: bool

    def __str__(self) -> str:
        instead = "beside" if self.keeps_weights else "in place of"
        text = f"{len(self.prepacked)} layers prepacked, {len(self.fused)} of them with their activation"
        text += f": {self.bytes / 1e6:.1f} MB of reordered weights {instead} the plain ones"
        reasons = [f"{number} ({reason})" for reason, number in Counter(self.left.values()).items()]
        return f"{text}; left as they are: {', '.join(reasons)}" if reasons else text


def finish(model: M, *, keep_weights: bool = True) -> M:
    """Makes a copy of a model, pruned or dense, that is for inference alone and faster on CPUs.

    Linear layers in single precision get their weight reordered by oneDNN, and compute a GELU or ReLU behind them in the same
    pass. Convolutions of patches become linear layers. A guide folds its maps into its anchors. Results are equal within
    rounding. Linear layers with hooks, parametrizations, tied or quantized weights, in another dtype or on another device stay
    as they are; `model.finished` has the reasons.

    The copy shares the weights that it does not replace with `model`, which stays as it is. Its parameters are frozen. It
    cannot be trained, saved, exported, frozen, cast, moved to another device or pickled: do that with `model`, and finish the
    result.
    `copy.deepcopy` copies it. A pruned model can be calibrated and measured as before, without effect on `model`.

    oneDNN prepares a layer for each number of rows when it meets it first, and keeps the last 1,024 preparations of a process
    (ONEDNN_PRIMITIVE_CACHE_CAPACITY): the first calls are slower, and so are batches whose total of tokens never comes again.

    Args:
        model: any module, such as `vltprune.prune`, timm, open_clip or transformers return.
        keep_weights: whether the plain weights stay too. They are faster below 4 and above 512 rows, and autocast and
            torch.compile need them. They take no memory as long as `model` is there. With False the reordered weights are the
            only ones once `model` is deleted.

    Returns:
        The copy, of the same class and in evaluation mode. It has `finished`, the `Finished` record.

    Raises:
        TypeError: for a model that is wrapped or finished already, and for one with adapters of peft.
    """
    _check(model)
    pruning = find_pruning(model)
    roots = (model,) if pruning is None else (pruning.host, model)
    names = {module: name for root in roots for name, module in root.named_modules()}
    replaced, left = _replacements(names, keep_weights)

    # deepcopy takes what is in the memo in place of a copy, wherever it is met
    memo: dict[int, object] = {id(module): new for module, new in replaced.items()}
    memo |= {id(tensor): alias for tensor, alias in _aliases(names)}
    finished = copy.deepcopy(model, memo)
    copies = [copied for module in names if isinstance(copied := memo.get(id(module)), nn.Module)]
    for module in copies:
        module.training = False
        if not isinstance(module, PrepackedLinear):
            # on each module, so that a refusal leaves those above it in evaluation mode
            object.__setattr__(module, "train", partial(_stay_in_evaluation, module))
        module.register_state_dict_pre_hook(_refuse_saving)
        module.register_load_state_dict_pre_hook(_refuse_loading)
        if isinstance(module, (Pruner, AlignmentGuide)):
            module.requires_grad_(False)
        if isinstance(module, AlignmentGuide):
            module.fold()
    layers = {names[old]: new for old, new in replaced.items() if isinstance(new, (PrepackedLinear, PatchLinear))}
    fused = tuple(name for name, layer in layers.items() if not getattr(layer, "is_affine", True))
    size = sum(layer.weight.nbytes for layer in layers.values())
    record = Finished(tuple(layers), fused, left, size, keep_weights)
    object.__setattr__(finished, "finished", record)
    return finished


def check_unfinished(model: nn.Module, instead: str) -> None:
    """TypeError for a model that `finish` made, or that has such a part.

    Args:
        model: any model.
        instead: what to do with the model that it was made from, for the message.
    """
    for module in model.modules():
        if isinstance(module, (PrepackedLinear, PatchLinear)) or isinstance(
            getattr(module, "finished", None), Finished
        ):
            raise TypeError(f"this model, or a part of it, is finished for inference already: {instead}")


def _check(model: nn.Module) -> None:
    """TypeError for a model that cannot be finished."""
    if unwrapped(model) is not model:
        raise TypeError(
            f"a {type(model).__name__} wraps a {type(unwrapped(model)).__name__}: finish that one, vltprune.unwrapped(model)"
        )
    check_unfinished(model, "finish the model that it was made from")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise TypeError(
                f"{name or 'this model'} is a {type(module).__name__} of peft: merge the adapters first, "
                "model = model.merge_and_unload(), prune what that returns, and finish it"
            )


def _replacements(
    names: Mapping[nn.Module, str], keep_weights: bool
) -> tuple[dict[nn.Module, nn.Module], dict[str, str]]:
    """The modules to exchange, each with the new one, and the names of linear layers that stay, each with the reason.

    Args:
        names: the modules of a model.
        keep_weights: as in `finish`.
    """
    problem, uses = prepacking_problem(), Counter(id(p) for module in names for p in module._parameters.values())
    guides = _inside(names, AlignmentGuide)
    # timm's EvaAttention with biases of its own reads this weight, and calls no layer
    read = {module.qkv for module in names if isinstance(getattr(module, "q_bias", None), Tensor)}
    activations = _activations(names)
    replaced: dict[nn.Module, nn.Module] = {}
    left = {}
    for module, name in names.items():
        if not isinstance(module, nn.Linear) or module in guides:
            continue
        reason = problem or ("its weight is read" if module in read else _reason(module, uses))
        if reason is not None:
            left[name] = reason
            continue
        behind, activation = activations.get(module, (None, None))
        replaced[module] = PrepackedLinear(module.weight, module.bias, activation, keep_weights)
        if behind is not None:
            replaced[behind] = nn.Identity()
    for conv in filter(None, map(patch_convolution, names)):
        if (problem or _reason(conv, uses)) is None:
            replaced[conv] = PatchLinear(conv, keep_weights)
    return replaced, left


def _reason(layer: nn.Linear | nn.Conv2d, uses: Mapping[int, int]) -> str | None:
    """Why the weight of a layer is not reordered; None where it is.

    Args:
        layer: the layer.
        uses: in how many modules each parameter is, by its id.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if type(layer) not in (nn.Linear, nn.Conv2d) or type(weight) is not nn.Parameter:
        return "of another class"
    if has_hooks(layer):
        return "hooks"
    if uses[id(weight)] > 1:
        return "tied weight"
    for tensor in (weight, weight if bias is None else bias):
        if type(tensor.data) is not Tensor or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return f"{tensor.dtype} on {tensor.device.type}".removeprefix("torch.")
    return None


def _activations(names: Collection[nn.Module]) -> dict[nn.Module, tuple[nn.Module, Activation]]:
    """Linear layers whose activation can be computed with them, each with the module of the activation, and that itself."""
    parents = Counter(child for module in names for child in module._modules.values())
    found = {}
    for parent in names:
        for name, behind_name in activated_layers(parent):
            layer, behind = parent._modules.get(name), parent._modules.get(behind_name)
            if layer is None or behind is None or parents[layer] > 1 or parents[behind] > 1:
                continue
            if (activation := Activation.from_module(behind)) is not None:
                found[layer] = behind, activation
    return found


def _aliases(names: Collection[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of a model, each with a frozen one of the same storage.

    Without those of pruners and guides, which calibration changes: these are copied.
    """
    apart = _inside(names, (Pruner, AlignmentGuide))
    for module in names:
        if module in apart:
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, nn.Parameter) and type(tensor) is nn.Parameter:
                yield tensor, nn.Parameter(tensor.detach(), requires_grad=False)
            elif tensor is not None:
                # quantized weights have classes of their own
                yield tensor, tensor


def _inside(names: Iterable[nn.Module], kinds: type | tuple[type, ...]) -> set[nn.Module]:
    """The modules that are of one of some kinds, or inside of one."""
    return {part for module in names if isinstance(module, kinds) for part in module.modules()}


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a finished module."""
    if mode:
        refuse_training()
    return module


def _refuse_saving(*_: object) -> NoReturn:
    raise RuntimeError(
        "a finished model is not saved and has no state dict, because its weights are laid out for this machine: save the "
        "model that it was made from, and call vltprune.finish after loading that"
    )


def _refuse_loading(*_: object) -> NoReturn:
    raise RuntimeError(
        "a finished model takes no other weights: load them into the model that it was made from, and call vltprune.finish "
        "again"
    )
