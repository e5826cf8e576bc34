"""The real data sets that some tests read, where they lie; elsewhere those tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOM = Path(os.environ.get("VLTPRUNE_DATA") or Path(__file__).parents[2] / "shared" / "data")
on_disk = pytest.mark.skipif(
    not (ROOM / "flickr8k").is_dir(), reason=f"no data sets at {ROOM}; set VLTPRUNE_DATA to the folder that holds them"
)
