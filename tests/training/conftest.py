"""Training needs accelerate, of the extra `train`."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")


@pytest.fixture
def no_final_evaluation(monkeypatch):
    """What comes behind the last step is another matter: `compress` returns the trained model."""
    from vltprune.training import compression

    monkeypatch.setattr(compression, "finish", lambda run, model, val: model)
