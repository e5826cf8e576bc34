"""Published methods on one image at a time, in plain loops: what a preset's own computation is compared to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from small_models import scrambled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.testing import assert_close

import vltprune as vp

# a result row: the index that it stands at, and the indices and weights that it sums
Group = tuple[int, list[int], list[float]]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = {"class token": 1, "registers": 3, "no class token": 0}


@dataclass
class Block:
    """One block of one image: x [n, dim] behind attention (or behind the block), maps [heads, n, n], q, k, v [n, heads, dim].

    `place` is each token's position at the input, `free` the indices of unprotected tokens, `memory` what earlier blocks left.
    `text` [segments, dim] is the text of the image, where there is one.
    """

    depth: int
    x: Tensor
    maps: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    place: list[int]
    protected: int
    memory: dict[str, dict[int, float]] = field(default_factory=dict)
    text: Tensor | None = None

    @property
    def free(self) -> list[int]:
        return [i for i, place in enumerate(self.place) if place >= self.protected]

    def kept(self, indices: Sequence[int]) -> list[Group]:
        """The groups of dropping all unprotected tokens but these."""
        stay = [i for i, place in enumerate(self.place) if place < self.protected] + list(indices)
        return [(i, [i], [1.0]) for i in sorted(stay)]


Decide = Callable[[Block], "list[Group] | None"]


def vit(kind: str, patches: int, depth: int = 4) -> VisionTransformer:
    """A random ViT on patches x patches patches; an odd number makes the counts of tokens odd or even."""
    sizes = {
        "img_size": 8 * patches,
        "patch_size": 8,
        "embed_dim": 32,
        "num_heads": 2,
        "num_classes": 5,
        "depth": depth,
    }
    torch.manual_seed(patches)
    if kind == "no class token":
        return scrambled(VisionTransformer(**sizes, class_token=False, global_pool="avg"))
    return scrambled(VisionTransformer(**sizes, reg_tokens=KINDS[kind] - 1))


def images(patches: int, batch: int = 3) -> Tensor:
    """Patches of very different contrast, so that images keep different counts where a method counts for itself."""
    contrast = torch.rand(batch, 1, patches, patches).repeat_interleave(8, -1).repeat_interleave(8, -2) ** 3
    return 3 * torch.randn(batch, 3, 8 * patches, 8 * patches) * contrast


def published(
    model: VisionTransformer, image: Tensor, decide: Decide, place: str = "attention", text: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """The tokens [n, dim] behind the last block and their places, with decisions at `place` of every block."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    places, memory = list(range(len(x))), {}
    for depth, block in enumerate(model.blocks):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, -1).unbind(1)
        maps = torch.stack([(q[:, h] @ k[:, h].T * attn.scale).softmax(-1) for h in range(attn.num_heads)])
        context = torch.stack([maps[h] @ v[:, h] for h in range(attn.num_heads)], 1)
        x = x + attn.proj(context.flatten(1))
        if place != "attention":
            x = x + block.mlp(block.norm2(x))
        state = Block(depth, x, maps, q, k, v, places, model.num_prefix_tokens, memory, text)
        groups = decide(state)
        if groups is not None:
            x = torch.stack([sum(w * x[i] for i, w in zip(rows, weights, strict=True)) for _, rows, weights in groups])
            places = [places[i] for i, _, _ in groups]
        if place == "attention":
            x = x + block.mlp(block.norm2(x))
    return x, places


@torch.no_grad()
def check(
    preset: str,
    decide: Decide,
    kind: str,
    patches: int,
    behind: str = "attention",
    /,
    text: Tensor | None = None,
    prepare: Callable[[Any], None] = lambda model: None,
    **parts: Any,
) -> list[int]:
    """A pruned tower against the published method, for a batch, and for each image alone; how many tokens each keeps.

    `text` [batch, segments, dim] is what `vp.query` gives, and `prepare` is called with the pruned model.
    """
    dense, batch = vit(kind, patches), images(patches)
    model = vp.prune(dense, preset, **parts)
    prepare(model)

    def run(rows: slice) -> Tensor:
        with contextlib.nullcontext() if text is None else vp.query(text[rows]):
            return model(batch[rows])

    with vp.collect() as traces:
        out = run(slice(None))
        alone = torch.cat([run(slice(i, i + 1)) for i in range(len(batch))])
    assert_close(alone, out, rtol=1e-5, atol=1e-5)
    tokens, kept = traces[0].output_tokens, []
    pieces = zip(tokens.x.split(tokens.layout.lengths), tokens.position.split(tokens.layout.lengths), strict=True)
    for i, (x, position) in enumerate(pieces):
        expected, places = published(dense, batch[i], decide, behind, None if text is None else text[i])
        assert position.tolist() == sorted(places)
        assert_close(x, expected[torch.tensor(places).argsort()], **CLOSE)
        kept.append(len(places))
    return kept
