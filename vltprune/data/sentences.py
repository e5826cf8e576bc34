"""Sentences about synthetic scenes: six families, each a list of templates.

A skeleton is a sentence with its color, shape, size and side left open. For a pair of scenes it lists every way to
fill it in, with the truth of each. A sentence is drawn only from a skeleton that the pair can make both true and
false, and a fair coin says which: given the images, the label is a coin. Scenes treat all colors alike, and so all
shapes, sizes and sides; hence the true and the false sentences of a skeleton are distributed alike, and given the
words the label is a coin too. To keep this so, all fillings of a skeleton must be renamings of one another: numbers
and relations, which are not, belong to the skeleton.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import product
from typing import NamedTuple

import numpy as np

from vltprune.data.drawing import COLORS, SHAPES, SIZES, Scene, Thing

SIDES = ("left", "right")
NUMBERS = ("zero", "one", "two", "three")
CLEAR = 6.0  # pixels between two centers before a relation between them is said


class Filling(NamedTuple):
    """A finished sentence, whether it is true of the pair, and how readily it is drawn among those equally true."""

    text: str
    truth: bool
    weight: float


class Description(NamedTuple):
    """What a phrase such as "small red circle" asks of a thing: an index per attribute named, None for the rest."""

    shape: int | None = None
    color: int | None = None
    size: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the thing has every attribute named."""
        return self in _phrases(thing)

    def __str__(self) -> str:
        size = "" if self.size is None else SIZES[self.size] + " "
        color = "" if self.color is None else COLORS[self.color] + " "
        return size + color + ("object" if self.shape is None else SHAPES[self.shape])

    @property
    def plural(self) -> str:
        """The phrase for several such things."""
        text = str(self)
        return text + ("es" if text.endswith("s") else "s")


DESCRIPTIONS = {
    "shape": [Description(shape=shape) for shape in range(len(SHAPES))],
    "color": [Description(color=color) for color in range(len(COLORS))],
    "size": [Description(size=size) for size in range(len(SIZES))],
    "colored shape": [Description(s, c) for s in range(len(SHAPES)) for c in range(len(COLORS))],
    "sized shape": [Description(s, None, z) for s in range(len(SHAPES)) for z in range(len(SIZES))],
}


@lru_cache(maxsize=256)
def _phrases(thing: Thing) -> tuple[Description, ...]:
    """Every description that fits the thing."""
    return tuple(Description(*asked) for asked in product(*((None, has) for has in thing[:3])))


@lru_cache(maxsize=16)
def _counts(scene: Scene) -> Counter[Description]:
    """How many things of the scene each description fits."""
    return Counter(phrase for thing in scene for phrase in _phrases(thing))


Scenes = tuple[Scene, Scene]
Skeleton = Callable[[Scenes], Iterator[Filling]]


@dataclass(frozen=True)
class Tally:
    """A sentence that hangs on how many things fit one description, here (this side) and there (the other)."""

    template: str
    kind: str
    holds: Callable[[int, int], bool]

    def __call__(self, scenes: Scenes) -> Iterator[Filling]:
        """Every filling for the pair."""
        counts = [_counts(scene) for scene in scenes]  # once, for a scene takes its time to look up
        for side, name in enumerate(SIDES):
            for description in DESCRIPTIONS[self.kind]:
                here, there = counts[side][description], counts[1 - side][description]
                # Otherwise most fillings would speak of things that neither image shows.
                weight = 1 + 3 * (here > 0) + 2 * (there > 0) + 2 * _nearly(description, counts[side])
                yield Filling(_tallied(self.template, name, description), self.holds(here, there), weight)


@cache
def _tallied(template: str, side: str, description: Description) -> str:
    """A tally's sentence about a side."""
    other = SIDES[1 - SIDES.index(side)]
    return template.format(side=side, other=other, one=description, many=description.plural)


@cache
def _parts(description: Description) -> frozenset[Description]:
    """The same attributes, each asked for by itself."""
    shape, color, size = description
    return frozenset({Description(shape=shape), Description(color=color), Description(size=size)} - {Description()})


def _nearly(description: Description, counts: Counter[Description]) -> bool:
    """Whether two attributes are asked for and a scene, of these counts, has each, though maybe not on one thing."""
    named = _parts(description)
    return len(named) > 1 and all(counts[part] for part in named)


@dataclass(frozen=True)
class Claim:
    """A sentence that says of the things fitting a subject, on one side, that they fit a predicate (or do not)."""

    template: str
    subject: str
    predicate: str
    said_of: Callable[[int], bool]
    holds: Callable[[int, int], bool]

    def __call__(self, scenes: Scenes) -> Iterator[Filling]:
        """Every filling for the pair whose subject is there in the number that the sentence takes for granted."""
        for side, name in enumerate(SIDES):
            for subject in DESCRIPTIONS[self.subject]:
                things = [thing for thing in scenes[side] if subject.fits(thing)]
                if self.said_of(len(things)):
                    yield from self._about(things, subject, name, scenes[side])

    def _about(self, things: Sequence[Thing], subject: Description, side: str, scene: Scene) -> Iterator[Filling]:
        counts = _counts(scene)
        for predicate in DESCRIPTIONS[self.predicate]:
            words = dict(side=side, one=subject, value=_value(predicate))
            truth = self.holds(sum(map(predicate.fits, things)), len(things))
            weight = 1 + 2 * (counts[predicate] > 0)
            yield Filling(self.template.format(**words), truth, weight)


def _value(description: Description) -> str:
    return str(description).removesuffix(" object")


@dataclass(frozen=True)
class Relation:
    """A sentence that says of two things in one image how they lie; unsaid where their centers nearly align."""

    phrase: str
    axis: str
    sign: int
    kind: str

    def __call__(self, scenes: Scenes) -> Iterator[Filling]:
        """Every filling that names two things of one image, unlike in what is named, and is clearly true or false."""
        for side, name in enumerate(SIDES):
            named = self._named(scenes[side])
            for first in named:
                for second in named:
                    gaps = list(self._gaps(first, second, scenes[side]))
                    if gaps and min(map(abs, gaps)) >= CLEAR:
                        text = f"in the {name} image a {first} is {self.phrase} a {second}"
                        yield Filling(text, max(gaps) > 0, 1.0)

    def _named(self, scene: Scene) -> set[Description]:
        counts = _counts(scene)
        return {description for description in DESCRIPTIONS[self.kind] if counts[description]}

    def _gaps(self, first: Description, second: Description, scene: Scene) -> Iterator[float]:
        if any(a == b for a, b in zip(first, second, strict=True) if a is not None):
            return
        for a in filter(first.fits, scene):
            for b in filter(second.fits, scene):
                yield self.sign * (getattr(a, self.axis) - getattr(b, self.axis))


def _kinds(template: str, holds: Callable[[int, int], bool], *kinds: str) -> list[Skeleton]:
    return [Tally(template, kind, holds) for kind in kinds]


def _existence() -> list[Skeleton]:
    kinds = ("colored shape", "colored shape", "shape", "color", "sized shape")
    return [
        *_kinds("the {side} image contains a {one}", lambda here, there: here > 0, *kinds),
        *_kinds("there is a {one} in the {side} image", lambda here, there: here > 0, *kinds),
        *_kinds("both images contain a {one}", lambda here, there: min(here, there) > 0, *kinds),
        *_kinds("neither image contains a {one}", lambda here, there: here + there == 0, *kinds),
        *_kinds("only the {side} image contains a {one}", lambda here, there: here > 0 == there, *kinds),
    ]


def _single(count: int) -> bool:
    return count == 1


def _several(count: int) -> bool:
    return count >= 2


def _some(count: int) -> bool:
    return count >= 1


def _all_fit(fitting: int, count: int) -> bool:
    return fitting == count


def _none_fit(fitting: int, count: int) -> bool:
    return fitting == 0


def _attribute() -> list[Skeleton]:
    the = partial(Claim, said_of=_single, holds=_all_fit)
    every = partial(Claim, said_of=_several, holds=_all_fit)
    return [
        the("the {one} in the {side} image is {value}", "shape", "color"),
        the("the {one} in the {side} image is {value}", "shape", "size"),
        the("the {one} in the {side} image is {value}", "color", "size"),
        the("the {one} in the {side} image is a {value}", "color", "shape"),
        every("every {one} in the {side} image is {value}", "shape", "color"),
        every("every {one} in the {side} image is {value}", "shape", "size"),
    ]


def _count() -> list[Skeleton]:
    kinds = ("shape", "color")
    made = _kinds("there is exactly one {one} in the {side} image", lambda here, there: here == 1, *kinds)
    for n in (2, 3):
        exactly = "there are exactly " + NUMBERS[n] + " {many} in the {side} image"
        at_least = "there are at least " + NUMBERS[n] + " {many} in the {side} image"
        made += _kinds(exactly, lambda here, there, n=n: here == n, *kinds)
        made += _kinds(at_least, lambda here, there, n=n: here >= n, *kinds)
    return made


def _comparison() -> list[Skeleton]:
    kinds = ("shape", "color")
    ending = " {many} in the {side} image than in the {other} image"
    return [
        *_kinds("there are more" + ending, lambda here, there: here > there, *kinds),
        *_kinds("there are fewer" + ending, lambda here, there: here < there, *kinds),
        *_kinds("both images contain the same number of {many}", lambda here, there: here == there, *kinds),
    ]


def _spatial() -> list[Skeleton]:
    relations = (("above", "y", -1), ("below", "y", 1), ("left of", "x", -1), ("right of", "x", 1))
    kinds = ("colored shape", "shape", "color")
    return [Relation(phrase, axis, sign, kind) for phrase, axis, sign in relations for kind in kinds]


def _negation() -> list[Skeleton]:
    kinds = ("colored shape", "shape", "color")
    return [
        *_kinds("no image contains a {one}", lambda here, there: here + there == 0, *kinds),
        *_kinds("the {side} image does not contain a {one}", lambda here, there: here == 0, *kinds),
        *_kinds("there is no {one} in the {side} image", lambda here, there: here == 0, *kinds),
        Claim("the {one} in the {side} image is not {value}", "shape", "color", _single, _none_fit),
        Claim("no {one} in the {side} image is {value}", "shape", "color", _some, _none_fit),
    ]


SKELETONS: dict[str, list[Skeleton]] = {
    "existence": _existence(),
    "attribute": _attribute(),
    "count": _count(),
    "comparison": _comparison(),
    "spatial": _spatial(),
    "negation": _negation(),
}
FAMILIES = tuple(SKELETONS)


def say(scenes: Scenes, family: str, rng: np.random.Generator) -> tuple[str, bool] | None:
    """A sentence of the family about the pair, and whether it is true; None where no skeleton can go both ways."""
    skeletons = SKELETONS[family]
    for index in rng.permutation(len(skeletons)):
        fillings = sorted(skeletons[index](scenes))
        by_truth = [[filling for filling in fillings if filling.truth == truth] for truth in (False, True)]
        if all(by_truth):
            truth = bool(rng.integers(2))
            weights = np.array([filling.weight for filling in by_truth[truth]])
            chosen = rng.choice(len(weights), p=weights / weights.sum())
            return by_truth[truth][chosen].text, truth
    return None
