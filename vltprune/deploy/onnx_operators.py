"""What PyTorch's ONNX exporter lacks: operators, written in operators of ONNX, and a faster simplification of graphs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch


def operators() -> dict[Callable[..., object], Callable[..., object]]:
    """The operators by what they stand for, as `torch.onnx.export(custom_translation_table=...)` takes them."""
    aten = torch.ops.aten
    return {
        aten.sort.stable: _stable_sort,
        aten.cummax.default: _cummax,
        aten.searchsorted.Tensor: _searchsorted,
        # which it has, but not for all numbers, or not as ONNX Runtime has it
        aten.log_sigmoid.default: _log_sigmoid,
        aten.logaddexp.default: _logaddexp,
        aten.where.self: _where,
        aten.__rshift__.Scalar: _right_shift,
    }


def simplify(model: Any) -> None:
    """Folds constants and merges nodes, as the exporter's own optimizer does, by fewer rules.

    Rules without a name are left out: among them are those that take the addition of 1e-8 for one of zero. The rule for
    slices that make up a split is left out too. It looks through the whole graph at each node, which takes minutes where counts
    are per instance: a ViT of 12 blocks then has 7,000 nodes.

    Args:
        model: the model of onnx_ir, which is changed.
    """
    optimizer, rewriter = (importlib.import_module(f"onnxscript.{name}") for name in ("optimizer", "rewriter"))
    passes: Any = importlib.import_module("onnx_ir.passes.common")
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name and rule.name != "SlicesSplit"]
    optimizer.inline(model)
    for _ in range(2):
        optimizer.fold_constants(model)
        rewriter.rewrite(model, rules)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    optimizer.remove_unused_nodes(model)


def _stable_sort(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """torch.sort(stable=True): ONNX's TopK puts the first of equal values first."""
    op = _onnx()
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _cummax(self: Any, dim: int) -> Any:
    """torch.cummax: the maximum of [..., n, n] values, in which those behind each position are the lowest."""
    op = _onnx()
    last = len(self.shape) - 1
    order = [*range(len(self.shape))]
    order[dim], order[last] = order[last], order[dim]
    values = op.Transpose(self, perm=order)
    index = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(values, start=last)), op.Constant(value_int=1))
    earlier = op.GreaterOrEqual(op.Unsqueeze(index, op.Constant(value_ints=[1])), index)
    least = op.ReduceMin(values, keepdims=1)
    seen = op.Where(
        earlier, op.Unsqueeze(values, op.Constant(value_ints=[last])), op.Unsqueeze(least, op.Constant(value_ints=[0]))
    )
    largest = op.ReduceMax(seen, op.Constant(value_ints=[last + 1]), keepdims=0)
    reached = op.And(op.Equal(seen, op.Unsqueeze(largest, op.Constant(value_ints=[last + 1]))), earlier)
    where = op.ArgMax(op.Cast(reached, to=7), axis=last + 1, keepdims=0, select_last_index=1)  # 7: int64
    return op.Transpose(largest, perm=order), op.Transpose(where, perm=order)


def _searchsorted(
    sorted_sequence: Any,
    self: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """torch.searchsorted of equal leading sizes: the number of entries [..., n] that are below each value [..., m]."""
    op = _onnx()
    last = op.Constant(value_ints=[-1])
    entries, values = op.Unsqueeze(sorted_sequence, op.Constant(value_ints=[-2])), op.Unsqueeze(self, last)
    below = op.LessOrEqual(entries, values) if right or side == "right" else op.Less(entries, values)
    return op.ReduceSum(op.Cast(below, to=6 if out_int32 else 7), last, keepdims=0)  # int32, int64


def _log_sigmoid(self: Any) -> Any:
    """torch.nn.functional.logsigmoid: the logarithm of the sigmoid would be minus infinity far below 0."""
    op = _onnx()
    zero, one = (op.CastLike(op.Constant(value_float=number), self) for number in (0.0, 1.0))
    return op.Sub(op.Min(self, zero), op.Log(op.Add(one, op.Exp(op.Neg(op.Abs(self))))))


def _logaddexp(self: Any, other: Any) -> Any:
    """torch.logaddexp of finite numbers: the sum of exponentials would be 0 where both are far below 0."""
    op = _onnx()
    one = op.CastLike(op.Constant(value_float=1.0), self)
    return op.Add(op.Max(self, other), op.Log(op.Add(one, op.Exp(op.Neg(op.Abs(op.Sub(self, other)))))))


def _where(condition: Any, self: Any, other: Any) -> Any:
    """torch.where: ONNX Runtime has none of truth values."""
    op = _onnx()
    if str(self.dtype) != "BOOL":
        return op.Where(condition, self, other)
    return op.Or(op.And(condition, self), op.And(op.Not(condition), other))


def _right_shift(self: Any, other: int) -> Any:
    """x >> n of integers: OpenVINO divides them in single precision, which is exact for 24 bits once the last n are zero."""
    op = _onnx()
    unit = op.CastLike(op.Constant(value_int=1 << other), self)
    return op.Div(op.BitwiseAnd(self, op.Neg(unit)), unit)


def _onnx() -> Any:
    return importlib.import_module("onnxscript").opset18
