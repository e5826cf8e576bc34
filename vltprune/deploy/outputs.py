"""OutputChange: how far the outputs of one model are from those of another on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree

from ..cost.describe import percent

_LEAST = 1e-12  # a norm below it is none


@dataclass(frozen=True)
class OutputChange:
    """How far outputs are from former ones. `print` shows one line.

    The relative difference of an instance is the norm of the difference of its output over the norm of the former output. A
    model with several outputs has one for each.

    Attributes:
        mean: the mean relative difference; nan where no outputs can be compared.
        most: the largest one.
        agreement: the fraction of instances whose largest entry is the same, as a classifier's answer is. None where the
            outputs are not one tensor [batch, classes], by itself or as `logits`.
    """

    mean: float
    most: float
    agreement: float | None = None

    @classmethod
    def between(cls, former: Sequence[object], now: Sequence[object]) -> OutputChange:
        """Compares outputs batch by batch.

        Args:
            former: the former output of each batch: a tensor, or any nest of lists and dicts of tensors.
            now: the output of each batch now. Tensors of another shape than before are left out, such as those of tokens.

        Returns:
            How far they moved.
        """
        differences, same = [], []
        for old, new in zip(former, now, strict=True):
            pairs = list(zip(_tensors(old), _tensors(new), strict=True))
            differences += [_relative(a, b) for a, b in pairs if a.shape == b.shape and a.dim() > 0]
            classes = _logits(old), _logits(new)
            if classes[0] is not None and classes[1] is not None:
                same.append((classes[0].argmax(1) == classes[1].argmax(1)).double().cpu())
        moved = torch.cat(differences) if differences else torch.tensor([torch.nan])
        agreement = float(torch.cat(same).mean()) if len(same) == len(former) else None
        return cls(float(moved.mean()), float(moved.max()), agreement)

    def __str__(self) -> str:
        if self.mean != self.mean:
            return "of other shapes, not compared"
        moved = f"{percent(self.mean, 2)} away on average, {percent(self.most, 2)} at most"
        return moved + (
            "" if self.agreement is None else f"; the largest entry is the same for {percent(self.agreement)}"
        )


def _tensors(output: object) -> Iterator[Tensor]:
    """The floating-point tensors of an output, in order."""
    for leaf in _pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf.detach()


def _logits(output: object) -> Tensor | None:
    """[batch, classes] of a classifier's output; None for any other."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() == 2 else None


def _relative(former: Tensor, now: Tensor) -> Tensor:
    """[batch]: the relative difference of each instance."""
    former, now = (one.reshape(len(one), -1).double().cpu() for one in (former, now))
    return (now - former).norm(dim=1) / former.norm(dim=1).clamp(min=_LEAST)
