"""A save that fails, wherever it fails, leaves the model that was saved before."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import stat

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import vltprune as vp
from vltprune.evaluation.results_log import write_json
from vltprune.io import checkpoint
from vltprune.utils import files

SMALL = {"vision_depth": 1, "text_depth": 1, "vision_width": 32, "text_width": 32}
CALLS = (
    (os, "replace"),
    (os, "fsync"),
    (pathlib.Path, "open"),
    (pathlib.Path, "write_text"),
    (pathlib.Path, "mkdir"),
    (checkpoint, "save_file"),
)


@pytest.fixture
def models():
    """Two that differ in their weights and in their config."""
    return [vp.create_model("blip_nlvr_tiny", preset="evit", keep=f"ratio(ratio={r})", **SMALL) for r in (0.5, 0.8)]


def is_saved(folder, model):
    again = vp.load(folder)
    state = again.state_dict()
    same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return same and again.pruning.config == model.pruning.config


class Failing:
    """A function that fails at one of its calls."""

    def __init__(self, function, at, error):
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __get__(self, instance, owner=None):
        return self if instance is None else lambda *args, **named: self(instance, *args, **named)

    def __call__(self, *args, **named):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*args, **named)


@pytest.mark.parametrize(("where", "name"), CALLS, ids=lambda one: getattr(one, "__name__", one))
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_each_call_that_fails_leaves_the_old_pair(tmp_path, monkeypatch, models, where, name, error):
    old, new = models
    vp.save(old, tmp_path)
    for at in range(1, 20):
        failing = Failing(getattr(where, name), at, error)
        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing)
            with contextlib.suppress(OSError, KeyboardInterrupt):
                vp.save(new, tmp_path)
        if failing.calls < at:
            break  # that was the last of its calls
        if not is_saved(tmp_path, old):  # the save was done, and what failed came after it
            assert is_saved(tmp_path, new)
            vp.save(old, tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert at > 1
    assert is_saved(tmp_path, new)


@pytest.mark.parametrize("limit", [10, 5_000, 200_000])
def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path, models, limit):
    old, new = models
    vp.save(old, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write the model to .*choose a folder"):
            vp.save(new, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_saved(tmp_path, old)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch, models):
    for at in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", Failing(os.replace, at, OSError(5, "Input/output error")))
            with pytest.raises(OSError, match="Input/output error"):
                vp.save(models[0], tmp_path)
        assert os.listdir(tmp_path) == []


def test_a_process_that_is_killed_between_the_two_files(tmp_path, monkeypatch, models):
    """Nothing is cleaned up then: the earlier weights are in the folder with the new ones, and are read."""
    old, new = models
    vp.save(old, tmp_path)

    class Killed(BaseException):
        pass

    for at in (2, 3):  # the old weights are moved away, then the new ones in, then the config
        with monkeypatch.context() as patch:
            failing = Failing(os.replace, at, Killed())
            failing.function = _dead_after(failing, os.replace)
            patch.setattr(os, "replace", failing)
            patch.setattr(pathlib.Path, "unlink", lambda *_, **__: None)
            with pytest.raises((Killed, OSError)):
                vp.save(new, tmp_path)
        assert is_saved(tmp_path, old)
        with monkeypatch.context() as patch:  # and a save after that, which fails again
            patch.setattr(files.os, "fsync", Failing(os.fsync, 1, OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                vp.save(new, tmp_path)
        assert is_saved(tmp_path, old)
    vp.save(new, tmp_path)
    assert is_saved(tmp_path, new)


def _dead_after(failing, function):
    def call(*args):
        if failing.calls > failing.at:
            raise OSError("the process is gone")
        return function(*args)

    return call


def test_weights_and_config_of_two_saves_are_refused(tmp_path, models):
    for place, model in zip("ab", models, strict=True):
        vp.save(model, tmp_path / place)
    os.replace(tmp_path / "a" / "config.json", tmp_path / "b" / "config.json")
    with pytest.raises(vp.CheckpointError, match="are of two different saves"):
        vp.load(tmp_path / "b")


@pytest.mark.parametrize("preset", [None, "evit"])
@pytest.mark.parametrize(
    "arguments", [{"act_layer": nn.ReLU}, {"drop_path_rate": torch.tensor(0.1)}, {"args": {"a": [{1: 2}]}}], ids=str
)
def test_arguments_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path, models, arguments, preset):
    vp.save(models[0], tmp_path)
    model = vp.create_model("blip_nlvr_tiny", preset=preset, **SMALL)
    host = model.pruning.host if preset else model
    recipe = checkpoint.Recipe("blip_nlvr_tiny", arguments)
    object.__setattr__(host, "recipe", recipe)
    with pytest.raises(
        TypeError, match=rf"cannot save this blip_nlvr_tiny: its model argument {next(iter(arguments))}="
    ):
        vp.save(model, tmp_path)
    with pytest.raises(TypeError, match="Nothing was written"):
        vp.save(model, tmp_path / "fresh")
    assert is_saved(tmp_path, models[0])
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_the_umask_holds(tmp_path, models, mask):
    before = os.umask(mask)
    try:
        vp.save(models[0], tmp_path / "m")
        write_json(tmp_path / "m" / "x.json", {})
        files.write_text(tmp_path / "m" / "y.txt", "")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "m").iterdir()} == {0o666 & ~mask}


def test_what_is_moved_into_its_place_is_on_the_disk_first_and_its_name_afterwards(tmp_path, monkeypatch, models):
    """As a power failure would have it: the contents are synced, then the file is moved, then its folder is synced."""
    said, sync, replace = [], os.fsync, os.replace

    def syncing(handle):
        said.append(("synced", os.fstat(handle).st_ino))
        return sync(handle)

    def replacing(source, target):
        said.append(("moved", os.stat(source).st_ino))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    for write, names in (
        (lambda: vp.save(models[0], tmp_path), ("model.safetensors", "config.json")),
        (lambda: files.write_text(tmp_path / "y.txt", "y"), ("y.txt",)),
    ):
        said.clear()
        write()
        written = [(tmp_path / name).stat().st_ino for name in names]
        assert said[: len(names)] == [("synced", file) for file in written]
        assert said[len(names) : -1] == [("moved", file) for file in written] + said[2 * len(names) : -1]
        assert said[-1] == ("synced", tmp_path.stat().st_ino)


def test_one_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    files.write_text(file, "old")
    for where, name in ((os, "replace"), (os, "fsync"), (pathlib.Path, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, Failing(getattr(where, name), 1, OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                files.write_text(file, "new")
        assert [one.read_text() for one in tmp_path.iterdir()] == ["old"]
    with pytest.raises(SafetensorError), files.replacing(file):
        raise SafetensorError("no")
    assert file.read_text() == "old"
