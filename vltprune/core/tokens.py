"""Packed tokens: the tokens of all instances of a batch end to end, [total, dim], without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from . import precision
from .checks import is_traced

MASKED = 1e-9  # the probability to stay of a token that is masked: for 0, whose logarithm has no gradient


@dataclass(frozen=True)
class Layout:
    """The number of tokens of each instance in a batch, and the indices that follow from it.

    Attributes:
        lengths: tokens of each instance, as Python integers.
        device: where the index tensors are. Each of them is computed when it is first read.
    """

    lengths: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def batch(self) -> int:
        """The number of instances."""
        return len(self.lengths)

    @cached_property
    def total(self) -> int:
        """The number of tokens of all instances."""
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        """The number of tokens of the longest instance."""
        return max(self.lengths, default=0)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all instances have the same number of tokens."""
        return len(set(self.lengths)) <= 1

    @cached_property
    def sizes(self) -> Tensor:
        """[batch] int64: the lengths, as a tensor."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @cached_property
    def offsets(self) -> Tensor:
        """[batch + 1] int32: where each instance starts, and the total (`cu_seqlens`)."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def instance(self) -> Tensor:
        """[total] int64: the instance of each token."""
        which = torch.arange(self.batch, device=self.device)
        return torch.repeat_interleave(which, self.sizes, output_size=self.total)

    @cached_property
    def slot(self) -> Tensor:
        """[total] int64: the index of each token within its instance."""
        return torch.arange(self.total, device=self.device) - self.offsets[:-1].long()[self.instance]

    @cached_property
    def padded_index(self) -> Tensor:
        """[total] int64: the index of each token in the flattened padded batch, instance * longest + slot."""
        return self.instance * self.longest + self.slot

    @cached_property
    def valid(self) -> Tensor:
        """[batch, longest] bool: true where the padded batch holds a token."""
        return torch.arange(self.longest, device=self.device) < self.sizes[:, None]

    def grouped(self, groups: int) -> Layout:
        """The layout of the same tokens with consecutive instances joined.

        Args:
            groups: the number of instances afterwards, a divisor of `batch`.
        """
        if groups == self.batch:
            return self
        each = self.batch // groups
        lengths = tuple(sum(self.lengths[i : i + each]) for i in range(0, self.batch, each))
        return Layout(lengths, self.device)


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of all instances of a batch, end to end without padding, with one entry per token in each column.

    Attributes:
        x: [total, dim], the token contents.
        layout: which tokens belong to which instance.
        position: [total] int64, the position in the original sequence. A merged token has its last source's.
        protected: [total] bool, tokens that are never scored and never dropped: CLS, registers, EOT.
        summary: [total] bool, the protected token that represents its instance: CLS, or EOT in a causal tower. None where
            there is none.
        size: [total], how many original tokens each one stands for. None for one each.
        keep_prob: [total], the probability in (0, 1] that each stays, in soft training. None for 1.
        counted_prob: [total], the same values with the gradients of the cost. None where `keep_prob` is.
        proportional: whether the logarithm of `size` is added to the attention logits of each key (ToMe, arXiv 2210.09461,
            equation 1).
        columns: further values per token by name, [total, ...], which parts leave for later layers.
    """

    x: Tensor
    layout: Layout
    position: Tensor
    protected: Tensor
    summary: Tensor | None = None
    size: Tensor | None = None
    keep_prob: Tensor | None = None
    counted_prob: Tensor | None = None
    proportional: bool = False
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def pack(
        cls,
        x: Tensor,
        valid: Tensor | None = None,
        protected: Tensor | None = None,
        summary: Tensor | None = None,
    ) -> PackedTokens:
        """Packs a padded batch.

        Args:
            x: [batch, n, dim].
            valid: [batch, n] bool, false on padding. None for no padding.
            protected: bool, broadcastable to [batch, n]. None for no protected token.
            summary: bool, broadcastable to [batch, n]. None for no summary token.

        Returns:
            The valid tokens, instance after instance.

        Raises:
            ValueError: for an empty batch, for an instance without any token, and for `valid` under torch.jit.trace. A trace
                would record the lengths of this batch as constants.
        """
        batch, n, dim = x.shape
        if batch == 0 or n == 0:
            raise ValueError(
                f"cannot pack an empty batch: x is {list(x.shape)}; give at least one instance with one token"
            )

        def expand(mask: Tensor | None) -> Tensor:
            mask = mask if mask is not None else torch.zeros((), dtype=torch.bool, device=x.device)
            return mask.to(x.device).expand(batch, n)

        if valid is not None and is_traced():
            raise ValueError(
                "torch.jit.trace would keep the lengths of this example for every other input, although they depend on the "
                "mask or on the token ids: trace the image tower alone (model.visual, say), leave the mask out where all "
                "instances are equally long, or run the model without tracing it"
            )
        lengths = (n,) * batch if valid is None else tuple(valid.sum(1).tolist())
        if valid is None or min(lengths) == n:
            rows = slice(None)
        elif 0 in lengths:
            raise ValueError(f"instance {lengths.index(0)} has no token at all: every row of `valid` needs one")
        else:
            rows = valid.reshape(-1)
        position = torch.arange(n, device=x.device).expand(batch, n)
        return cls(
            x.reshape(batch * n, dim)[rows],
            Layout(lengths, x.device),
            position.reshape(-1)[rows],
            expand(protected).reshape(-1)[rows],
            None if summary is None else expand(summary).reshape(-1)[rows],
        )

    @property
    def free(self) -> Tensor:
        """[total] bool: the unprotected tokens, which a pruner may drop."""
        return ~self.protected

    @property
    def bias(self) -> Tensor | None:
        """[total]: what is added to the attention logits of each key: log(keep_prob), log(size) or both. None for neither."""
        size = None
        if self.proportional and self.size is not None:
            size = self.size.to(torch.promote_types(self.x.dtype, torch.float32)).log()
        if self.keep_prob is None:
            return size
        # where nothing is left of any key, all count alike: minus infinity for each would give NaN
        bias = self.keep_prob.clamp(min=torch.finfo(self.keep_prob.dtype).tiny).log()
        return bias if size is None else bias + size

    @property
    def weight(self) -> Tensor:
        """[total]: size * keep_prob, the weight of each token in a mean. In single precision at least."""
        weight = torch.ones_like(precision.single(self.x[:, 0]))
        weight = weight if self.size is None else self.size.to(weight.dtype)
        return weight if self.keep_prob is None else weight * self.keep_prob

    @property
    def present(self) -> Tensor:
        """[total] bool: the tokens that are not masked. Soft training may mask tokens that go, and remove none."""
        return torch.ones_like(self.protected) if self.keep_prob is None else self.keep_prob > MASKED * 1.5

    @property
    def identity(self) -> Tensor:
        """[total] int64, one number for each position of each instance; ascending where tokens are in their original order."""
        return self.layout.instance * 2**32 + self.position

    @property
    def expected(self) -> Tensor:
        """[batch]: the expected number of tokens of each instance, the sum of counted_prob."""
        dtype = precision.widest_float(self.x.device)
        if self.counted_prob is None:
            return self.layout.sizes.to(dtype)
        empty = self.counted_prob.new_zeros(self.layout.batch, dtype=dtype)
        return empty.index_add(0, self.layout.instance, self.counted_prob.to(dtype))

    def with_keep_prob(self, keep_prob: Tensor, counted_prob: Tensor | None = None) -> PackedTokens:
        """The same tokens with their keep probabilities multiplied by these.

        Args:
            keep_prob: [total], with the gradients of the loss.
            counted_prob: [total], the same values with the gradients of the cost. None for those of `keep_prob`.

        Returns:
            The tokens with the products.
        """
        counted_prob = keep_prob if counted_prob is None else counted_prob
        if self.keep_prob is None or self.counted_prob is None:
            return replace(self, keep_prob=keep_prob, counted_prob=counted_prob)
        return replace(self, keep_prob=self.keep_prob * keep_prob, counted_prob=self.counted_prob * counted_prob)

    def with_x(self, x: Tensor) -> PackedTokens:
        """Replaces the contents of the tokens.

        Args:
            x: [total, any], the contents.

        Returns:
            The same tokens with these contents.
        """
        return replace(self, x=x)

    def with_column(self, name: str, column: Tensor) -> PackedTokens:
        """Adds a column, or replaces the one of this name.

        Args:
            name: the column's name.
            column: [total, ...].

        Returns:
            The same tokens with the column, which every later reduction carries along.
        """
        return replace(self, columns={**self.columns, name: column})

    def unpack(self) -> tuple[Tensor, Tensor | None]:
        """Pads the tokens of each instance to the longest one.

        Returns:
            x [batch, longest, dim], zero where there is no token, and valid [batch, longest] bool. A uniform layout gives a
            view and None.
        """
        layout = self.layout
        if layout.is_uniform:
            return self.x.view(layout.batch, layout.longest, -1), None
        padded = self.x.new_zeros(layout.batch * layout.longest, self.x.shape[-1])
        padded = padded.index_copy(0, layout.padded_index, self.x)
        return padded.view(layout.batch, layout.longest, -1), layout.valid

    def select(self, keep: Tensor) -> PackedTokens:
        """Selects tokens by a mask.

        Args:
            keep: [total] bool, true for the tokens to select.

        Returns:
            The selected tokens, in their order. An instance may have none.
        """
        layout = self.layout
        per_instance = torch.zeros(layout.batch, dtype=torch.int64, device=keep.device)
        lengths = per_instance.index_add(0, layout.instance, keep.long()).tolist()
        index = keep.nonzero().squeeze(1)
        return self.take(index, Layout(tuple(lengths), layout.device))

    def select_instances(self, instances: Sequence[int]) -> PackedTokens:
        """Selects whole instances.

        Args:
            instances: indices of instances; one may occur several times.

        Returns:
            The tokens of these instances, in this order.
        """
        lengths, starts = self.layout.lengths, (0, *accumulate(self.layout.lengths))
        rows = [row for i in instances for row in range(starts[i], starts[i] + lengths[i])]
        layout = Layout(tuple(lengths[i] for i in instances), self.layout.device)
        return self.take(torch.tensor(rows, device=self.x.device), layout)

    def take(self, index: Tensor, layout: Layout) -> PackedTokens:
        """Gathers tokens by index.

        Args:
            index: [new total] int64, the row of each token.
            layout: which of them belong to which instance.

        Returns:
            The gathered tokens.
        """

        def pick(column: Tensor | None) -> Tensor | None:
            return None if column is None else column.index_select(0, index)

        return PackedTokens(
            self.x.index_select(0, index),
            layout,
            self.position.index_select(0, index),
            self.protected.index_select(0, index),
            pick(self.summary),
            pick(self.size),
            pick(self.keep_prob),
            pick(self.counted_prob),
            self.proportional,
            {name: column.index_select(0, index) for name, column in self.columns.items()},
        )

    def first_where(self, mask: Tensor) -> Tensor:
        """The contents of the first token of each instance where a mask is true.

        Args:
            mask: [total] bool, true for at least one token of each instance.

        Returns:
            The contents, [batch, dim].
        """
        layout = self.layout
        here = torch.where(mask, layout.slot, layout.longest)
        slots = here.new_full((layout.batch,), layout.longest).scatter_reduce(0, layout.instance, here, "amin")
        return self.x.index_select(0, layout.offsets[:-1].long() + slots)

    def summaries(self) -> Tensor:
        """The contents of each instance's summary token.

        Returns:
            The contents, [batch, dim].

        Raises:
            ValueError: where the tokens have no summary token.
        """
        if self.summary is None:
            raise ValueError("these tokens have no summary token: pack them with summary=, or average them")
        return self.first_where(self.summary)

    def at_position(self, position: Tensor) -> Tensor:
        """The contents of the token of each instance at a position of the original sequence.

        Args:
            position: [batch] int64. The token there must not have been pruned.

        Returns:
            The contents, [batch, dim].
        """
        return self.first_where(self.position == position[self.layout.instance])
