"""Training needs accelerate, of the extra `train`."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")
