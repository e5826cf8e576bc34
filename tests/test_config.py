"""Parts and configs as plain data: short forms, JSON both ways, and errors when they are made."""

from __future__ import annotations

import dataclasses
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given
from strategies import arguments

from vltprune import Part, PruneConfig, guides, keepers, preset, presets, reducers, scorers

KINDS = {"scorer": scorers, "keep": keepers, "reducer": reducers, "guide": guides}
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
    assert Part.of(str(part)) == part == Part.of(part) == Part.of(part.to_dict())
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
    assert Part.of(text.strip()) == part


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ratio(",
        "ratio(0.5)",
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
        Part.of(text)


def test_parts_of_other_types():
    with pytest.raises(TypeError, match=r"not int: 3"):
        Part.of(3)
    with pytest.raises(ValueError, match="a part needs a 'name'"):
        Part.of({"ratio": 1})


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
    for argument in ("nonsense", "site" if kind != "guide" else "sites"):
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
    with pytest.raises(TypeError, match=r"no argument 'kepe'; did you mean keep\?"):
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
        ({"image": None, "text": (0.5,)}, "text", (2,)),
    ],
)
def test_depths(at, tower, expected):
    assert BASE.replace(at=at).depths(tower, 4) == expected


@pytest.mark.parametrize("at", [3, 0.5, "all", ("a",), (None,), (True,), {"image": 3}, {"image": {"text": (1,)}}])
def test_bad_depths(at):
    with pytest.raises(TypeError, match="depths"):
        BASE.replace(at=at)


@pytest.mark.parametrize("at", [(1.0,), (-0.1,), {"text": (7.5,)}, (float("nan"),)])
def test_bad_fractions(at):
    with pytest.raises(ValueError, match=r"a fraction of the depth lies in \[0, 1\)"):
        BASE.replace(at=at)


@pytest.mark.parametrize("depth", [4, -1])
def test_depths_a_tower_does_not_have(depth):
    with pytest.raises(ValueError, match=rf"the text tower has depths 0 .. 3, not {depth}"):
        BASE.replace(at=(depth,)).depths("text", 4)
