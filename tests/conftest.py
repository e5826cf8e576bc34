"""Settings that every test shares: hypothesis profiles, threads, seeds."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the tests' models are too small for more

_COMMON = {"deadline": None, "report_multiple_bugs": False, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("dev", max_examples=25, **_COMMON)
hypothesis.settings.register_profile("ci", max_examples=60, derandomize=True, print_blob=True, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


class _TorchRandom:
    """torch's global generator, for hypothesis to seed before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate, setstate = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()
hypothesis.register_random(_torch_random)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
