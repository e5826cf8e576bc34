"""Auxiliary targets of the tiny NLVR model's training: what each patch shows, and what each phrase finds.

`train_nlvr_tiny.py` trains with all of them, `compress_nlvr_tiny.py --told` with the patch targets.

The answers alone move a small model from nothing very slowly: a sentence's one bit says little about which of its words,
patches or reasonings was wrong. The heads here read the same hidden states as the model and are dropped after training.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vltprune.data import SyntheticPair
from vltprune.data.drawing import COLORS, SHAPES, SIDE, SIZES, draw_scenes
from vltprune.data.word_tokenizer import WordTokenizer

ANY = (len(SHAPES), len(COLORS), len(SIZES))  # the index that stands for "whatever shape", "whatever color", ...
MOST = 4  # things counted apart; more count as this many


def patch_targets(pair: SyntheticPair, patch: int) -> np.ndarray:
    """uint8 [2, patches, 6]: shape, color and size of the thing that fills most of a patch (0: ground), whether the
    patch holds a thing's center, and where that thing's center is, x and y in pixels."""
    grid = SIDE // patch
    targets = np.zeros((2, grid, grid, 6), np.uint8)
    for side, scene in enumerate(pair.scenes):
        blocks = pair.object_map[side].reshape(grid, patch, grid, patch)
        filled = np.stack([(blocks == index + 1).sum((1, 3)) for index in range(len(scene))])
        rows = np.array([(t.shape + 1, t.color + 1, t.size + 1, 0, round(t.x), round(t.y)) for t in scene], np.uint8)
        shown = filled.max(0) >= patch * patch // 8
        targets[side][shown] = rows[filled.argmax(0)[shown]]
        for thing in scene:
            targets[side, int(thing.y) // patch, int(thing.x) // patch, 3] = 1
    return targets.reshape(2, grid * grid, 6)


class PatchHeads(nn.Module):
    """What each patch shows, read off its token of the image tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.splits = [len(SHAPES) + 1, len(COLORS) + 1, len(SIZES) + 1, 2, 2]
        self.linear = nn.Linear(width, sum(self.splits))

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and accuracy [4] (shape, color, size, center) on patches that show a thing.

        tokens [images, 1 + patches, width], targets [images, patches, 6].
        """
        *logits, place = self.linear(tokens[:, 1:]).flatten(0, 1).split(self.splits, -1)
        targets = targets.flatten(0, 1).long()
        shown = targets[:, 0] > 0
        weight = torch.where(shown, 1.0, 0.3)

        loss = (place[shown] - (targets[shown, 4:] / (SIDE / 2) - 1)).square().mean()
        for slot, each in enumerate(logits):
            loss = loss + (F.cross_entropy(each, targets[:, slot], reduction="none") * weight).mean()
        hits = [(each[shown].argmax(-1) == targets[shown, slot]).float().mean() for slot, each in enumerate(logits)]
        return loss, torch.stack(hits)


class Contents:
    """How many things of each kind each train pair holds, and where.

    `count` uint8 [pairs, 2, shapes + 1, colors + 1, sizes + 1], `center` float32 [..., 2] the sum of their centers
    between -1 and 1; the last index of an axis stands for any.
    """

    def __init__(self, size: int) -> None:
        self.count = np.zeros((size, 2, *(every + 1 for every in ANY)), np.uint8)
        self.center = np.zeros((*self.count.shape, 2), np.float32)
        for index in range(size):
            for side, scene in enumerate(draw_scenes(np.random.default_rng((0, 0, index, 0)))):
                for thing in scene:
                    kinds = np.ix_(*zip(thing[:3], ANY, strict=True))
                    self.count[index, side][kinds] += 1
                    self.center[index, side][kinds] += (thing.x / (SIDE / 2) - 1, thing.y / (SIDE / 2) - 1)


class Phrases:
    """Which kind of thing each word of a sentence has named once it is read."""

    def __init__(self) -> None:
        words = WordTokenizer().words
        self.kind = np.tile(np.array(ANY), (len(words), 1))
        singular = [
            word.removesuffix("es" if word == "crosses" else "s") if word != "cross" else word for word in words
        ]
        for slot, names in enumerate((SHAPES, COLORS, SIZES)):
            for index, word in enumerate(singular):
                if word in names:
                    self.kind[index, slot] = names.index(word)
        self.noun = np.array([word in SHAPES or word == "object" for word in singular])
        self.within, self.right = words.index("in"), words.index("right")
        self.adjective = np.array([word in COLORS or word in SIZES for word in singular])

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Kinds [sentences, length, 3] and which words name one, bool [sentences, length]; ids [sentences, length]."""
        kinds, names = self.kind[ids], (self.noun | self.adjective)[ids]
        # "any" is the largest index, so the smaller of two kinds asks for what either asks for.
        both = np.minimum(kinds[:, 1:], kinds[:, :-1])
        kinds[:, 1:] = np.where((self.noun[ids][:, 1:] & self.adjective[ids][:, :-1])[..., None], both, kinds[:, 1:])

        # "the circle in the left image is red": its last word asks for red circles. Only such claims begin with a name.
        claims = np.flatnonzero(names[:, 2])
        last = (ids[claims] > 0).sum(1) - 2
        kinds[claims, last] = np.minimum(kinds[claims, last], self.kind[ids[claims, 2]])
        return kinds, names


class PhraseHeads(nn.Module):
    """How many things of a kind each image holds, and where the thing is if it is the only one.

    Asked of each word that names a kind, and of the summary token for the first and the last kind its sentence names.
    Where the sentence relates two things, the summary token is also asked how far apart they lie.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word, self.first, self.last = (nn.Linear(width, 2 * (MOST + 1) + 4) for _ in range(3))
        self.gap = nn.Linear(width, 2)
        self.phrases = Phrases()

    def loss(
        self, words: Tensor, summary: Tensor, ids: np.ndarray, pairs: np.ndarray, contents: Contents
    ) -> tuple[Tensor, Tensor]:
        """Loss, and accuracy [3] (word, first, last) of the counts that are not 0.

        words [sentences, length, width], summary [sentences, width]; ids [sentences, length]; pairs [sentences]: which
        pair a sentence is about.
        """
        kinds, names = self.phrases(ids)
        sentence, word = np.nonzero(names)
        every = np.arange(len(ids))
        first = kinds[every, self.phrases.noun[ids].argmax(1)]
        last = kinds[every, ids.shape[1] - 1 - names[:, ::-1].argmax(1)]

        said = self.word(words[torch.from_numpy(sentence), torch.from_numpy(word)])
        parts = [
            _held(said, kinds[sentence, word], pairs[sentence], contents),
            _held(self.first(summary), first, pairs, contents),
            _held(self.last(summary), last, pairs, contents),
        ]
        losses, found = zip(*parts, strict=True)
        return sum(losses) + 2 * self._apart(summary, ids, (first, last), pairs, contents), torch.stack(found)

    def _apart(
        self, summary: Tensor, ids: np.ndarray, kinds: tuple[np.ndarray, ...], pairs: np.ndarray, contents: Contents
    ) -> Tensor:
        """Squared error of the way from the last thing to the first, in relations between two lone things."""
        side = (ids[:, 3] == self.phrases.right).astype(int)  # "in the right image ..."
        ends = [(pairs, side, *kind.T) for kind in kinds]
        related = (ids[:, 1] == self.phrases.within) & np.all([contents.count[end] == 1 for end in ends], axis=0)
        way = torch.from_numpy(contents.center[ends[0]] - contents.center[ends[1]])[related]
        return (self.gap(summary[related]) - way).square().sum() / max(related.sum(), 1)


def _held(said: Tensor, kinds: np.ndarray, pairs: np.ndarray, contents: Contents) -> tuple[Tensor, Tensor]:
    """Loss of what is said [n, 2 (MOST + 1) + 4] of how many things of a kind [n, 3] a pair [n] holds and where."""
    at = (pairs, slice(None), *kinds.T)
    count, center = (torch.from_numpy(table[at]).flatten(0, 1) for table in (contents.count, contents.center))
    logits, place = said.split((2 * (MOST + 1), 4), -1)
    logits, wanted = logits.reshape(-1, MOST + 1), count.long().clamp(max=MOST)
    off = (place.reshape(-1, 2) - center)[count == 1]
    found = (logits.argmax(-1) == wanted)[wanted > 0].float().mean()
    return F.cross_entropy(logits, wanted) + off.square().mean(), found
