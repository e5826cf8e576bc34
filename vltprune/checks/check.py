"""check_part: holds a part to the invariants of its kind on random batches, and reports what it breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..registry import bind, parameters
from ..utils.table import table
from .cases import Case, CaseSettings
from .invariant import Broken, CheckedPart, Invariant, Kind
from .kinds import KINDS, invariants_of
from .shared import described

EXAMPLES = 25


@dataclass(frozen=True)
class Failure:
    """A batch on which a part breaks an invariant.

    Attributes:
        settings: the batch.
        expected: what holds of every part.
        found: what the part did instead.
    """

    settings: CaseSettings
    expected: str
    found: str


@dataclass(frozen=True)
class Result:
    """What became of one invariant.

    Attributes:
        invariant: the invariant.
        checked: on how many batches it was checked. It is not where one that comes first is broken.
        failure: the smallest batch that breaks it; None where none does.
    """

    invariant: Invariant
    checked: int
    failure: Failure | None

    @property
    def status(self) -> str:
        """ "passed", "broken", or "not checked"."""
        return "broken" if self.failure else "passed" if self.checked else "not checked"


@dataclass(frozen=True)
class CheckReport:
    """The invariants of a part's kind, and which of them it breaks. Printed, it is a table with an explanation of each failure.

    Attributes:
        part: the part in words.
        results: one result for each invariant.
    """

    part: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether no invariant is broken."""
        return not self.broken

    @property
    def broken(self) -> list[str]:
        """The names of the invariants that are broken."""
        return [result.invariant.name for result in self.results if result.failure]

    def __str__(self) -> str:
        rows = [["invariant", "batches", "result"]]
        rows += [[one.invariant.name, str(one.checked), one.status] for one in self.results]
        parts = [f"{self.part}\n\n{table(rows)}"]
        for one in self.results:
            if one.failure is not None:
                parts.append(
                    f"{one.invariant.name}\n"
                    f"  expected  {one.failure.expected}\n"
                    f"  found     {one.failure.found}\n"
                    f"  on        {one.failure.settings}\n"
                    f"  change    {one.invariant.advice}"
                )
        return "\n\n".join(parts)


def check_part(
    part: Callable[..., Any], /, *, examples: int = EXAMPLES, first_seed: int = 0, **args: Any
) -> CheckReport:
    """Holds a part to the invariants of its kind on random batches.

    Args:
        part: a class or function that makes a guide, scorer, keeper, selector or reducer. It need not be registered.
        examples: how many batches.
        first_seed: the seed of the first batch; each further one has the next. A report names the seed of each failure.
        **args: the part's own arguments.

    Returns:
        The report.

    Raises:
        TypeError: for what makes no part, and for arguments that it does not take.
    """
    kind = kind_of(part, args)
    name = getattr(part, "__qualname__", type(part).__qualname__)
    what = f"{kind.registry.kind} {name}"
    bind(what, part, args, (kind.passed,))
    checked = CheckedPart(kind, part, args)
    written = ", ".join(f"{key}={value!r}" for key, value in args.items())
    settings = (CaseSettings.from_seed(first_seed + i) for i in range(examples))
    return CheckReport(f"{what}({written})" if written else what, check_on(checked, settings))


def kind_of(maker: Callable[..., Any], args: Mapping[str, Any]) -> Kind:
    """The kind of part that a maker makes, found by the base class of what it makes.

    Args:
        maker: a class or function.
        args: its arguments besides the spec; a function is called with them.

    Raises:
        TypeError: for a maker of anything else.
    """
    if isinstance(maker, type):
        made: type = maker
    elif callable(maker):
        names = [one.name for one in parameters(maker)]
        kinds = [kind for kind in KINDS.values() if kind.passed in names] or list(KINDS.values())
        made = type(kinds[0].build(maker, CaseSettings((1,), 0).build().spec, args))
    else:
        raise TypeError(f"{maker!r} makes no part: give a class or function that makes one")
    for kind in KINDS.values():
        if issubclass(made, kind.base):
            return kind
    bases = ", ".join(f"vltprune.{kind.base.__name__}" for kind in KINDS.values())
    raise TypeError(f"{made.__qualname__} is no part: make it a subclass of one of {bases}")


def check_on(part: CheckedPart, settings: Iterable[CaseSettings]) -> tuple[Result, ...]:
    """The results of all invariants of a part's kind on some batches.

    Args:
        part: the part.
        settings: the batches. A part that needs a summary token gets all of them with one.
    """
    results = {one.name: Result(one, 0, None) for one in invariants_of(part.kind)}
    for one in settings:
        for name, failure in check_case(part, one).items():
            former = results[name]
            smallest = min(filter(None, (former.failure, failure)), key=_size, default=None)
            results[name] = Result(former.invariant, former.checked + 1, smallest)
    return tuple(results.values())


def check_case(part: CheckedPart, settings: CaseSettings) -> dict[str, Failure | None]:
    """Each invariant of a part's kind on one batch, by name, with its failure or None.

    Args:
        part: the part.
        settings: the batch. A part that needs a summary token gets it with one.

    Returns:
        The invariants that were checked: after a failure of one that comes first there are no others.
    """
    case = replace(settings, has_summary=settings.has_summary or part.needs_summary).build()
    found: dict[str, Failure | None] = {}
    for one in invariants_of(part.kind):
        found[one.name] = failure = _failure(one, part, case)
        if failure is not None and one.first:
            break
    return found


def _failure(invariant: Invariant, part: CheckedPart, case: Case) -> Failure | None:
    """How a part breaks an invariant on a batch; None where it does not."""
    try:
        invariant.check(part, case)
    except Broken as broken:
        return Failure(case.settings, broken.expected, broken.found)
    except Exception as error:
        return Failure(case.settings, "a result", described(error))
    return None


def _size(failure: Failure) -> int:
    return sum(failure.settings.lengths)
