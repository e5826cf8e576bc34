"""Parts as typed functions and by position: they say what the short form with names says."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from registered import registered

import vltprune as vp
from vltprune.pruning.part import KINDS

ROOT = Path(vp.__file__).parent.parent
SPACES = {"guide": vp.guide, "scorer": vp.score, "keep": vp.keep, "selector": vp.selector, "reducer": vp.reduce}
EVERY = [(kind, name) for kind, (registry, _) in KINDS.items() for name in registry.names()]
CONFIG = vp.PruneConfig("madtp", "ratio", "fuse", "codebook")


def own_parameters(kind, name):
    registry, passed = KINDS[kind]
    return [p for p in inspect.signature(registry[name]).parameters.values() if p.name != passed]


def example(kind, name):
    """Arguments that a part takes, by name: its defaults, and 3 where it has none."""
    return {p.name: 3 if p.default is p.empty else p.default for p in own_parameters(kind, name)}


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_part_is_in_its_namespace_and_says_what_its_short_form_says(kind, name):
    make, args = getattr(SPACES[kind], name), example(kind, name)
    assert [*inspect.signature(make).parameters.values()] == own_parameters(kind, name)
    assert make.__name__ == name
    assert make.__doc__ == inspect.getdoc(KINDS[kind][0][name])
    by_name = vp.Part(name, args)
    values = ", ".join(map(repr, args.values()))
    for part in (make(**args), make(*args.values()), vp.Part.from_spec(f"{name}({values})", kind)):
        assert part == by_name
        assert hash(part) == hash(by_name)
    configs = [CONFIG.replace(**{kind: spec}) for spec in (make(*args.values()), f"{name}({values})", by_name)]
    assert configs[0] == configs[1] == configs[2]
    assert len({json.dumps(config.to_dict()) for config in configs}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_namespaces_hold_registered_parts_alone(kind):
    parts = {name for name, thing in vars(SPACES[kind]).items() if getattr(thing, "__module__", "").endswith(".typed")}
    assert parts - {"typed_part"} == {*KINDS[kind][0].names()}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: vp.keep.ratio(0.5, 1.0, 3),
            TypeError,
            r"keeper 'ratio' takes ratio, decay, in this order, and 3 were given",
        ),
        (lambda: vp.reduce.drop(1), TypeError, r"reducer 'drop' takes no arguments, and 1 were given: 1"),
        (lambda: vp.keep.ratio(0.5, ratio=0.6), TypeError, r"has ratio twice: write either 0.5 or ratio=0.6"),
        (lambda: vp.keep.ratio(ratoi=0.5), TypeError, r"takes no argument 'ratoi'; did you mean ratio\?"),
        (lambda: vp.keep.ratio("half"), TypeError, r"keeper 'ratio': ratio='half' must be a number"),
        (lambda: vp.keep.ratio(True), TypeError, r"ratio=True must be a number"),
        (lambda: vp.guide.codebook(0.5), TypeError, r"guide 'codebook': anchors=0.5 must be a whole number"),
        (lambda: vp.reduce.fuse(1), TypeError, r"reducer 'fuse': normalize=1 must be True or False"),
        (lambda: vp.keep.count(), TypeError, r"keeper 'count' needs count: write count=..."),
        (lambda: CONFIG.replace(keep="ratio(0.5, 1.0, 3)"), TypeError, r"takes ratio, decay, in this order"),
        (lambda: CONFIG.replace(keep="ratio(0.5, ratio=0.6)"), TypeError, r"has ratio twice"),
        (lambda: CONFIG.replace(keep="ratio(half)"), ValueError, r"write name or name\(key=value"),
        (lambda: CONFIG.replace(keep={"image": "ratio('half')"}), TypeError, r"ratio='half' must be a number"),
    ],
)
def test_wrong_arguments_are_answered_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_part_of_ones_own_is_typed_in_the_same_way():
    class Half(vp.KeepRatioPredictor):
        """Half of them."""

        def __init__(self, spec, factor: float = 1.0):
            super().__init__(spec)
            self.factor = factor

    with pytest.raises(LookupError, match="is not registered"):
        vp.typed_part(Half)
    with registered(vp.keepers, half=Half):
        assert vp.typed_part(Half)(0.5) == vp.Part("half", {"factor": 0.5})


@pytest.mark.parametrize(
    ("name", "owner"), [("reduction", "vltprune.prune and vltprune.calibrate"), ("pretrained", "vltprune.create_model")]
)
def test_arguments_of_other_functions_are_not_taken_for_parts(name, owner):
    with pytest.raises(TypeError, match=f"{name}= is an argument of {owner}, and no part: parts are scorer, keep"):
        CONFIG.replace(**{name: 0.5})
    with pytest.raises(TypeError, match=f"{name}= is an argument of {owner}, and no part: parts are scorer, keep"):
        vp.PruneConfig.from_dict({**CONFIG.to_dict(), name: 0.5})


USES = """
from typing_extensions import assert_type
import vltprune as vp

assert_type(vp.keep.ratio(0.5), vp.Part)
assert_type(vp.keep.ratio(ratio=0.5, decay=2.0), vp.Part)
assert_type(vp.guide.codebook(anchors=100, attend="sparsemax"), vp.Part)
assert_type(vp.score.madtp(), vp.Part)
vp.PruneConfig(vp.score.madtp(), vp.keep.threshold(), vp.reduce.fuse(), vp.guide.codebook(), at=(3, 6))
vp.PruneConfig("madtp", {"image": vp.keep.ratio(0.5), "text": "ratio(0.7)"})
"""
WRONG = ["vp.keep.ratio('half')", "vp.keep.ratio(ratoi=0.5)", "vp.keep.ratio(0.5, 1.0, 2.0)", "vp.keep.count()"]


def test_type_checkers_know_the_arguments_of_parts(tmp_path):
    def errors(text):
        (tmp_path / "uses.py").write_text(text)
        command = ["-m", "pyrefly", "check", str(tmp_path / "uses.py"), "--config", str(ROOT / "pyproject.toml")]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True).stdout.count("ERROR ")

    assert errors(USES) == 0
    assert errors("\n".join(["import vltprune as vp", *WRONG])) == len(WRONG)
