"""Accelerate's state of a process: the device and dtype of a run, and what a run leaves behind."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import is_initialized
from runs import config

from vltprune.training import compress
from vltprune.training.accelerate_state import accelerate_state

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def any_device(monkeypatch):
    """Every device counts as one of this machine."""
    monkeypatch.setattr("vltprune.training.accelerate_state.check_device", lambda device: None)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "cuda", "cuda:1", "mps"])
def test_a_device_is_the_runs(device, any_device, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "xpu")
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    with accelerate_state("bfloat16", device) as state:
        assert state.device == torch.device(device.removesuffix(":0"))
        assert PartialState().device == state.device
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "xpu"
    assert PartialState._shared_state == {}


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_state(fails):
    try:
        with accelerate_state("float32", "cpu"):
            Accelerator(mixed_precision="no")
            assert is_initialized()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert not is_initialized()
    assert PartialState._shared_state == {}


def test_a_callers_accelerator_stays_and_its_precision_is_the_runs():
    own = Accelerator(mixed_precision="bf16", cpu=True)
    with accelerate_state("bfloat16", "cpu") as state:
        assert Accelerator(mixed_precision="bf16").device == own.device == state.device
    assert own.mixed_precision == "bf16"
    complaint = "dtype='float32': this process has an Accelerator of mixed_precision='bf16'"
    with pytest.raises(ValueError, match=complaint), accelerate_state("float32"):
        pass
    assert own.mixed_precision == "bf16"


def test_a_callers_processes_stay():
    PartialState(cpu=True)
    with accelerate_state("bfloat16"):
        Accelerator(mixed_precision="bf16")
    assert not is_initialized()
    assert PartialState._shared_state["device"] == torch.device("cpu")


def test_another_device_than_the_callers_is_refused(any_device):
    PartialState(cpu=True)
    complaint = "device='cuda:1': Accelerate runs on cpu in this process already: compress before"
    with pytest.raises(ValueError, match=complaint), accelerate_state("float32", "cuda:1"):
        pass


@pytest.mark.parametrize(
    ("dtype", "device", "environment", "complaint"),
    [
        ("float32", "cuda:99", {}, "device='cuda:99' is no device of this machine: it has cpu"),
        ("float32", torch.device("meta"), {}, "device='meta' is no device of this machine: it has cpu"),
        ("float16", "cpu", {}, "dtype='float16' trains on a GPU, .*: write dtype='bfloat16'"),
        ("float32", "cpu:0", TORCHRUN, "device='cpu:0' is one device, .*: write device='cpu', and choose"),
    ],
)
def test_what_cannot_run_is_refused_before_work_begins(dtype, device, environment, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=complaint):
        compress(config("nlvr", tmp_path / "data", dtype=dtype), tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_processes_that_would_run_alone_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=r"2 processes were launched, .*: write device='cpu'"),
        accelerate_state("float32"),
    ):
        pass


def test_a_run_goes_on_on_another_device(tmp_path):
    settings = config("nlvr", tmp_path / "data", val_limit=2, steps=1)
    compress(settings, tmp_path / "run", device="cpu")
    assert "device" not in (tmp_path / "run" / "config.json").read_text()
    assert compress(settings, tmp_path / "run") is not None
