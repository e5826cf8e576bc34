"""Are the synthetic pairs what they say they are: fixed by their index, truthful, and fair coins to half an input?"""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vltprune.data import SyntheticPairs, normalize
from vltprune.data.drawing import COLORS, MOST, SHAPES, SIZES, SceneObject, draw_scenes
from vltprune.data.sentences import FAMILIES, draw_sentence
from vltprune.data.synthetic import SPLITS

SIZE = 10**6
indices = st.integers(0, SIZE - 1)

NUMBERS = {"one": 1, "two": 2, "three": 3}
COMPARED = {"exactly": operator.eq, "at least": operator.ge}
PLACED = {
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
    "left of": lambda a, b: a.x < b.x,
    "right of": lambda a, b: a.x > b.x,
}


def named(phrase: str, scene: tuple[SceneObject, ...]) -> list[SceneObject]:
    """The things of a scene that a phrase such as "red circles" names, read word by word."""
    words = [re.sub(r"(?<!s)s$", "", word.replace("crosses", "cross")) for word in phrase.split()]
    looks = [(SHAPES[thing.shape], COLORS[thing.color], SIZES[thing.size], "object") for thing in scene]
    return [thing for thing, look in zip(scene, looks, strict=True) if all(word in look for word in words)]


def is_true(sentence: str, left: tuple[SceneObject, ...], right: tuple[SceneObject, ...]) -> bool:
    """The truth of a sentence, worked out from its words alone."""
    scenes = {"left": left, "right": right}

    def count(phrase: str, side: str) -> int:
        return len(named(phrase, scenes[side]))

    def match(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, sentence)

    if m := match(r"in the (\w+) image a (.+) is (above|below|left of|right of) a (.+)"):
        firsts, seconds = named(m[2], scenes[m[1]]), named(m[4], scenes[m[1]])
        return any(PLACED[m[3]](a, b) for a in firsts for b in seconds)
    if m := match(r"there are (more|fewer) (.+) in the (\w+) image than in the (\w+) image"):
        return {"more": operator.gt, "fewer": operator.lt}[m[1]](count(m[2], m[3]), count(m[2], m[4]))
    if m := match(r"both images contain the same number of (.+)"):
        return count(m[1], "left") == count(m[1], "right")
    if m := match(r"there (?:is|are) (exactly|at least) (\w+) (.+) in the (\w+) image"):
        return COMPARED[m[1]](count(m[3], m[4]), NUMBERS[m[2]])
    if m := match(r"(both|neither|no) images? contains? a (.+)"):
        found = [count(m[2], side) > 0 for side in scenes]
        return all(found) if m[1] == "both" else not any(found)
    if m := match(r"only the (\w+) image contains a (.+)"):
        return [side for side in scenes if count(m[2], side)] == [m[1]]
    if m := match(r"the (\w+) image (contains|does not contain) a (.+)"):
        return (count(m[3], m[1]) > 0) == (m[2] == "contains")
    if m := match(r"there is (a|no) (.+) in the (\w+) image"):
        return (count(m[2], m[3]) > 0) == (m[1] == "a")
    m = match(r"(the|every|no) (.+) in the (\w+) image is (not )?(?:a )?(\w+)")
    assert m, f"no rule reads {sentence!r}"
    subjects = named(m[2], scenes[m[3]])
    fitting = named(m[5], tuple(subjects))
    return not fitting if m[1] == "no" or m[4] else fitting == subjects


@given(split=st.sampled_from(SPLITS), index=indices, sentences=st.integers(1, 12))
def test_every_label_is_true_to_the_scene(split, index, sentences):
    pair = SyntheticPairs(split, SIZE, sentences=sentences)[index]
    assert [is_true(sentence, *pair.scenes) for sentence in pair.sentences] == pair.labels.astype(bool).tolist()


@given(index=indices, seed=st.integers(0, 9))
def test_an_item_depends_on_nothing_but_its_index(index, seed):
    once = SyntheticPairs("train", SIZE, seed, sentences=3)[index]
    again = SyntheticPairs("train", index + 1, seed, sentences=3)[index]
    alone = SyntheticPairs("train", SIZE, seed)[index]
    assert once.sentences == again.sentences and (once.labels == again.labels).all()
    assert (once.images == again.images).all() and (once.images == alone.images).all()


def test_splits_and_seeds_share_no_pair():
    drawn = [SyntheticPairs(split, 12, seed) for split in SPLITS for seed in range(3)]
    images = [pairs[index].images.tobytes() for pairs in drawn for index in range(12)]
    assert len(set(images)) == len(images)


@given(index=indices)
def test_images_and_object_maps_agree(index):
    pair = SyntheticPairs("val", SIZE)[index]
    assert pair.images.shape == (2, 96, 96, 3) and pair.images.dtype == np.uint8
    for side, scene in enumerate(pair.scenes):
        assert 3 <= len(scene) <= MOST and set(np.unique(pair.object_map[side])) == set(range(len(scene) + 1))
        for number, thing in enumerate(scene, start=1):
            mine = pair.object_map[side] == number
            assert np.abs(np.argwhere(mine).mean(0) - (thing.y, thing.x)).max() < 3
            assert mine.sum() > 40


@given(index=indices)
def test_things_keep_apart(index):
    for scene in SyntheticPairs("val", SIZE)[index].scenes:
        for a in scene:
            for b in scene:
                apart = np.hypot(a.x - b.x, a.y - b.y)
                assert a is b or apart > (a.diameter + b.diameter) / 2


def test_most_of_an_image_is_ground():
    shown = [(SyntheticPairs("val", 100)[index].object_map > 0).mean() for index in range(100)]
    assert 0.05 < np.mean(shown) < 0.2


def test_families_rotate():
    pairs = SyntheticPairs("val", 60, sentences=3)
    families = Counter(family for index in range(60) for family in pairs[index].families)
    assert set(families) == set(FAMILIES)
    assert max(families.values()) - min(families.values()) <= 3


@pytest.fixture(scope="module")
def spoken() -> dict[str, list[tuple[str, int, tuple]]]:
    """Sentences with label and scenes, without pixels: many for "train", fewer for "test"."""
    said = {}
    for split, pairs in (("train", 1600), ("test", 600)):
        said[split] = []
        for index in range(pairs):
            rng = np.random.default_rng((SPLITS.index(split), 7, index))
            scenes = draw_scenes(rng)
            answers = (draw_sentence(scenes, family, rng) for family in FAMILIES)
            said[split] += [(text, int(truth), scenes) for text, truth in filter(None, answers)]
    return said


def chance_margin(count: int) -> float:
    """Four standard deviations of a fair coin's frequency."""
    return 2 / np.sqrt(count)


def test_each_form_of_sentence_is_true_half_the_time(spoken):
    names = "|".join((*COLORS, *(shape + "(?:e?s)?" for shape in SHAPES), *SIZES))
    forms = defaultdict(list)
    for text, label, _ in spoken["train"]:
        forms[re.sub(rf"\b(?:{names})\b", "_", text)].append(label)
    for form, labels in forms.items():
        assert abs(np.mean(labels) - 0.5) < chance_margin(len(labels)), form


def test_text_alone_says_nothing(spoken):
    votes = Counter()
    for text, label, _ in spoken["train"]:
        votes[text] += 2 * label - 1
    hits = [(votes[text] > 0) == label for text, label, _ in spoken["test"]]
    assert abs(np.mean(hits) - 0.5) < chance_margin(len(hits))

    words = {word: column for column, word in enumerate(sorted({word for text in votes for word in text.split()}))}

    def bag(rows: list) -> np.ndarray:
        table = np.zeros((len(rows), len(words) + 1))
        for row, (text, _, _) in enumerate(rows):
            np.add.at(table[row], [words[word] for word in text.split() if word in words], 1)
        table[:, -1] = 1
        return table

    assert abs(linear_accuracy(bag, spoken) - 0.5) < chance_margin(len(spoken["test"]))


def test_images_alone_say_nothing(spoken):
    def contents(rows: list) -> np.ndarray:
        table = np.ones((len(rows), 2 * 60 + 1))
        for row, (_, _, scenes) in enumerate(rows):
            for side, scene in enumerate(scenes):
                np.add.at(table[row], [60 * side + 12 * t.shape + 2 * t.color + t.size for t in scene], 1)
        return table

    assert abs(linear_accuracy(contents, spoken) - 0.5) < chance_margin(len(spoken["test"]))


def linear_accuracy(features, spoken) -> float:
    """Test accuracy of a ridge regression on what half an input shows."""
    x, y = features(spoken["train"]), np.array([label for _, label, _ in spoken["train"]])
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ (2 * y - 1))
    answers = features(spoken["test"]) @ weights > 0
    return float(np.mean(answers == [label for _, label, _ in spoken["test"]]))


def test_normalize():
    images = np.array([0, 255], np.uint8).repeat(96 * 96 * 3).reshape(2, 96, 96, 3)
    assert normalize(images).shape == (2, 3, 96, 96)
    assert normalize(images).min() == -1 and normalize(images).max() == 1 and normalize(images).dtype == np.float32
    with pytest.raises(ValueError, match="expected images"):
        normalize(images[..., :2])


def test_refusals():
    with pytest.raises(ValueError, match="no split 'dev'; it has train, val, test"):
        SyntheticPairs("dev", 4)
    with pytest.raises(ValueError, match="at least one"):
        SyntheticPairs("val", 0)
    with pytest.raises(IndexError, match="there is no pair 4: the split has 4"):
        SyntheticPairs("val", 4)[4]
