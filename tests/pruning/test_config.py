"""Parts and configs as plain data: short forms, JSON both ways, and errors when they are made."""

from __future__ import annotations

import copy
import dataclasses
import fractions
import json
import pathlib
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from small_models import small
from strategies import arguments

from vltprune import Part, PruneConfig, guides, keepers, preset, presets, prune, reducers, scorers, selectors

KINDS = {"scorer": scorers, "keep": keepers, "selector": selectors, "reducer": reducers, "guide": guides}
EVERY = [(kind, name) for kind, registry in KINDS.items() for name in registry.names()]
BASE = PruneConfig(scorer="random", keep="ratio", guide="codebook")

depths = st.none() | st.lists(st.integers(0, 11) | st.floats(0, 1, exclude_max=True), max_size=4).map(tuple)
at = depths | st.dictionaries(st.sampled_from(["image", "text"]), depths)


def there_and_back(config):
    return PruneConfig.from_dict(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize(("kind", "name"), EVERY)
@given(data=st.data(), at=at)
def test_every_part_survives_json_and_its_short_form(kind, name, data, at):
    part = Part(name, data.draw(arguments(KINDS[kind][name])))
    assert Part.from_spec(str(part)) == part == Part.from_spec(part) == Part.from_spec(part.to_dict())
    config = BASE.replace(**{kind: part}, at=at)
    assert there_and_back(config) == config
    assert config.part(kind) == part
    assert BASE.replace(**{kind: str(part)}, at=at) == config


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_survives_json(name):
    assert there_and_back(preset(name)) == preset(name)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ratio", Part("ratio")),
        ("ratio()", Part("ratio")),
        (" ratio( ratio = .5 ) ", Part("ratio", {"ratio": 0.5})),
        (
            "x(a=-1, b='two', c=(3, [4]), d=None, e=True)",
            Part("x", {"a": -1, "b": "two", "c": (3, [4]), "d": None, "e": True}),
        ),
    ],
)
def test_short_forms(text, part):
    assert Part.from_spec(text.strip()) == part


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ratio(",
        "ratio(0.5)",  # without a kind there is no signature
        "a.b",
        "ratio ratio",
        "1",
        "ratio(ratio=open('x'))",
        "ratio(ratio=x)",
        "[ratio]",
        "f(g)(a=1)",
    ]
    + ["ratio(ratio=1, ratio=2)", "ratio(**{'ratio': 1})", "ratio(ratio={[]: 1})", "a\0"],
)
def test_unreadable_parts(text):
    with pytest.raises(ValueError, match=r"cannot read the part .*: write name or name"):
        Part.from_spec(text)


def test_parts_of_other_types():
    with pytest.raises(TypeError, match=r"not int: 3"):
        Part.from_spec(3)
    with pytest.raises(ValueError, match="a part needs a 'name'"):
        Part.from_spec({"ratio": 1})


def test_parts_hold_their_own_arguments():
    args = {"ratio": 0.5}
    part = Part("ratio", args)
    args["ratio"] = 0.9
    assert part.args == {"ratio": 0.5}
    assert part.replace(ratio=0.7) == Part("ratio", {"ratio": 0.7})
    assert part.args == {"ratio": 0.5}


def misspelt(name):
    return name[:-1] + {"x": "y"}.get(name[-1], "x")


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_misspelt_names_are_answered_with_the_nearest(kind, name):
    with pytest.raises(
        LookupError, match=rf"there is no {KINDS[kind].kind} '{misspelt(name)}'; did you mean .*\b{name}\b"
    ):
        BASE.replace(**{kind: misspelt(name)})


@pytest.mark.parametrize(("kind", "name"), EVERY)
@given(data=st.data())
def test_misspelt_arguments_are_answered_with_the_nearest(kind, name, data):
    drawn = data.draw(arguments(KINDS[kind][name]))
    for argument in drawn:
        wrong = {misspelt(key) if key == argument else key: value for key, value in drawn.items()}
        with pytest.raises(
            TypeError, match=rf"{KINDS[kind].kind} '{name}' takes no argument '{misspelt(argument)}'; .*{argument}"
        ):
            BASE.replace(**{kind: Part(name, wrong)})


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_arguments_nobody_takes(kind, name):
    for argument in ("nonsense", "spec" if kind != "guide" else "specs"):
        with pytest.raises(TypeError, match=f"takes no argument '{argument}'"):
            BASE.replace(**{kind: Part(name, {argument: 1})})


def test_missing_arguments():
    with pytest.raises(TypeError, match="keeper 'count' needs count"):
        BASE.replace(keep="count")


@pytest.mark.parametrize("kind", ["scorer", "keep", "reducer"])
def test_only_the_guide_may_be_missing(kind):
    with pytest.raises(TypeError, match=rf"{kind}=None: a pruner needs a {kind}"):
        BASE.replace(**{kind: None})
    assert BASE.replace(guide=None).guide is None


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, name in EVERY if kind in ("scorer", "keep") and KINDS[kind][name].guided]
)
def test_what_reads_the_guide_needs_one(kind, name):
    with pytest.raises(
        ValueError, match=rf"{kind}='{name}.* reads the alignment guide, and guide=None: write guide='codebook'"
    ):
        BASE.replace(**{kind: name}, guide=None)


def test_replace_and_unknown_keys():
    assert BASE.replace(reducer="fuse").part("reducer") == Part("fuse")
    assert BASE.part("reducer") == Part("drop")
    with pytest.raises(TypeError, match=r"no part 'kepe'; did you mean keep\?"):
        BASE.replace(kepe="ratio")
    with pytest.raises(TypeError, match=r"no part 'kepe'; did you mean keep\?"):
        PruneConfig.from_dict({**BASE.to_dict(), "kepe": 1})
    with pytest.raises(TypeError, match="needs keep"):
        PruneConfig.from_dict({"scorer": "random"})


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.keep = Part("count", {"count": 3})


@pytest.mark.parametrize(
    ("at", "tower", "expected"),
    [
        (None, "image", (0, 1, 2, 3)),
        ((), "image", ()),
        ((3, 1, 1), "text", (1, 3)),
        ((0.0, 0.25, 0.99), "image", (0, 1, 3)),
        ((0.26, 1), "image", (1,)),
        ({"image": (2,)}, "image", (2,)),
        ({"image": (2,)}, "text", ()),
        ({"image": None, "text": (0.5,)}, "image", (0, 1, 2, 3)),
        ((-1,), "image", (3,)),
        ((3, -1, -4, 0.75), "image", (0, 3)),
        ({"image": None, "text": (0.5,)}, "text", (2,)),
    ],
)
def test_depths(at, tower, expected):
    assert BASE.replace(at=at).depths(tower, 4) == expected


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (3, (3,)),
        (0.5, (0.5,)),
        (-1, (-1,)),
        (range(2), (0, 1)),
        ({3, -1, 1}, (-1, 1, 3)),
        (frozenset(), ()),
        ((depth for depth in (2, 0)), (2, 0)),
        (iter([]), ()),
        ({1: "a", 0: "b"}.keys(), (0, 1)),
        ([1, 1, -1, 1], (1, -1)),
        (np.arange(3), (0, 1, 2)),
        (np.array([]), ()),
        (np.int64(2), (2,)),
        (np.float32(0.5), (0.5,)),
        (np.array(-2), (-2,)),
        ([np.int8(1), np.float64(0.25)], (1, 0.25)),
        (torch.tensor([1, 2]), (1, 2)),
        (torch.tensor(3), (3,)),
        ([torch.tensor(3), 1], (3, 1)),
        (fractions.Fraction(1, 4), (0.25,)),
        ({"image": 3, "text": np.arange(2)}, {"image": (3,), "text": (0, 1)}),
        ({"image": None, "text": []}, {"image": None, "text": ()}),
        ({}, {}),
    ],
)
def test_depths_of_every_form_become_plain_numbers(at, expected):
    config = BASE.replace(at=at)
    assert config.at == expected
    assert [type(d) for d in numbers_of(config.at)] == [type(d) for d in numbers_of(expected)]
    assert there_and_back(config) == config
    assert hash(there_and_back(config)) == hash(config)


def numbers_of(at):
    return [d for depths in (at.values() if isinstance(at, dict) else [at]) for d in depths or ()]


@pytest.mark.parametrize(
    "at",
    ["all", "3", b"3", ("a",), (None,), (True,), True, np.array([True, False]), np.bool_(True), torch.ones(3) > 0]
    + [{"image": {"text": (1,)}}, {"image": "all"}, [[1, 2]], np.zeros((2, 2), int), slice(3), object(), 1j],
)
def test_bad_depths(at):
    with pytest.raises(TypeError, match="depths"):
        BASE.replace(at=at)


def test_towers_have_names():
    with pytest.raises(TypeError, match="keys are names of towers, such as 'image', not 0"):
        BASE.replace(at={0: (3,)})


@pytest.mark.parametrize("at", [(1.0,), 1.0, (-0.1,), {"text": (7.5,)}, (float("nan"),), np.arange(3.0), np.float32(2)])
def test_bad_fractions(at):
    with pytest.raises(ValueError, match=r"a fraction of the depth lies in \[0, 1\)"):
        BASE.replace(at=at)


@pytest.mark.parametrize("depth", [4, -5, 99])
def test_depths_a_tower_does_not_have(depth):
    with pytest.raises(ValueError, match=rf"the text tower has depths 0 .. 3, or -4 .. -1 from the end, not {depth}"):
        BASE.replace(at=(depth,)).depths("text", 4)


@given(depths=st.integers(1, 64), data=st.data())
def test_every_way_to_name_a_block_names_it(depths, data):
    block = data.draw(st.integers(0, depths - 1))
    for at in (block, block - depths, block / depths, {"text": [block, block - depths]}):
        assert BASE.replace(at=at).depths("text", depths) == (block,)


class TestHash:
    @pytest.mark.parametrize("name", presets.names())
    def test_equal_configs_have_the_same(self, name):
        assert hash(preset(name)) == hash(preset(name)) == hash(there_and_back(preset(name)))
        assert len({preset(name), preset(name), preset(name).replace(at=(), place="attention")}) == 2

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_copies_are_equal_and_as_fixed(self, copied):
        config = BASE.replace(at={"image": (1, 0.5), "text": None}, keep=Part("ratio", {"ratio": 0.4}))
        again = copied(config)
        assert again == config and hash(again) == hash(config)
        with pytest.raises(TypeError, match=r"cannot be changed: make another config with replace"):
            again.keep.args["ratio"] = 0.5
        with pytest.raises(TypeError, match="cannot be changed"):
            again.at.update(image=None)

    def test_parts_of_nested_arguments(self):
        part = Part("x", {"a": [1, {"b": [2]}]})
        assert (
            hash(part)
            == hash(Part.from_spec(json.loads(json.dumps(part.to_dict()))))
            == hash(Part.from_spec(str(part)))
        )
        assert part.to_dict() == {"name": "x", "a": [1, {"b": [2]}]}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("two"), "two"),
        (np.array([1, 2]), (1, 2)),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([[1], [2]]), ((1,), (2,))),
        (range(2), (0, 1)),
        ({"b", "a"}, ("a", "b")),
        ({"a": np.float64(1)}, {"a": 1.0}),
        (pathlib.PurePosixPath("a/b"), "a/b"),
    ],
)
def test_arguments_become_plain(value, plain):
    part = Part("x", {"a": value})
    assert part.args == {"a": plain} and type(part.args["a"]) is type(Part("x", {"a": plain}).args["a"])
    assert Part.from_spec(json.loads(json.dumps(part.to_dict()))) == part == Part.from_spec(str(part))


@pytest.mark.parametrize("value", [object(), b"x", 1j, print, torch.float16, {1: 2}, [object()]])
def test_arguments_that_json_has_no_form_for(value):
    with pytest.raises(TypeError, match=r"x\(a=...\)"):
        Part("x", {"a": value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), [float("-inf")]])
def test_arguments_that_are_not_finite(value):
    with pytest.raises(ValueError, match=r"x\(a=...\) is .*: give a finite number"):
        Part("x", {"a": value})


def test_mutable_arguments_may_change_afterwards():
    sizes = [1, 2]
    part = Part("x", {"sizes": sizes})
    sizes.append(3)
    assert part.args["sizes"] == (1, 2)


@pytest.mark.parametrize("args", [[("ratio", 0.5)], "ratio", 3])
def test_arguments_are_a_mapping(args):
    with pytest.raises(TypeError, match="args must be a dict"):
        Part("ratio", args)


def test_names_of_parts_are_text():
    with pytest.raises(TypeError, match="a part's name is text"):
        Part.from_spec({"name": 3})


class TestKeepersByTower:
    """One keeper a tower, as a budget for each of them leaves it."""

    both = BASE.replace(keep={"image": "ratio(ratio=0.5)", "text": {"name": "top_p", "p": 0.8}})

    def test_it_survives_json_and_replacing(self):
        assert there_and_back(self.both) == self.both
        assert self.both.replace(at=(1, 2)).keep == self.both.keep
        assert self.both.part("keep", "text") == Part("top_p", {"p": 0.8})
        assert self.both.part("scorer", "text") == self.both.part("scorer") == Part("random")
        assert self.both.parts("keep") == (Part("ratio", {"ratio": 0.5}), Part("top_p", {"p": 0.8}))
        assert self.both.describe("keep") == "image: ratio(ratio=0.5), text: top_p(p=0.8)"
        assert (BASE.describe("keep"), BASE.replace(guide=None).describe("guide")) == ("ratio", "none")

    def test_each_tower_gets_its_own(self):
        model = prune(small("blip").model, self.both)
        kinds = {name: type(tower.pruners_at(0)[0].keeper) for name, tower in model.pruning.towers.items()}
        assert kinds == {"image": keepers["ratio"], "text": keepers["top_p"]}

    @pytest.mark.parametrize(
        ("keep", "error", "says"),
        [
            ({}, ValueError, "name a keeper for each tower"),
            ({"image": "ratoi"}, LookupError, "did you mean ratio"),
            ({"image": "ratio(p=1)"}, TypeError, "no argument 'p'"),
            ({"image": 0.5}, TypeError, "a part is 'name'"),
        ],
    )
    def test_what_is_wrong_is_told_when_it_is_made(self, keep, error, says):
        with pytest.raises(error, match=says):
            BASE.replace(keep=keep)

    def test_a_guided_one_needs_a_guide(self):
        with pytest.raises(ValueError, match="reads the alignment guide"):
            self.both.replace(keep={"image": "ratio", "text": "threshold"}, guide=None)

    def test_towers_are_checked_when_it_prunes(self):
        with pytest.raises(ValueError, match="and the text tower, which is pruned, has none"):
            prune(small("blip").model, BASE.replace(keep={"image": "ratio"}))
        prune(small("blip").model, BASE.replace(keep={"image": "ratio"}, at={"image": None}))
        with pytest.raises(ValueError, match=r"keep=.* names the tower 'vision'; this model has image, text"):
            prune(small("blip").model, BASE.replace(keep={"vision": "ratio"}))
        with pytest.raises(ValueError, match=r"name the tower, part\('keep', 'image'\)"):
            self.both.part("keep")


def test_a_config_without_a_guide_has_no_part_of_it():
    config = BASE.replace(guide=None)
    assert config.parts("guide") == ()
    with pytest.raises(ValueError, match="guide=None: this config has no guide"):
        config.part("guide")
