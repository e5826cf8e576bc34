"""Packed tokens: the tokens of all instances of a batch end to end, [total, dim], without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..utils.lazy import lazy
from . import precision
from .checks import is_traced
from .layout import Layout

MASKED = 1e-9  # the probability to stay of a token that is masked: for 0, whose logarithm has no gradient
SOURCE = "source"  # the column of a language model that says which token of the image tower each visual token is
LAST = "last"  # the column that marks the token of each instance that asks, where it is not the last one


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
        number_protected: how many protected tokens each instance has, where all have the same number. None where it is not
            known.
        protected_lead: whether the protected tokens are the first of their instance, the summary token the very first.
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
    number_protected: int | None = None
    protected_lead: bool = False

    @classmethod
    def pack(
        cls,
        x: Tensor,
        valid: Tensor | None = None,
        protected: Tensor | int | None = None,
        summary: Tensor | bool | None = None,
        number_protected: int | None = None,
    ) -> PackedTokens:
        """Packs a padded batch.

        Args:
            x: [batch, n, dim].
            valid: [batch, n] bool, false on padding. None for no padding.
            protected: bool, broadcastable to [batch, n], or how many of the first tokens are protected. None for no protected
                token.
            summary: bool, broadcastable to [batch, n]. True for the first token, None for no summary token.
            number_protected: how many protected tokens each instance has, where `protected` is a mask and all have the same
                number. None where it is not known.

        Returns:
            The valid tokens, instance after instance.

        Raises:
            ValueError: for an empty batch, for an instance without any token, for `valid` under torch.jit.trace, which would
                record the lengths of this batch as constants, and for a batch of several with `valid` under torch.export.
        """
        batch, n = x.shape[:2]
        if batch == 0 or n == 0:
            raise ValueError(
                f"cannot pack an empty batch: x is {list(x.shape)}; give at least one instance with one token"
            )
        if valid is not None and is_traced():
            raise ValueError(
                "torch.jit.trace would keep the lengths of this example for every other input, although they depend on the "
                "mask or on the token ids: trace the image tower alone (model.visual, say), leave the mask out where all "
                "instances are equally long, or run the model without tracing it"
            )
        slot = torch.arange(n, device=x.device)
        leads = not isinstance(protected, Tensor) and not isinstance(summary, Tensor)
        if not isinstance(protected, Tensor):
            number_protected = protected or 0
            protected = slot < number_protected
        if not isinstance(summary, Tensor):
            summary = slot == 0 if summary else None
        layout, rows = Layout.uniform(batch, n, x.device), None
        if valid is not None and torch.compiler.is_exporting():
            layout, rows = _exported_rows(valid)
        elif valid is not None:
            lengths = valid.sum(1).tolist()
            if 0 in lengths:
                raise ValueError(f"instance {lengths.index(0)} has no token at all: every row of `valid` needs one")
            if min(lengths) < n:
                layout, rows = Layout(lengths, x.device), valid.reshape(-1).nonzero().squeeze(1)
            if leads and not valid[:, :number_protected].all():
                leads, number_protected = False, None

        def column(values: Tensor) -> Tensor:
            values = values.to(x.device).expand(batch, n, *values.shape[2:]).flatten(0, 1)
            return values if rows is None else values.index_select(0, rows)

        return cls(
            column(x),
            layout,
            column(slot),
            column(protected),
            None if summary is None else column(summary),
            number_protected=number_protected,
            protected_lead=leads,
        )

    @lazy
    def free(self) -> Tensor:
        """[total] bool: the unprotected tokens, which a pruner may drop."""
        return ~self.protected

    @lazy
    def available(self) -> Layout:
        """How many unprotected tokens each instance has."""
        number = self.number_protected
        if number is not None:
            return self.layout.map(lambda length: length - number)
        return Layout(self._padded(self.free).sum(1).tolist(), self.layout.device)

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
        # no field that is computed on demand depends on the contents: they are taken along
        tokens = object.__new__(PackedTokens)
        tokens.__dict__.update(self.__dict__, x=x)
        return tokens

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
        return self._padded(self.x), None if self.layout.is_uniform else self.layout.valid

    def _padded(self, values: Tensor) -> Tensor:
        """Values [total, ...], padded with zeros: [batch, longest, ...]."""
        layout = self.layout
        shape = (layout.batch, layout.longest, *values.shape[1:])
        if layout.is_uniform:
            return values.view(shape)
        padded = values.new_zeros(layout.batch * layout.longest, *values.shape[1:])
        return padded.index_copy(0, layout.padded_index, values).view(shape)

    def select(self, keep: Tensor) -> PackedTokens:
        """Selects tokens by a mask.

        Args:
            keep: [total] bool, true for the tokens to select.

        Returns:
            The selected tokens, in their order. An instance may have none.
        """
        lengths = self._padded(keep).sum(1).tolist()
        taken = self.take(keep.nonzero().squeeze(1), Layout(lengths, self.layout.device))
        return replace(taken, number_protected=None, protected_lead=False)

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

    def take(self, index: Tensor, layout: Layout, x: Tensor | None = None) -> PackedTokens:
        """Gathers tokens by index. It must take all protected tokens of the instances that it takes.

        Args:
            index: [new total] int64, the row of each token.
            layout: which of them belong to which instance.
            x: [new total, dim], their contents, where they are known. None to gather them.

        Returns:
            The gathered tokens.
        """

        def pick(column: Tensor | None) -> Tensor | None:
            return None if column is None else column.index_select(0, index)

        def lead(marks: Tensor) -> Tensor:
            # an instance begins with the same tokens as before; OpenVINO loses a slice of a slice whose ends depend on data
            known = layout.is_uniform and self.layout.is_uniform and isinstance(layout.longest, int)
            if not (self.protected_lead and known):
                return marks.index_select(0, index)
            return marks.view(self.layout.batch, -1)[:, : layout.longest].flatten()

        return PackedTokens(
            self.x.index_select(0, index) if x is None else x,
            layout,
            self.position.index_select(0, index),
            lead(self.protected),
            None if self.summary is None else lead(self.summary),
            pick(self.size),
            pick(self.keep_prob),
            pick(self.counted_prob),
            self.proportional,
            {name: column.index_select(0, index) for name, column in self.columns.items()},
            self.number_protected,
            self.protected_lead,
        )

    def first_where(self, mask: Tensor) -> Tensor:
        """The contents of the first token of each instance where a mask is true.

        Args:
            mask: [total] bool, true for at least one token of each instance.

        Returns:
            The contents, [batch, dim].
        """
        return self.x.index_select(0, self._first_row(mask))

    def _first_row(self, mask: Tensor) -> Tensor:
        """[batch] int64: the row of the first token of each instance where a mask [total] holds."""
        return self.layout.starts + self._padded(mask).int().argmax(1)

    @lazy
    def summary_row(self) -> Tensor:
        """[batch] int64: the row of each instance's summary token. ValueError where there is none."""
        if self.summary is None:
            raise ValueError("these tokens have no summary token: pack them with summary=, or average them")
        return self.layout.starts if self.protected_lead else self._first_row(self.summary)

    @property
    def last_row(self) -> Tensor:
        """[batch] int64: the row of each instance's last token, or of the one that the column "last" [total] bool marks."""
        if LAST in self.columns:
            return self._first_row(self.columns[LAST])
        return self.layout.offsets[1:].long() - 1

    def summaries(self) -> Tensor:
        """The contents of each instance's summary token.

        Returns:
            The contents, [batch, dim].

        Raises:
            ValueError: where the tokens have no summary token.
        """
        return self.x.index_select(0, self.summary_row)


def _exported_rows(valid: Tensor) -> tuple[Layout, Tensor]:
    """The layout and the rows of the valid tokens of one instance, whose number is a size of torch.export."""
    if valid.shape[0] != 1:
        raise ValueError(
            "torch.export takes a mask of one instance, whose number of tokens is then a size of the graph, and this one has "
            f"{valid.shape[0]}: export at batch 1, or leave the mask out where all instances are equally long"
        )
    rows = valid.reshape(-1).nonzero().squeeze(1)
    torch._check(rows.shape[0] >= 1)
    torch._check(rows.shape[0] <= valid.shape[1])
    return Layout((rows.shape[0],), valid.device), rows
