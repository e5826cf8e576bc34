"""One small class: names to makers."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import subprocess
import sys
import threading

import pytest

import vltprune as vp
from vltprune.registry import bind
from vltprune.utils import importing


@pytest.fixture
def fruits():
    registry = vp.Registry("fruit")
    for name in ("apple", "apricot", "banana"):
        registry.register(name)(str)
    return registry


def test_names_and_lookup(fruits):
    assert fruits.names() == ["apple", "apricot", "banana"]
    assert fruits.names("ap*") == ["apple", "apricot"]
    assert fruits["apple"] is str
    assert "apple" in fruits
    assert "cherry" not in fruits


def test_registering_returns_what_was_registered(fruits):
    @fruits.register("cherry")
    class Cherry:
        pass

    assert Cherry is fruits["cherry"]


def test_duplicates_are_refused(fruits):
    with pytest.raises(ValueError, match="fruit 'apple' is already str: choose another name"):
        fruits.register("apple")(int)
    assert fruits["apple"] is str


@pytest.mark.parametrize("name", ["blip_base", "blip_nlvr_tiny"])
def test_taken_backbones_are_refused(name):
    with pytest.raises(ValueError, match=f"backbone '{name}' is already a Backbone: choose another name"):
        vp.backbones.register(name)(int)


@pytest.mark.parametrize("maker", [functools.partial(int, 3), type("Maker", (), {"__call__": lambda self: 3})()])
def test_makers_without_a_name_of_their_own(fruits, maker):
    fruits.register("fig")(maker)
    with pytest.raises(ValueError, match=r"fruit 'fig' is already a (partial|Maker): choose another name"):
        fruits.register("fig")(str)
    assert fruits["fig"] is maker


@pytest.mark.parametrize("maker", [3, None, "fig"])
def test_what_cannot_be_called_makes_nothing(fruits, maker):
    with pytest.raises(TypeError, match="fruit 'fig' must be a class or function"):
        fruits.register("fig")(maker)
    assert "fig" not in fruits


@pytest.mark.parametrize("name", [str, None, 3])
def test_register_takes_a_name(fruits, name):
    with pytest.raises(TypeError, match=r"write register\('name'\)"):
        fruits.register(name)


@pytest.mark.parametrize("name", ["None", "class", "lambda", "", "two words", "a-b", "3d", "a(b)", "a..b"])
def test_names_must_be_identifiers(fruits, name):
    with pytest.raises(ValueError, match="must be an identifier"):
        fruits.register(name)(str)


@pytest.mark.parametrize(
    ("name", "text"), [("aple", r"did you mean apple\?"), ("zzz", "write one of apple, apricot, banana")]
)
def test_unknown_names_are_answered_with_the_nearest(fruits, name, text):
    with pytest.raises(LookupError, match=f"there is no fruit '{name}'; {text}"):
        fruits[name]


def test_threads_register_at_once(fruits):
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        for j in range(50):
            fruits.register(f"stays_{i}_{j}")(int)
            assert fruits.names(f"stays_{i}_*")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(fruits.names("stays_*")) == 400


def maker(spec, size, shape="round"):
    return spec, size, shape


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sise": 1}, r"fruit takes no argument 'sise'; did you mean size\?"),
        ({"spec": 1, "size": 2}, "fruit takes no argument 'spec'"),
        ({"size": 1, "spec": 3}, "fruit takes no argument 'spec'"),
        ({}, r"fruit needs size: write size="),
    ],
)
def test_bind_refuses(arguments, text):
    with pytest.raises(TypeError, match=text):
        bind("fruit", maker, arguments, reserved=("spec",))


def test_bind_accepts():
    bind("fruit", lambda spec, *rest, size, **more: None, {"size": 1, "color": "red"}, reserved=("spec",))
    bind("fruit", maker, {"size": 1}, reserved=("spec",))
    bind("fruit", maker, {"size": 1, "shape": "long"}, reserved=("spec",))


@dataclasses.dataclass
class Sized:
    """A maker that cannot be hashed, as no dataclass can that compares its fields."""

    largest: int

    def __call__(self, spec, size):
        return min(size, self.largest)


@dataclasses.dataclass(frozen=True)
class Listed:
    """A maker whose hash fails for what it holds."""

    largest: list

    def __call__(self, spec, size):
        return min(size, *self.largest)


@pytest.mark.parametrize("maker", [Sized(3), Listed([3])], ids=["no hash", "no hash of a field"])
def test_bind_reads_makers_that_cannot_be_hashed(maker):
    bind("fruit", maker, {"size": 1}, reserved=("spec",))
    with pytest.raises(TypeError, match="fruit takes no argument 'sise'"):
        bind("fruit", maker, {"sise": 1}, reserved=("spec",))


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (vp.guides, {"codebook", "text_query", "text_embedding"}),
        (vp.scorers, {"madtp", "self_attention", "cls_attention", "mean_cls_attention", "alignment", "random"}),
        (vp.scorers, {"distinct", "distinct_attention", "distinct_madtp"}),
        (vp.keepers, {"threshold", "ratio", "count", "random_ratio"}),
        (vp.reducers, {"drop", "fuse"}),
        (vp.presets, {"attention", "madtp_decay", "madtp", "evit", "random"}),
        (vp.backbones, {f"blip{kind}_{size}" for kind in ("", "_nlvr") for size in ("tiny", "base", "large")}),
    ],
)
def test_what_is_promised_is_registered(registry, names):
    assert names <= set(registry.names())


@pytest.mark.parametrize("registry", [vp.guides, vp.scorers, vp.keepers, vp.reducers, vp.presets])
def test_every_part_says_what_it_is(registry):
    assert [name for name in registry.names() if not (registry[name].__doc__ or "").strip()] == []


@pytest.mark.parametrize("name", vp.presets.names())
def test_presets_are_configs(name):
    assert isinstance(vp.preset(name), vp.PruneConfig)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Installs a package: its entry points in the group of parts, and its modules by name."""

    def install(entry_points, **modules):
        info = tmp_path / "fruit_salad-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fruit-salad\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {value}" for name, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[vltprune.parts]\n{lines}\n")
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importing, "_failed", None)
    yield install
    for name in ("salad_parts", "salad_broken"):
        sys.modules.pop(name, None)
    for name in ("salad", "dressing"):
        vp.keepers._makers.pop(name, None)


REGISTERS = "import vltprune as vp\nvp.keepers.register({name!r})(vp.keepers['ratio'])\n"


@pytest.mark.parametrize("value", ["salad_parts", "salad_parts:register"])
def test_entry_points_of_other_packages_are_loaded_when_a_name_is_missing(value, plugin):
    text = REGISTERS.format(name="salad")
    body = text if ":" not in value else "def register():\n    " + text.replace("\n", "\n    ")
    plugin({"salad": value}, salad_parts=body)
    assert "ratio" in vp.keepers and "salad_parts" not in sys.modules
    assert vp.Part.from_spec("salad(0.5)", "keep").args == {"ratio": 0.5}
    assert "salad" in vp.keepers.names()


def test_a_plugin_that_fails_is_told_and_others_are_loaded(plugin):
    plugin(
        {"bad": "salad_broken", "good": "salad_parts"}, salad_broken="1 / 0", salad_parts=REGISTERS.format(name="salad")
    )
    with pytest.warns(importing.PluginWarning, match="the parts bad of fruit-salad are missing, for ZeroDivisionError"):
        assert "salad" in vp.keepers
    with pytest.raises(LookupError, match=r"there is no keeper 'dressing'.*; the parts bad of fruit-salad are missing"):
        vp.keepers["dressing"]


def test_importing_the_package_loads_no_plugins():
    code = "import vltprune; from vltprune.utils import importing; print(importing._failed)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
