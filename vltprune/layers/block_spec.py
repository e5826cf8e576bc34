"""BlockSpec: the block that a part is built for, as far as it is known before any token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSpec:
    """One depth of one tower.

    tower: its name ("image", "text"); depth of depths; dim: token width; heads; has_summary: whether one protected token
    (CLS, EOT) speaks for its instance; causal: whether a token sees only what stands before it; before: how many of the tower's
    blocks that prune lie before this depth.
    """

    tower: str
    depth: int
    depths: int
    dim: int
    heads: int
    has_summary: bool
    causal: bool = False
    before: int = 0
