"""Two processes train a pruned model by DistributedDataParallel without find_unused_parameters."""

from __future__ import annotations

import contextlib
import copy

import open_clip
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from small_models import images, scrambled, soften
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import vltprune as vp

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
CASES = [
    {},
    {"reducer": "drop"},
    {"keep": "learned"},
    {"keep": "learned", "soft": True},
    {"at": {"text": (1,)}},
    {"at": {"image": (0,)}},
    {"at": ()},
    {"scorer": "self_attention", "keep": "ratio(ratio=1.0)", "guide": None},
]


def test_each_process_learns_from_all_whatever_is_merged_in_it():
    on_two_ranks(train)


def train(rank: int) -> None:
    for case in CASES:
        torch.manual_seed(0)
        parts = {"guide": "codebook(anchors=5)", **case}
        soft = parts.pop("soft", False)
        model = vp.prune(scrambled(open_clip.CLIP(16, VISION, TEXT)), "madtp", **parts).train()
        if soft:
            soften(model, 0.5)
        alone = copy.deepcopy(model)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=soft)
        torch.manual_seed(1 + rank)
        for step in range(2):
            check_step(wrapped, alone, [batch(one_word=rank == step), batch(one_word=rank == step)])


def check_step(wrapped: DistributedDataParallel, alone: torch.nn.Module, batches: list) -> None:
    """Gradients accumulated over batches are the mean of what each process has alone, and zero where it has none."""
    for model in (wrapped, alone):
        model.zero_grad()
        for inputs in batches:
            waits = model is wrapped and inputs is not batches[-1]
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                image, text, scale = model(*inputs)
                (scale * image @ text.T).square().sum().backward()
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in alone.parameters()]
    of_all = torch.cat([grad.flatten() for grad in own])
    dist.all_reduce(of_all)
    wants = of_all.split([grad.numel() for grad in own])
    for (name, got), want in zip(wrapped.module.named_parameters(), wants, strict=True):
        assert got.grad is not None, name
        assert_close(got.grad.flatten(), want / 2, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def batch(one_word: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and texts of one word, of which nothing is merged, or of twelve."""
    ids = torch.randint(1, 38, (2, 12))
    ids[:, -1] = 39
    if one_word:
        ids = torch.zeros_like(ids)
        ids[:, 0] = 39
    return images(2), ids
