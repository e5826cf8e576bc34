"""Linear layers whose weight oneDNN has reordered once, which is faster on CPUs than reordering it at every call.

The operators are private to torch. `prepacking_problem` says whether they are there and work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Measured with 384 to 3072 features, on one and two threads: within these rows the reordered weight is as fast or faster
_FEWEST, _MOST = 4, 512
# oneDNN's layout for another number of rows is at most 2 % faster at that number
_ROWS = 64


@dataclass(frozen=True)
class Activation:
    """An activation that oneDNN computes together with the linear layer before it.

    Attributes:
        name: oneDNN's name, "gelu" or "relu".
        algorithm: of "gelu": "none" for the exact one, "tanh" for its approximation.
    """

    name: str
    algorithm: str = ""

    @classmethod
    def from_module(cls, module: nn.Module) -> Activation | None:
        """The activation that a module computes; None for another one, and for one with hooks."""
        if has_hooks(module):
            return None
        if type(module) is nn.ReLU:
            return cls("relu")
        if type(module) is nn.GELU:
            return cls("gelu", module.approximate)
        # transformers' class has the function as an attribute
        is_gelu = type(module).__name__ == "GELUActivation" and getattr(module, "act", None) is F.gelu
        return cls("gelu", "none") if is_gelu else None

    def __call__(self, x: Tensor) -> Tensor:
        """The activation of x of any shape."""
        return F.relu(x) if self.name == "relu" else F.gelu(x, approximate=self.algorithm)


class PrepackedLinear(nn.Linear):
    """A linear layer with a reordered weight, for inference in single precision on a CPU.

    It has no parameters: `weight` and `bias` are tensors, which an optimizer does not see. It is an nn.Linear for libraries
    that ask which of their options a layer is.

    Args:
        weight: [out_features, in_features], in single precision on the CPU.
        bias: [out_features]. None without one.
        activation: what is computed of its output in the same pass. None for nothing.
        keep_weights: whether the plain weight stays, for numbers of rows at which that is faster, for autocast and for
            compiling. Without it `weight` is on the meta device.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None, keep_weights: bool = True
    ):
        nn.Module.__init__(self)
        self.training = False
        self.out_features, self.in_features = weight.shape
        weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.weight = weight if keep_weights else weight.to("meta")
        self.reordered = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self.activation = activation
        name, algorithm = ("none", "") if activation is None else (activation.name, activation.algorithm)
        self._fused: tuple[str, list[None], str] = (name, [], algorithm)
        # without an activation of its own, a pass over the output less does not make up for what is slower
        self._rows = (_FEWEST, _MOST) if activation is None and keep_weights else (0, 2**63)

    @property
    def is_affine(self) -> bool:
        """Whether it is x W^T + b, so that tokens may be averaged before it."""
        return self.activation is None

    @property
    def keeps_weight(self) -> bool:
        """Whether the plain weight is there too."""
        return not self.weight.is_meta

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            refuse_training()
        fewest, most = self._rows
        # the size last: compiling knows none
        if _is_special(x) or not fewest <= x.numel() // self.in_features <= most:
            return self._plain(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.reordered, self.bias, *self._fused)

    def _plain(self, x: Tensor) -> Tensor:
        if not self.keeps_weight:
            raise RuntimeError(
                f"this model was finished without its plain weights, for {torch.float32} without autocast or compiling, and "
                f"got {x.dtype}: write vltprune.finish(model, keep_weights=True)"
            )
        out = F.linear(x, self.weight, self.bias)
        return out if self.activation is None else self.activation(out)

    def train(self, mode: bool = True) -> PrepackedLinear:
        if mode:
            refuse_training()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PrepackedLinear:
        moved = fn(torch.empty(0))
        if moved.dtype != torch.float32 or moved.device.type != "cpu":
            raise RuntimeError(
                "a finished model stays in single precision on the CPU, where its weights were reordered: convert or move the "
                "model that it was made from, and call vltprune.finish then"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PrepackedLinear:
        """The copy shares the tensors, which never change; a reordered one cannot be copied."""
        new = type(self).__new__(type(self))
        new.__dict__ = self.__dict__.copy()
        return new

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a finished model is not pickled, because its weights are laid out for this machine: save the model that it was "
            "made from (vltprune.save), load it there, and call vltprune.finish again"
        )

    def extra_repr(self) -> str:
        with_activation = "" if self.activation is None else f", activation={self.activation.name!r}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{with_activation}"


class PatchLinear(nn.Module):
    """A convolution of patches that do not overlap, as a linear layer on each patch, which takes less time.

    Args:
        conv: the convolution, whose stride is its kernel; it stays as it is.
        keep_weights: as in PrepackedLinear.
    """

    def __init__(self, conv: nn.Conv2d, keep_weights: bool = True):
        super().__init__()
        self.training = False
        self.kernel_size, self.in_channels, self.out_channels = conv.kernel_size, conv.in_channels, conv.out_channels
        self.linear = PrepackedLinear(conv.weight.flatten(1), conv.bias, None, keep_weights)

    @property
    def weight(self) -> Tensor:
        """The weight of the convolution, [out channels, in channels, height, width]."""
        return self.linear.weight.unflatten(1, (self.in_channels, *self.kernel_size))

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, *sides = images.shape
        height, width = self.kernel_size
        rows, columns = sides[0] // height, sides[1] // width
        patches = images[:, :, : rows * height, : columns * width].reshape(
            batch, channels, rows, height, columns, width
        )
        return self.linear(patches.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def prepacking_problem() -> str | None:
    """Why linear layers cannot be prepacked here; None where they can."""
    x, weight, bias = (torch.linspace(-1, 1, rows * 8).view(rows, 8) for rows in (4, 8, 1))
    try:
        got = PrepackedLinear(weight, bias[0], Activation("gelu", "none"))(x)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this torch cannot reorder weights by oneDNN ({type(error).__name__})"
    same = torch.allclose(got, F.gelu(F.linear(x, weight, bias[0])), atol=1e-4)
    return None if same else "oneDNN's reordered weights give other results in this torch"


def refuse_training() -> NoReturn:
    """RuntimeError for training a finished model."""
    raise RuntimeError(
        "a finished model is for inference alone, and has no gradients: train the model that it was made from, and call "
        "vltprune.finish afterwards"
    )


def _is_special(x: Tensor) -> bool:
    """Whether oneDNN's operator does not take x, or should not, because the call is being recorded or casts by itself."""
    return (
        x.dtype is not torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    )
