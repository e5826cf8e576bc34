"""ToMe against the published algorithm, written here for dense batches and run over all layers."""

from __future__ import annotations

import pytest
import torch
from small_models import scrambled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.testing import assert_close

import vltprune as vp

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {"patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
# a distillation token stands where one register does
PROTECTED = {"class token": 1, "distillation token": 2, "registers": 4, "no class token": 0}


def vit(kind: str, patches: int, depth: int = 6) -> VisionTransformer:
    """A random ViT on patches x patches patches, of which an odd number makes the counts of tokens odd or even."""
    sizes = {**SIZES, "img_size": 8 * patches, "depth": depth}
    torch.manual_seed(patches)
    if kind == "no class token":
        return scrambled(VisionTransformer(**sizes, class_token=False, global_pool="avg"))
    return scrambled(VisionTransformer(**sizes, reg_tokens=PROTECTED[kind] - 1))


def published(model: VisionTransformer, images: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """ToMe on a dense batch: the last block's tokens [batch, n, dim] in the published order, and their sizes [batch, n]."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    size = torch.ones(x.shape[:2])
    for block in model.blocks:
        attn = block.attn
        batch, n, dim = x.shape
        qkv = attn.qkv(block.norm1(x)).view(batch, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
        logits = q @ k.transpose(2, 3) * attn.scale + size.log()[:, None, None]
        x = x + attn.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, n, dim))
        removed = min(r, (n - protected) // 2)
        pairs = [merged(*one, removed, protected) for one in zip(x, size, k.mean(1), strict=True)]
        x, size = (torch.stack(column) for column in zip(*pairs, strict=True))
        x = x + block.mlp(block.norm2(x))
    return x, size


def merged(x: Tensor, size: Tensor, metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """One instance after bipartite soft matching: [protected, unmerged A, B], A and B the even and odd indices."""
    metric = metric / metric.norm(dim=1, keepdim=True)
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    a, b = ([i for i in half if i >= protected] for half in (a, b))
    edges = {i: max((float(metric[i] @ metric[j]), -j) for j in b) for i in a} if b else {}
    similar = sorted(edges, key=lambda i: -edges[i][0])
    groups = {j: [j] for j in b}
    for i in similar[:r]:
        groups[-edges[i][1]].append(i)
    unmerged = similar[r:] if b else a
    rest = sorted(unmerged) if protected else unmerged
    rows = [[i] for i in range(protected)] + [[i] for i in rest] + list(groups.values())
    content = [(x[row] * size[row, None]).sum(0) / size[row].sum() for row in rows]
    return torch.stack(content), torch.stack([size[row].sum() for row in rows])


@pytest.mark.parametrize("r", [1, 3, 8, 100])
@pytest.mark.parametrize("patches", [4, 5])
@pytest.mark.parametrize("kind", PROTECTED)
@torch.no_grad()
def test_tome_is_the_published_one(kind, patches, r):
    """Outputs, tokens and sizes of all layers, for r from one to more than half, in a batch and alone."""
    dense, protected = vit(kind, patches), PROTECTED[kind]
    images = torch.randn(8, 3, 8 * patches, 8 * patches)
    x, size = published(dense, images, r, protected)
    model = vp.prune(dense, "tome", keep=f"remove(r={r})")
    with vp.collect(tokens=True) as traces:
        out = model(images)
    tokens = traces[0].layers[-1].tokens
    assert tokens.layout.lengths == (x.shape[1],) * 8
    order = tokens.columns["bipartite_order"].masked_fill(tokens.protected, -1).view(8, -1).argsort(dim=1, stable=True)
    found = tokens.x.view(x.shape).gather(1, order[..., None].expand_as(x))
    assert_close(layer_norm(found, (32,)), layer_norm(x, (32,)), **CLOSE)
    assert torch.equal(tokens.size.view(8, -1).gather(1, order).float(), size)

    # the mean of tokens counts each original token alike
    mean = (x * size[..., None]).sum(1, keepdim=True) / size.sum(1)[:, None, None]
    pooled = dense.norm(x) if protected else mean
    assert_close(out, dense.forward_head(pooled), **CLOSE)
    assert_close(model(images[:1]), out[:1], **CLOSE)


def test_tome_calibrates_to_any_cost():
    model = vp.prune(vit("class token", 5), "tome")
    found = vp.calibrate(model, [torch.randn(2, 3, 40, 40)], 0.4, tolerance=0.03)
    assert found.knob == "r" and abs(found.reduction - 0.4) < 0.03
