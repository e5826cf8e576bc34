"""Sentences about synthetic scenes: six families, each a list of templates.

A template is a sentence with its color, shape, size and side left open. For a pair of scenes it lists every filling, with
the truth of each. A sentence is drawn only from a template that has both true and false fillings. A fair coin says
which: given the images, the label is a coin. Scenes treat all colors alike, and so all shapes, sizes and sides. Hence the
true and the false sentences of a template are distributed alike, and given the words the label is a coin too. To keep this
so, all fillings of a template must be renamings of one another: numbers and relations, which are not, belong to the
template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import product
from typing import NamedTuple

import numpy as np

from vltprune.data.drawing import COLORS, SHAPES, SIZES, Scene, SceneObject

SIDES = ("left", "right")
NUMBERS = ("zero", "one", "two", "three")
CLEAR = 6.0  # pixels between two centers from which their relation is stated


class Filling(NamedTuple):
    """A filled-in sentence.

    Attributes:
        text: The sentence.
        truth: Whether it is true of the pair.
        weight: Its sampling weight among sentences of the same truth.
    """

    text: str
    truth: bool
    weight: float


class Description(NamedTuple):
    """Description of an object, such as "small red circle", by the attributes that it names.

    Attributes:
        shape: Index into SHAPES; None where the phrase leaves it open.
        color: Index into COLORS, or None.
        size: Index into SIZES, or None.
    """

    shape: int | None = None
    color: int | None = None
    size: int | None = None

    def fits(self, item: SceneObject) -> bool:
        """Whether an object has every named attribute."""
        return self in _phrases(item)

    def __str__(self) -> str:
        size = "" if self.size is None else SIZES[self.size] + " "
        color = "" if self.color is None else COLORS[self.color] + " "
        return size + color + ("object" if self.shape is None else SHAPES[self.shape])

    @property
    def plural(self) -> str:
        """The phrase in the plural."""
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
def _phrases(item: SceneObject) -> tuple[Description, ...]:
    """Every description that fits an object."""
    return tuple(Description(*named) for named in product(*((None, has) for has in item[:3])))


@lru_cache(maxsize=16)
def _counts(scene: Scene) -> Counter[Description]:
    """How many objects of the scene each description fits."""
    return Counter(phrase for item in scene for phrase in _phrases(item))


Scenes = tuple[Scene, Scene]
Template = Callable[[Scenes], Iterator[Filling]]


@dataclass(frozen=True)
class CountTemplate:
    """A sentence whose truth depends on how many objects fit a description, on one side and on the other.

    Attributes:
        template: The sentence, with the fields {side}, {other}, {one} and {many}; it need not use all.
        kind: The key of DESCRIPTIONS that fills {one} and {many}.
        holds: The numbers of objects that fit on {side} and on {other}, to whether the sentence is true.
    """

    template: str
    kind: str
    holds: Callable[[int, int], bool]

    def __call__(self, scenes: Scenes) -> Iterator[Filling]:
        """Every filling for the pair."""
        counts = [_counts(scene) for scene in scenes]  # once: hashing a scene is slow
        for side, name in enumerate(SIDES):
            for description in DESCRIPTIONS[self.kind]:
                count, other = counts[side][description], counts[1 - side][description]
                # Otherwise most fillings would name objects that neither image shows.
                weight = 1 + 3 * (count > 0) + 2 * (other > 0) + 2 * _nearly(description, counts[side])
                yield Filling(_count_sentence(self.template, name, description), self.holds(count, other), weight)


@cache
def _count_sentence(template: str, side: str, description: Description) -> str:
    """A count template's sentence about a side."""
    other = SIDES[1 - SIDES.index(side)]
    return template.format(side=side, other=other, one=description, many=description.plural)


@cache
def _parts(description: Description) -> frozenset[Description]:
    """Each of the named attributes alone."""
    shape, color, size = description
    return frozenset({Description(shape=shape), Description(color=color), Description(size=size)} - {Description()})


def _nearly(description: Description, counts: Counter[Description]) -> bool:
    """Whether several attributes are named and the scene has each of them, be it on different objects."""
    named = _parts(description)
    return len(named) > 1 and all(counts[part] for part in named)


@dataclass(frozen=True)
class AttributeTemplate:
    """A sentence about the objects on one side that fit a subject: that they fit a predicate, or do not.

    Attributes:
        template: The sentence, with the fields {side}, {one} and {value}.
        subject: The key of DESCRIPTIONS that fills {one}.
        predicate: The key of DESCRIPTIONS that fills {value}.
        applies: The number of objects that fit the subject, to whether the sentence can be said of so many.
        holds: How many of these fit the predicate, and how many there are, to whether the sentence is true.
    """

    template: str
    subject: str
    predicate: str
    applies: Callable[[int], bool]
    holds: Callable[[int, int], bool]

    def __call__(self, scenes: Scenes) -> Iterator[Filling]:
        """Every filling for the pair whose subject occurs in the number that the sentence presupposes."""
        for side, name in enumerate(SIDES):
            for subject in DESCRIPTIONS[self.subject]:
                items = [item for item in scenes[side] if subject.fits(item)]
                if self.applies(len(items)):
                    yield from self._about(items, subject, name, scenes[side])

    def _about(self, items: Sequence[SceneObject], subject: Description, side: str, scene: Scene) -> Iterator[Filling]:
        counts = _counts(scene)
        for predicate in DESCRIPTIONS[self.predicate]:
            words = dict(side=side, one=subject, value=_value(predicate))
            truth = self.holds(sum(map(predicate.fits, items)), len(items))
            weight = 1 + 2 * (counts[predicate] > 0)
            yield Filling(self.template.format(**words), truth, weight)


def _value(description: Description) -> str:
    return str(description).removesuffix(" object")


@dataclass(frozen=True)
class SpatialTemplate:
    """A sentence about the relative position of two objects in one image; not used where their centers nearly align.

    Attributes:
        phrase: The relation in words, such as "left of".
        axis: The coordinate that is compared, "x" or "y".
        sign: 1 if the first object has the larger coordinate where the sentence is true, -1 if the smaller.
        kind: The key of DESCRIPTIONS that fills both objects.
    """

    phrase: str
    axis: str
    sign: int
    kind: str

    def __call__(self, scenes: Scenes) -> Iterator[Filling]:
        """Every filling that names two objects of one image by different attributes, and is clearly true or false."""
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


def _kinds(template: str, holds: Callable[[int, int], bool], *kinds: str) -> list[Template]:
    return [CountTemplate(template, kind, holds) for kind in kinds]


def _existence() -> list[Template]:
    kinds = ("colored shape", "colored shape", "shape", "color", "sized shape")
    return [
        *_kinds("the {side} image contains a {one}", lambda count, other: count > 0, *kinds),
        *_kinds("there is a {one} in the {side} image", lambda count, other: count > 0, *kinds),
        *_kinds("both images contain a {one}", lambda count, other: min(count, other) > 0, *kinds),
        *_kinds("neither image contains a {one}", lambda count, other: count + other == 0, *kinds),
        *_kinds("only the {side} image contains a {one}", lambda count, other: count > 0 == other, *kinds),
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


def _attribute() -> list[Template]:
    the = partial(AttributeTemplate, applies=_single, holds=_all_fit)
    every = partial(AttributeTemplate, applies=_several, holds=_all_fit)
    return [
        the("the {one} in the {side} image is {value}", "shape", "color"),
        the("the {one} in the {side} image is {value}", "shape", "size"),
        the("the {one} in the {side} image is {value}", "color", "size"),
        the("the {one} in the {side} image is a {value}", "color", "shape"),
        every("every {one} in the {side} image is {value}", "shape", "color"),
        every("every {one} in the {side} image is {value}", "shape", "size"),
    ]


def _count() -> list[Template]:
    kinds = ("shape", "color")
    templates = _kinds("there is exactly one {one} in the {side} image", lambda count, other: count == 1, *kinds)
    for n in (2, 3):
        exactly = "there are exactly " + NUMBERS[n] + " {many} in the {side} image"
        at_least = "there are at least " + NUMBERS[n] + " {many} in the {side} image"
        templates += _kinds(exactly, lambda count, other, n=n: count == n, *kinds)
        templates += _kinds(at_least, lambda count, other, n=n: count >= n, *kinds)
    return templates


def _comparison() -> list[Template]:
    kinds = ("shape", "color")
    ending = " {many} in the {side} image than in the {other} image"
    return [
        *_kinds("there are more" + ending, lambda count, other: count > other, *kinds),
        *_kinds("there are fewer" + ending, lambda count, other: count < other, *kinds),
        *_kinds("both images contain the same number of {many}", lambda count, other: count == other, *kinds),
    ]


def _spatial() -> list[Template]:
    relations = (("above", "y", -1), ("below", "y", 1), ("left of", "x", -1), ("right of", "x", 1))
    kinds = ("colored shape", "shape", "color")
    return [SpatialTemplate(phrase, axis, sign, kind) for phrase, axis, sign in relations for kind in kinds]


def _negation() -> list[Template]:
    kinds = ("colored shape", "shape", "color")
    return [
        *_kinds("no image contains a {one}", lambda count, other: count + other == 0, *kinds),
        *_kinds("the {side} image does not contain a {one}", lambda count, other: count == 0, *kinds),
        *_kinds("there is no {one} in the {side} image", lambda count, other: count == 0, *kinds),
        AttributeTemplate("the {one} in the {side} image is not {value}", "shape", "color", _single, _none_fit),
        AttributeTemplate("no {one} in the {side} image is {value}", "shape", "color", _some, _none_fit),
    ]


TEMPLATES: dict[str, list[Template]] = {
    "existence": _existence(),
    "attribute": _attribute(),
    "count": _count(),
    "comparison": _comparison(),
    "spatial": _spatial(),
    "negation": _negation(),
}
FAMILIES = tuple(TEMPLATES)


def draw_sentence(scenes: Scenes, family: str, rng: np.random.Generator) -> tuple[str, bool] | None:
    """Draw a sentence of a family about a pair of scenes.

    Args:
        scenes: The left and the right scene.
        family: One of FAMILIES.
        rng: The source of randomness.

    Returns:
        The sentence and whether it is true; None where no template of the family has both true and false fillings.
    """
    templates = TEMPLATES[family]
    for index in rng.permutation(len(templates)):
        fillings = sorted(templates[index](scenes))
        by_truth = [[filling for filling in fillings if filling.truth == truth] for truth in (False, True)]
        if all(by_truth):
            truth = bool(rng.integers(2))
            weights = np.array([filling.weight for filling in by_truth[truth]])
            chosen = rng.choice(len(weights), p=weights / weights.sum())
            return by_truth[truth][chosen].text, truth
    return None
