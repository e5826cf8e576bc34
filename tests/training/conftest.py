"""Training needs accelerate, of the extra `train`."""

from __future__ import annotations

import pytest

state = pytest.importorskip("accelerate.state", reason="training needs accelerate: pip install 'vltprune[train]'")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one precision a process: that of a trainer that an earlier test built is forgotten."""
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_final_evaluation(monkeypatch):
    """What comes behind the last step is another matter: `compress` returns the trained model."""
    from vltprune.training import compression

    monkeypatch.setattr(compression, "finish", lambda run, model, val: model)
