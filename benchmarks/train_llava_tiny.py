"""Trains the weights of `llava_tiny` that the package ships: a LLaVA of transformers, on synthetic pairs, on one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/train_llava_tiny.py --work WORK [--fast]

Three stages, each going on from its last checkpoint (delete WORK to begin again); --fast computes in bf16 with compiled layers,
which needs a C++ compiler, and pays on CPUs with AMX:
  draw   16,000 train pairs with 24 sentences each, and their targets, to memory maps                      3 min
  look   the image tower begins with that of `blip_nlvr_tiny`, its patches resized from 8 to 12 px, and learns again what each
         patch shows, and from its class token how many things an image holds
  read   projector and language model learn to answer from the frozen image tower's tokens, the words told meanwhile what they
         find; relations begin with "above" and "left of" (see `Turns`). A pair's images are read once for all its sentences
No run takes more than five hours of the processor: the time spent is in the checkpoints.

How the shipped weights differ: `look` followed the schedule of 1,800 steps until 250, of 900 until 750, of 2,000 until 1,000,
and of 1,500 to the end; `read` that of 5,000 steps until 1,500, of 3,200 until 3,200, of 3,900 until 3,900, of 8,000 until
4,250, of 6,500 until 4,750, and of 5,600 to the end, all with --fast. Measured: 86.6 % of 7,200 test sentences in fp32 and in
fp16, after 42 minutes of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from auxiliary_targets import ANY, MOST, PatchHeads, PhraseHeads
from synthetic_training import LENGTH, Drawn, Loss, Stage, Training, accuracies, by_family
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vltprune as vp
from vltprune.data.drawing import COLORS, SHAPES, SIDE, SIZES
from vltprune.data.llava import END, FALSE, TRUE, VOCABULARY

NAME = "llava_tiny"
PATCH = 12
CELLS = (SIDE // PATCH) ** 2
WIDTH = 128
PREFIX = 2 * (1 + CELLS)  # left <image> right <image>
FOUND, RELATED = 3, 4  # hidden states in which a word should have found its things, and the last token both kinds
STAGES = {"look": Stage(8, 0, 1500, 1e-3), "read": Stage(8, 16, 5000, 1.5e-3)}


def build_model() -> Any:
    """The tiny model, its image tower that of `blip_nlvr_tiny`, its language model drawn for its width and depth."""
    torch.manual_seed(0)
    model: Any = vp.create_model(NAME, pretrained=False).train()
    language = model.model.language_model
    for module in (*language.modules(), *model.model.multi_modal_projector.modules(), model.lm_head):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=WIDTH**-0.5)
    for layer in language.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(last.weight, std=(2 * len(language.layers) * last.in_features) ** -0.5)
    begin_tower(model.model.vision_tower)
    return model


@torch.no_grad()
def begin_tower(tower: Any) -> None:
    """Copy the image tower of `blip_nlvr_tiny` to one of CLIP, whose patches are larger and whose input has a norm."""
    source: Any = vp.create_model("blip_nlvr_tiny", pretrained=True)
    source, ends = source.visual, tower.embeddings
    conv, positions = source.patch_embed.proj, source.pos_embed[0]
    shrunk = F.interpolate(conv.weight, (PATCH, PATCH), mode="bilinear") * (conv.kernel_size[0] / PATCH) ** 2
    ends.patch_embedding.weight.copy_(shrunk)
    ends.class_embedding.copy_(source.cls_token[0, 0])
    grid = positions[1:].T.unflatten(1, (SIDE // conv.kernel_size[0], -1))
    grid = F.interpolate(grid[None], (SIDE // PATCH, SIDE // PATCH), mode="bilinear")[0].flatten(1).T
    ends.position_embedding.weight.copy_(torch.cat([positions[:1], grid + conv.bias]))
    # the norm shall leave the size of what the blocks are used to
    tower.pre_layrnorm.weight.fill_(float(ends(0.3 * torch.randn(64, 3, SIDE, SIDE)).std(-1).mean()))
    for layer, block in zip(tower.encoder.layers, source.blocks, strict=True):
        attention = layer.self_attn
        for target, *parts in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj),
            block.attn.qkv.weight.chunk(3),
            block.attn.qkv.bias.chunk(3),
            strict=True,
        ):
            target.load_state_dict(dict(zip(("weight", "bias"), parts, strict=True)))
        attention.out_proj.load_state_dict(block.attn.proj.state_dict())
        layer.layer_norm1.load_state_dict(block.norm1.state_dict())
        layer.layer_norm2.load_state_dict(block.norm2.state_dict())
        layer.mlp.load_state_dict(block.mlp.state_dict())


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, length: int, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention of a prefix and of many sentences of `length` tokens behind it, which do not see each other."""
    later = torch.ones(PREFIX, PREFIX, dtype=torch.bool).triu(1)
    query = query * scaling
    first = query[:, :, :PREFIX] @ key[:, :, :PREFIX].mT
    first = first.masked_fill(later, -1e4).softmax(-1) @ value[:, :, :PREFIX]

    each = (key.shape[2] - PREFIX) // length
    q, k, v = (part[:, :, PREFIX:].unflatten(2, (each, length)) for part in (query, key, value))
    early = (query[:, :, PREFIX:] @ key[:, :, :PREFIX].mT).unflatten(2, (each, length))
    own = (q @ k.mT).masked_fill(later[:length, :length], -1e4)
    early, own = torch.cat([early, own], -1).softmax(-1).split((PREFIX, length), -1)
    rest = early.flatten(2, 3) @ value[:, :, :PREFIX] + (own @ v).flatten(2, 3)
    return torch.cat([first, rest], 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


class GistHead(nn.Module):
    """How many things of each shape, color and size an image holds, read off the image tower's class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, (MOST + 1) * (len(SHAPES) + len(COLORS) + len(SIZES)))

    def loss(self, gist: Tensor, count: np.ndarray) -> tuple[Tensor, Tensor]:
        """Loss, and accuracy of the counts that are not 0; gist [images, width], count of `Contents` [images, ...]."""
        shape, color, size = ANY
        kinds = (count[:, :shape, color, size], count[:, shape, :color, size], count[:, shape, color, :size])
        wanted = torch.from_numpy(np.concatenate(kinds, 1)).long().clamp(max=MOST)
        logits = self.linear(gist).unflatten(-1, (-1, MOST + 1))
        found = (logits.argmax(-1) == wanted)[wanted > 0].float().mean()
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), found


class LlavaTraining(Training):
    """One run of `llava_tiny`. fast: whether it computes in bf16 with compiled layers."""

    log_every, keep_every = 50, 250

    def __init__(self, folder: Path, size: int, fast: bool) -> None:
        self.fast, self.model = fast, build_model()
        self.patches, self.gist, self.phrases = PatchHeads(WIDTH), GistHead(WIDTH), PhraseHeads(WIDTH)
        heads = {"patches": self.patches, "gist": self.gist, "phrases": self.phrases}
        super().__init__(folder, size, PATCH, self.model, heads)

    def begin(self, name: str) -> Loss:
        if name == "look":
            return self._look
        layers = [*self.model.model.language_model.layers]
        tokens = image_tokens(self.model, self.train, self.folder)
        self.log("image tokens computed")
        if self.fast:
            layers = [torch.compile(layer, dynamic=False) for layer in layers]

        def loss(rows: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.fast):
                return self._read(torch.from_numpy(tokens[rows]).float(), rows, chosen, layers)

        return loss

    def tuned(self, name: str) -> list[nn.Module]:
        inner = self.model.model
        eyes = [inner.vision_tower, self.patches, self.gist]
        reader = [inner.multi_modal_projector, inner.language_model, self.model.lm_head, self.phrases]
        return eyes if name == "look" else reader

    def _look(self, rows: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Loss of the image tower, and accuracies: shape, color, size and center of patches, counts of the class token."""
        tokens, gist = look(self.model, self.train.images(rows))
        loss, hits = self.patches.loss(tokens, self.train.targets(rows))
        more, found = self.gist.loss(gist, self.contents.count[rows].reshape(-1, *self.contents.count.shape[2:]))
        return loss + more, torch.cat([hits, found[None]])

    def _read(
        self, tokens: Tensor, rows: np.ndarray, chosen: np.ndarray, layers: list[nn.Module]
    ) -> tuple[Tensor, Tensor]:
        """Loss of the answers and of what words find, and figures: the former, accuracies of counts, of each family."""
        ids, mask, labels, families = self.train.said(rows, chosen)
        every, length = torch.arange(len(ids)), mask.sum(1)
        wanted = torch.where(labels == 1, TRUE, FALSE)
        answered = F.pad(ids, (0, LENGTH + 1 - ids.shape[1]))
        answered[every, length] = wanted

        hidden = hidden_states(self.model, tokens, answered, layers)
        spoken = self.model.model.language_model.norm(hidden[-1])
        logits, after = (self.model.lm_head(spoken[every, at]).float() for at in (length - 1, length))
        answer = F.cross_entropy(logits, wanted)
        ended = F.cross_entropy(after, torch.full_like(wanted, END))
        words, summary = hidden[FOUND][:, : ids.shape[1]].float(), hidden[RELATED][every, length - 1].float()
        pairs = np.repeat(rows, chosen.shape[1])
        grounding, found = self.phrases.loss(words, summary, ids.numpy(), pairs, self.contents)

        hits = (logits[:, TRUE] > logits[:, FALSE]) == (labels == 1)
        return answer + ended + grounding, torch.cat([answer.detach()[None], found, by_family(hits, families)])

    @torch.no_grad()
    def score(self, pairs: Drawn) -> dict[str, float]:
        tokens, hits, said = image_tokens(self.model, pairs), [], []
        for rows in np.array_split(np.arange(pairs.size), max(pairs.size // 10, 1)):
            ids, mask, labels, families = pairs.said(rows, np.tile(np.arange(pairs.sentences), (len(rows), 1)))
            hidden = hidden_states(self.model, torch.from_numpy(tokens[rows]).float(), ids)[-1]
            spoken = self.model.model.language_model.norm(hidden[torch.arange(len(ids)), mask.sum(1) - 1])
            logits = self.model.lm_head(spoken)
            hits.append((logits[:, TRUE] > logits[:, FALSE]) == (labels == 1))
            said.append(families)
        return accuracies(hits, said)


def look(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The image tower's tokens that LLaVA takes, [images, 1 + CELLS, WIDTH], and its pooled class token."""
    seen = model.model.vision_tower(images, output_hidden_states=True)
    return seen.hidden_states[model.config.vision_feature_layer], seen.pooler_output


@torch.no_grad()
def image_tokens(model: Any, pairs: Drawn, folder: Path | None = None) -> np.ndarray:
    """A frozen image tower's tokens of every drawn pair, fp16 [pairs, 2, CELLS, WIDTH], kept in a file under a folder."""
    file = None if folder is None else folder / "image_tokens.npy"
    if file is not None and file.exists():
        return np.load(file, mmap_mode="r")
    tokens = np.empty((pairs.size, 2, CELLS, WIDTH), np.float16)
    for rows in np.array_split(np.arange(pairs.size), max(pairs.size // 32, 1)):
        tokens[rows] = look(model, pairs.images(rows))[0][:, 1:].unflatten(0, (-1, 2)).numpy()
    if file is not None:
        np.save(file, tokens)
    return tokens


def hidden_states(model: Any, tokens: Tensor, ids: Tensor, layers: Sequence[nn.Module] | None = None) -> list[Tensor]:
    """Hidden states [sentences, length, width] before the first layer and behind each.

    tokens [pairs, 2, CELLS, WIDTH]; ids [sentences, length], as many sentences of each pair, a pair's one after another;
    layers: those of the model, compiled.
    """
    language, (count, length) = model.model.language_model, (len(tokens), ids.shape[1])
    sides = torch.tensor([[VOCABULARY.index("left")], [VOCABULARY.index("right")]])
    sides = language.embed_tokens(sides).expand(count, 2, 1, -1)
    prefix = torch.cat([sides, model.model.multi_modal_projector(tokens)], 2).flatten(1, 2)
    said = language.embed_tokens(ids).unflatten(0, (count, -1))
    positions = [torch.arange(PREFIX), *[PREFIX + torch.arange(length)] * said.shape[1]]
    states = [torch.cat([prefix, said.flatten(1, 2)], 1)]
    angles = language.rotary_emb(states[0], torch.cat(positions)[None])

    stock, language.config._attn_implementation = language.config._attn_implementation, "packed"
    for layer in language.layers if layers is None else layers:
        states.append(layer(states[-1], position_embeddings=angles, attention_mask=None, length=length))
    language.config._attn_implementation = stock
    return [state[:, PREFIX:].unflatten(1, (-1, length)).flatten(0, 1) for state in states]


def main() -> None:
    """Every stage, then the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pairs, checkpoints, log and result")
    parser.add_argument("--pairs", type=int, default=16000, help="train pairs (%(default)s)")
    parser.add_argument("--steps", type=int, default=STAGES["read"].steps, help="of the stage read (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="train in bf16, layers compiled")
    args = parser.parse_args()
    torch.set_num_threads(1)

    training = LlavaTraining(args.work, args.pairs, args.fast)
    training.run("look", STAGES["look"])
    training.run("read", replace(STAGES["read"], steps=args.steps))
    training.publish(NAME)


if __name__ == "__main__":
    main()
