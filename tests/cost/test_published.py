"""What was published of MACs, put together from counts, to the last digit; and the page that says so."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "published_macs.py"))


@pytest.mark.parametrize("model", SCRIPT["MODELS"], ids=lambda model: model.__name__)
def test_published(model):
    page = (ROOT / "docs" / "cost.md").read_text()
    published, *instances = model()
    digits = len(str(published.published).partition(".")[2])
    assert round(published.with_norms, digits) == published.published
    assert published.macs == pytest.approx(published.published, rel=2e-3)
    for row in (published, *instances):
        assert str(row) in page
