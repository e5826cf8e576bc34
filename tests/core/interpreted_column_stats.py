"""The Triton kernels of column statistics in Triton's interpreter, against the exact path; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from vltprune import Layout, PackedTokens, Stat, attend_with_stats
from vltprune.core.kernels import column_stats

BOTH = Stat.RECEIVED | Stat.COLUMN
SCALE = 0.2


def main() -> None:
    generator, cases = torch.Generator().manual_seed(0), 0
    layout = Layout((70, 1, 0, 33))  # longer than a tile, a single token, none, shorter than a tile
    kinds = ((torch.float32, 32), (torch.float32, 80), (torch.float16, 64), (torch.float16, 80))
    for (dtype, head_dim), causal in itertools.product(kinds, (False, True)):
        # as a host gives them: parts of one tensor, not contiguous
        q, k, v = torch.randn(layout.total, 3, 2, head_dim, generator=generator).to(dtype).unbind(1)
        protected, keep_prob = torch.rand(2, layout.total, generator=generator)
        tokens = PackedTokens(torch.zeros(layout.total, 1), layout, layout.slot, protected < 0.2)
        check(q, k, v, tokens if head_dim == 32 else replace(tokens, keep_prob=keep_prob), causal)
        cases += 1
    print(f"{cases} cases agree")


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: PackedTokens, causal: bool) -> None:
    """Compares both statistics, by the way that a model takes."""
    _, exact = attend_with_stats(q, k, v, tokens, SCALE, BOTH, causal=causal)
    used, column_stats.applies = column_stats.applies, lambda *_: True
    try:
        _, found = attend_with_stats(q, k, v, tokens, SCALE, BOTH, causal=causal)
    finally:
        column_stats.applies = used
    for stat in BOTH:
        assert found[stat].dtype is torch.float32
        torch.testing.assert_close(found[stat], exact[stat], rtol=5e-6, atol=1e-6)


if __name__ == "__main__":
    main()
