"""Tokenizer of synthetic NLVR: one token id a word, for a closed vocabulary."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, CLS, SEP, UNK = range(4)
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
# Ids are positions in this line, and weights are trained on them: append, never sort or insert.
NLVR_WORDS = tuple(
    (  # noqa: SIM905 - a line of words is easier to read and to append to than a list of them
        "a above are at below blue both circle circles contain contains cross crosses does every exactly "
        "fewer green image images in is large least left more neither no not number object objects of one only "
        "purple red right same small square squares star stars than the there three triangle triangles two white yellow"
    ).split()
)


class WordTokenizer:
    """Tokenizer with one id a word of a closed vocabulary.

    Ids 0 to 3 are `[PAD]`, `[CLS]`, `[SEP]` and `[UNK]`; the words follow in order.

    Args:
        words: The words, without special tokens, in the order of their ids.
        max_positions: The longest sentence in tokens, `[CLS]` and `[SEP]` included.

    Attributes:
        words: The special tokens and the words, by their ids.
        max_positions: As given.

    Raises:
        ValueError: If a word repeats another, or a special token.
    """

    def __init__(self, words: Sequence[str] = NLVR_WORDS, max_positions: int = 32) -> None:
        self.words = (*SPECIAL, *words)
        self.max_positions = max_positions
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError("a vocabulary names each word once; this one repeats some")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentences: str | Iterable[str]) -> tuple[Tensor, Tensor]:
        """Encode sentences. Case and a full stop at the end are ignored.

        Returns:
            `input_ids` and `attention_mask`, both int64 [sentences, length], padded to the longest sentence.

        Raises:
            ValueError: If there are no sentences, if one is empty or longer than `max_positions`, or for words outside
                the vocabulary. The message gives the nearest words.
        """
        rows = [self._row(text) for text in ([sentences] if isinstance(sentences, str) else sentences)]
        if not rows:
            raise ValueError("WordTokenizer.encode needs at least one sentence, got none")
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        return input_ids, (input_ids != PAD).long()

    def decode(self, input_ids: Tensor) -> list[str]:
        """Decode input_ids [sentences, length] to sentences, without special tokens and a decoder's further ones."""
        words = range(len(SPECIAL), len(self))
        return [" ".join(self.words[index] for index in row if index in words) for row in input_ids.tolist()]

    def _row(self, sentence: str) -> list[int]:
        words = sentence.lower().strip().removesuffix(".").split()
        if not words:
            raise ValueError(f"WordTokenizer.encode was given an empty sentence: {sentence!r}")
        if len(words) + 2 > self.max_positions:
            raise ValueError(
                f"{sentence[:60]!r} ... takes {len(words) + 2} positions, [CLS] and [SEP] included, and the model has "
                f"max_positions={self.max_positions}: shorten the sentence"
            )

        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ValueError(f"unknown words in {sentence[:200]!r}: " + "; ".join(map(self._nearest, unknown)))
        return [CLS, *(self._ids[word] for word in words), SEP]

    def _nearest(self, word: str) -> str:
        nearest = difflib.get_close_matches(word, self.words[len(SPECIAL) :], n=3, cutoff=0.5)
        return f"{word!r} (nearest: {', '.join(nearest)})" if nearest else f"{word!r} (nothing near it)"
