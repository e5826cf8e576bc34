"""Invariants that parts of every kind have."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..pruning.part import Part
from .cases import Case, CaseSettings, generator
from .invariant import Broken, CheckedPart, Invariant, Results, expect, expect_same, invariant

_LIBRARIES = tuple(str(Path(one).parent.resolve()) for one in (torch.__file__, registry.__file__))
_HALF = (torch.bfloat16, torch.float16)


@invariant(
    "declared inputs",
    "declare the attention statistics that it reads in `needs`, and guided = True where it reads the guidance",
    first=True,
)
def declared(part: CheckedPart, case: Case) -> None:
    """A part reads the statistics and the guidance that it declares, and no others."""
    error = _error(lambda: part.call(case))
    if error is not None and _error(lambda: _call(part, case, True)) is None:
        raise Broken("a result from the declared inputs alone", error)


@invariant(
    "no summary token",
    "allow for tokens.summary is None, or declare Stat.SUMMARY in `needs`, so that such towers are refused",
    first=True,
)
def without_summary(part: CheckedPart, case: Case) -> None:
    """A part that does not need the summary token runs without one."""
    if case.settings.has_summary:
        return
    error = _error(lambda: part.call(case))
    with_summary = replace(case.settings, has_summary=True).build()
    if error is not None and _error(lambda: part.call(with_summary)) is None:
        raise Broken("a result for a tower without a summary token", error)


@invariant("runs", "make it run on this batch: instances of one token and of protected tokens alone occur", first=True)
def runs(part: CheckedPart, case: Case) -> None:
    """A part runs on every batch."""
    error = _error(lambda: part.call(case))
    if error is not None:
        raise Broken("a result", error)


@invariant(
    "alone as in the batch",
    "compute each instance from its own tokens, with the functions of vltprune.core.segments",
)
def alone(part: CheckedPart, case: Case) -> None:
    """An instance by itself gets what it gets in the batch."""
    found = [part.results(case.instances([i]))[0] for i in range(case.batch)]
    expect_same("for an instance alone what it gets in the batch", found, part.results(case))


@invariant("batch order", "compute each instance from its own tokens, wherever it stands in the batch")
def batch_order(part: CheckedPart, case: Case) -> None:
    """The batch in another order gives the same results in that order."""
    moved, order = case.reordered()
    whole = part.results(case)
    expect_same(f"the same for the instances in the order {order}", part.results(moved), [whole[i] for i in order])


@invariant(
    "training and evaluation",
    "in evaluation draw no random numbers and store nothing on the part; in training return the same kind of result",
)
def modes(part: CheckedPart, case: Case) -> None:
    """A part runs in training mode, and gives the same result twice in evaluation mode."""
    before, module = part.results(case), part.part(case.spec)
    module.train()
    error = _error(lambda: _results(part, case))
    module.eval()
    if error is not None:
        raise Broken("a result in training mode", error)
    expect_same(
        "the same result for the same batch in evaluation mode",
        _results(part, case),
        before,
    )


@invariant("half precision", "compute in single precision, from vltprune.core.precision.single(tokens.x)")
def half(part: CheckedPart, case: Case) -> None:
    """The other invariants of the kind hold of models in bfloat16 and float16, where they hold in single precision."""
    if _error(lambda: _check(part, case)) is not None:
        return
    dtype = _HALF[case.settings.seed % len(_HALF)]
    try:
        _check(part.to(dtype), case)
    except Broken as broken:
        raise Broken(f"in {_name(dtype)} {broken.expected}", broken.found) from None
    except Exception as error:
        raise Broken(f"a result in {_name(dtype)}", described(error)) from error


@invariant(
    "gradients", "use every parameter in what it returns, without detaching or rounding it; a keeper's in `margin`"
)
def gradients(part: CheckedPart, case: Case) -> None:
    """Gradients reach every parameter, and are finite."""
    if not any(one.requires_grad for one in part.part(case.spec).parameters()):
        return
    reached: set[str] = set()
    names: set[str] = set()
    for i in range(3):
        # contents that differ, and unprotected tokens: elsewhere a gradient may rightly be zero
        varied = CaseSettings((9, 8, 7), case.settings.seed + i, case.settings.has_summary).build()
        module = part.build(varied.spec, part.args).train()
        parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        with torch.no_grad():
            for one in parameters.values():  # a part may begin at a point without gradients, as at zero
                one.add_(0.1 * torch.randn(one.shape, generator=generator(i)))
        loss = part.kind.loss(module, varied)
        if loss is None:
            return
        if loss.requires_grad:
            loss.backward()
        given = {name: one.grad for name, one in parameters.items() if one.grad is not None}
        for name, grad in given.items():
            expect(grad.isfinite().all(), f"finite gradients of {name}", grad)
        reached |= {name for name, grad in given.items() if grad.any()}
        names |= set(parameters)
    missing = sorted(names - reached)
    expect(not missing, "gradients to every parameter", f"none to {', '.join(missing)}")


@invariant("arguments", "take arguments that JSON has a form for: numbers, text, None, and lists and dicts of them")
def arguments(part: CheckedPart, case: Case) -> None:
    """Arguments, written as JSON, build the same part."""
    try:
        data = json.loads(json.dumps(Part("part", part.args).to_dict()))
    except (TypeError, ValueError) as error:
        raise Broken("arguments that JSON has a form for", str(error)) from error
    again, cast = part.build(case.spec, Part.from_spec(data).args), case.to(part.dtype)
    again.load_state_dict(part.part(case.spec).state_dict())
    found = part.kind.results(part.kind.call(again, cast), cast)
    expect_same("the same from a part that is built again of its arguments in JSON", found, part.results(case))


def described(error: Exception) -> str:
    """An error in one line, with the line of the part that it comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_LIBRARIES)]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _error(call: Callable[[], object]) -> str | None:
    """The error that a call raises, described; None where it raises none."""
    try:
        call()
    except Exception as error:
        return described(error)
    return None


def _call(part: CheckedPart, case: Case, everything: bool = False) -> Any:
    """What the part returns when it is called once more."""
    return part.kind.call(part.part(case.spec), case.to(part.dtype), everything)


def _results(part: CheckedPart, case: Case) -> Results:
    """What the part decides when it is called once more."""
    return part.kind.results(_call(part, case), case.to(part.dtype))


def _check(part: CheckedPart, case: Case) -> None:
    for one in (runs, *part.kind.own):
        one.check(part, case)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FIRST: tuple[Invariant, ...] = (declared, without_summary, runs)
SHARED: tuple[Invariant, ...] = (alone, batch_order, modes, half, gradients, arguments)
