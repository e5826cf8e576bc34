"""Ctrl-C and SIGTERM: a checkpoint of the last whole step, and a resumed run that equals an uninterrupted one."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from runs import config

from vltprune.training import Stopped, Trainer, compress
from vltprune.training import compression as compression_module
from vltprune.training.loop.interrupts import InterruptHandler

SIGNALS = (signal.SIGINT, signal.SIGTERM)
pytestmark = pytest.mark.usefixtures("no_final_evaluation")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config of a run of four steps without a checkpoint before the last, its folder, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    parts = {"guide": "codebook(anchors=4)", "keep": "learned(threshold=-0.5)"}  # whose knob needs no first search
    settings = config("nlvr", folder / "data", checkpoint_every=100, budget="learned", parts=parts, saliency=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression_module, "finish", lambda run, model, val: model)
        return settings, compress(settings, folder / "run").state_dict()


def interrupted(monkeypatch, settings, folder, method, act):
    """Run with `act(run)` before each call of a method of the run; what it was stopped with, and its checkpoints."""
    with monkeypatch.context() as patch:
        original = getattr(Trainer, method)

        def acting(self, *given, **named):
            act(self)
            return original(self, *given, **named)

        patch.setattr(Trainer, method, acting)
        with pytest.raises(Stopped) as caught:
            compress(settings, folder)
    return str(caught.value), sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def goes_on(whole, folder):
    settings, weights = whole
    again = compress(settings, folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


@pytest.mark.parametrize(("number", "method"), [(signal.SIGINT, "_clip_gradients"), (signal.SIGTERM, "_backward")])
def test_a_signal_in_a_step_ends_the_run_behind_it(whole, number, method, tmp_path, monkeypatch, capfd):
    before = [signal.getsignal(one) for one in SIGNALS]

    def act(run):
        if run.done == 1:
            signal.raise_signal(number)

    told, there = interrupted(monkeypatch, whole[0], tmp_path / "run", method, act)
    assert told == "stopped after step 2 of 4; the same command resumes there"
    assert there == ["step_00000002"]
    assert "stopping behind this step, with a checkpoint; Ctrl-C again" in capfd.readouterr().err
    assert [signal.getsignal(one) for one in SIGNALS] == before
    goes_on(whole, tmp_path / "run")
    assert "going on from step 2" in capfd.readouterr().err


def test_a_second_ctrl_c_leaves_at_once(whole, tmp_path, monkeypatch):
    def act(run):
        if run.done == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # that is no Ctrl-C
            assert run.done == 1
            signal.raise_signal(signal.SIGINT)

    told, there = interrupted(monkeypatch, whole[0], tmp_path / "run", "_clip_gradients", act)
    assert told == "stopped in the middle of step 2 of 4; the same command begins anew: there is no checkpoint yet"
    assert not there


def test_an_interrupt_between_steps_is_one_of_whole_steps(whole, tmp_path, monkeypatch):
    def act(run):
        if run.done == 3:
            raise KeyboardInterrupt

    told, there = interrupted(monkeypatch, whole[0], tmp_path / "run", "_step", act)
    assert (told, there) == ("stopped after step 3 of 4; the same command resumes there", ["step_00000003"])
    goes_on(whole, tmp_path / "run")


def test_half_a_step_is_not_kept(whole, tmp_path, monkeypatch):
    def act(run):
        if run.done == 3:
            raise KeyboardInterrupt

    settings = whole[0].replace(checkpoint_every=2)
    told, there = interrupted(monkeypatch, settings, tmp_path / "run", "_clip_gradients", act)
    assert told.startswith("stopped in the middle of step 4 of 4; the same command resumes from step 2, of the last")
    assert there == ["step_00000002"]


def test_before_the_first_step_there_is_nothing_to_keep(whole, tmp_path, monkeypatch):
    def act(run):
        raise KeyboardInterrupt

    told, there = interrupted(monkeypatch, whole[0], tmp_path / "run", "_step", act)
    assert (told, there) == ("stopped before the first step was whole; the same command begins anew", [])


def test_what_was_trained_is_there_when_evaluation_is_stopped(whole, tmp_path, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compression_module, "finish", stop)
        with pytest.raises(Stopped, match="behind the last step, 4, while the models were evaluated; the same command"):
            compress(whole[0], tmp_path / "run")
    goes_on(whole, tmp_path / "run")


def test_what_is_done_is_said_as_it_begins(whole, tmp_path, monkeypatch, capfd):
    said = []

    def act(run):
        said.append(capfd.readouterr().err)
        raise KeyboardInterrupt

    settings = config("nlvr", tmp_path / "data", parts={"guide": "codebook(anchors=4)", "keep": "ratio"})
    interrupted(monkeypatch, settings, tmp_path / "run", "_step", act)
    lines = [line for line in said[0].splitlines() if line.startswith("vltprune: ")]
    words = ("loading blip_nlvr_tiny", "reading", "reading", "opening the images", "placing the guide's anchors")
    words += ("measuring MACs", "measuring what decoding costs", "training 4 steps")
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_several_processes_hear_no_second_one():
    stop = InterruptHandler(processes=2)
    with stop.installed():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    assert stop.requested


def test_other_threads_leave_signals_alone():
    heard = []

    def watch():
        with InterruptHandler().installed():
            heard.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert heard == [signal.getsignal(signal.SIGINT)]
