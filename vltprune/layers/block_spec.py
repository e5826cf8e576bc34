"""BlockSpec: the block that a part is built for: its tower, depth and sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSpec:
    """Description of the block that a part is built for.

    Attributes:
        tower: the tower's name, such as "image", "text" or "fusion".
        depth: the index of the block.
        depths: the number of blocks of the tower.
        dim: the width of a token.
        heads: the number of attention heads.
        has_summary: whether a protected token (CLS, EOT) represents its instance.
        causal: whether a token attends to itself and earlier tokens only.
        before: how many earlier blocks of the tower are pruned.
        modalities: the modalities whose tokens are in one sequence, ("text", "image") in a single-stream transformer such as
            ViLT. Empty for a tower of one modality.
        has_query: whether a text query attends to the tokens (guide="text_query").
        embed_dim: the width of the embeddings that the model's towers share. None where the host knows of none.
    """

    tower: str
    depth: int
    depths: int
    dim: int
    heads: int
    has_summary: bool
    causal: bool = False
    before: int = 0
    modalities: tuple[str, ...] = ()
    has_query: bool = False
    embed_dim: int | None = None
