"""What runs where open_clip is installed, and transformers is not."""

from __future__ import annotations

import sys

import pytest
import torch

import vltprune as vp


def prune_open_clip() -> None:
    assert not {"open_clip", "transformers"} & sys.modules.keys()
    sys.modules["transformers"] = None  # as if it were not installed
    import open_clip

    text = {"layers": 1, "width": 32, "heads": 4, "context_length": 8, "vocab_size": 60}
    image = {"layers": 1, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16}
    vp.prune(open_clip.CustomTextCLIP(8, image, text), "madtp")
    with pytest.raises(TypeError, match="no host runs it"):
        vp.prune(torch.nn.Linear(2, 2), "madtp")
