"""Settings that every test shares: hypothesis profiles, threads, seeds."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import pytest


def pytest_addoption(parser):
    parser.addoption("--kernels", action="store_true", help="run all tests with the compiled kernels (build_kernels)")


def pytest_configure(config):
    """In processes that run tests; one that hands them out to others need not import torch, and starts them sooner."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        _configure()
        if config.getoption("kernels"):
            import vltprune

            vltprune.build_kernels()


def _configure():
    import hypothesis
    import torch

    gc.disable()  # until all tests are imported
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the tests' models are too small for more

    # "ci" draws the same examples on every run, so that who changed nothing sees what everybody sees; "explore" draws new ones
    common: dict[str, Any] = {
        "deadline": None,
        "report_multiple_bugs": False,
        "print_blob": True,
        # to explain a failure takes the longest
        "phases": [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain],
        "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    }
    profiles = hypothesis.settings
    profiles.register_profile("ci", max_examples=25, derandomize=True, database=None, **common)
    profiles.register_profile("fast", max_examples=5, derandomize=True, database=None, **common)
    profiles.register_profile("explore", max_examples=100, **common)
    profiles.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
    hypothesis.register_random(_torch_random)


class _TorchRandom:
    """torch's global generator, for hypothesis to seed before each example."""

    @staticmethod
    def seed(value):
        import torch

        # not torch.manual_seed, which notes a whole stack at each call, for devices that are not used
        torch.default_generator.manual_seed(value)

    @staticmethod
    def getstate():
        import torch

        return torch.get_rng_state()

    @staticmethod
    def setstate(state):
        import torch

        torch.set_rng_state(state)


_torch_random = _TorchRandom()  # hypothesis refers to it weakly


# of the core, and quick: what `make test-fast` runs
_FAST = """
    layers/test_distinct layers/test_guides checks/test_invariants layers/test_keepers layers/test_reducers layers/test_scorers
    core/test_inputs core/test_segments core/test_tokens cost/test_sample_cost evaluation/test_metrics hosts/test_clip
    hosts/test_refusals pruning/test_config pruning/test_losses test_package test_registry
"""


def pytest_collection_modifyitems(items):
    """Tests that draw their examples are marked `property`, those of the quick files of the core `fast`."""
    import hypothesis

    fast = {f"{name}.py" for name in _FAST.split()}
    for item in items:
        if hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("property")
        if item.path.relative_to(item.config.rootpath / "tests").as_posix() in fast:
            item.add_marker("fast")


def pytest_collection_finish():
    """What was imported is no garbage: collections have less to look through."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one precision a process: that of a trainer that an earlier test built is forgotten."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _seeded():
    _TorchRandom.seed(0)
