"""Runs on a GPU, in every dtype. Needs one."""

from __future__ import annotations

import pytest
import torch
from runs import config

from vltprune.training import compress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@pytest.mark.filterwarnings("ignore:captions are written, and not scored")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("budget", ["controller", "learned"])
@pytest.mark.parametrize("task", ["nlvr", "vqa", "caption", "retrieval"])
def test_a_run_compresses_there(tmp_path, task, budget, dtype):
    keep = "ratio(ratio=0.7)" if budget == "controller" else "learned"
    changes = {"parts": {"guide": "codebook(anchors=4)", "keep": keep}, "reduction": 0.2, "steps": 6}
    taught = {"saliency": 0.5, "distill": 1.0, "distill_summaries": 1.0}
    done = compress(config(task, tmp_path, budget=budget, dtype=dtype, **changes, **taught), tmp_path / "run")
    assert done is not None
    assert done.rows[-1]["macs_saved"] == pytest.approx(0.2, abs=0.03)
    assert next(done.model.parameters()).is_cuda
