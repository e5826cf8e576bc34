"""BLIP's tokenizer: BERT's lower-case WordPiece with two tokens more.

The `tokenizers` package is imported when a tokenizer is made. CLIP's tokenizers are open_clip's:
`open_clip.get_tokenizer(architecture)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLS, DEC, ENC = "[CLS]", "[DEC]", "[ENC]"
BERT = "google-bert/bert-base-uncased"  # on the hub
_FILES = ("vocab.txt", "tokenizer.json")


def well_formed(text: str) -> str:
    """Replace each lone surrogate (half a character) by U+FFFD: UTF-8 cannot encode one, and tokenizers refuse it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class BlipTokenizer:
    """Lower-case WordPiece over BERT's vocabulary, with `[DEC]` and `[ENC]` behind it (30522 and 30523).

    A sentence's first token tells BLIP's text tower its task: `[CLS]` encodes the sentence alone, `[ENC]` with its image, and
    `[DEC]` begins one to generate.

    Args:
        vocabulary: Token to id, with `[PAD]` 0.
        max_positions: Longest sentence that the model takes, in tokens, special ones included.

    Raises:
        ImportError: Without the `tokenizers` package.
        ValueError: For a vocabulary that is not BERT's.
    """

    def __init__(self, vocabulary: Mapping[str, int], max_positions: int = 512) -> None:
        missing = [token for token in ("[PAD]", "[UNK]", CLS, "[SEP]") if token not in vocabulary]
        if missing or vocabulary["[PAD]"] != 0:
            raise ValueError(
                f"this is no vocabulary of BERT's: {', '.join(missing) or '[PAD]'} "
                f"{'is missing' if missing else 'is not id 0'}; give bert-base-uncased's vocab.txt or tokenizer.json"
            )
        self.max_positions = max_positions
        self._tokenizer = _build_pipeline(vocabulary)
        self._tokenizer.add_special_tokens([DEC, ENC])
        ids = self._tokenizer.get_vocab()
        self._ids = {token: ids[token] for token in (CLS, "[SEP]", DEC, ENC)}

    @classmethod
    def load(
        cls, source: str | Path = BERT, *, max_positions: int = 512, cache_dir: str | None = None
    ) -> BlipTokenizer:
        """Load a vocabulary.

        Args:
            source: A vocab.txt, a tokenizer.json, a folder with either, or a name on the hub ("org/name").
            max_positions: Longest sentence that the model takes, in tokens.
            cache_dir: The hub's cache; None for its default.

        Returns:
            The tokenizer.

        Raises:
            OSError: For a source that is none of these, or that the hub does not give.
            ValueError: For a file without a vocabulary of BERT's.
            ImportError: Without the `tokenizers` package.
        """
        return cls(_load_vocabulary(_locate(source, cache_dir)), max_positions)

    def __len__(self) -> int:
        """The number of token ids: the text tower's `vocab_size`."""
        return self._tokenizer.get_vocab_size()

    def id(self, token: str) -> int:
        """The id of `[CLS]`, `[SEP]`, `[DEC]` or `[ENC]`."""
        return self._ids[token]

    def encode(
        self, sentences: str | Iterable[str], *, first: str = CLS, max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode sentences, padded to the longest.

        Args:
            sentences: One sentence or several.
            first: The first token of each, which tells the text tower its task: `[CLS]`, `[ENC]` or `[DEC]`.
            max_length: Cut sentences to so many tokens, special ones included; None to cut none.

        Returns:
            `input_ids` and `attention_mask`, both int64 [sentences, length].

        Raises:
            ValueError: For no sentences, for a `max_length` out of range, and without one for a sentence that is longer than
                `max_positions`.
        """
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        if not texts:
            raise ValueError("BlipTokenizer.encode needs at least one sentence, got none")
        if max_length is not None and not 2 <= max_length <= self.max_positions:
            raise ValueError(f"max_length={max_length}: write a number from 2 to max_positions={self.max_positions}")
        rows = [self._row(text, first, max_length) for text in texts]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return input_ids, (torch.arange(longest) < lengths[:, None]).long()

    def prompt(self, text: str, batch: int = 1) -> Tensor:
        """Encode a text to be continued, the same for a whole batch.

        Args:
            text: The text; empty for `[DEC]` alone.
            batch: Number of rows.

        Returns:
            Token ids [batch, length]: `[DEC]` in front and no `[SEP]` behind.

        Raises:
            ValueError: For a text longer than `max_positions`.
        """
        return self.encode(text, first=DEC)[0][:, :-1].repeat(batch, 1)

    def decode(self, input_ids: Tensor) -> list[str]:
        """The sentences of input_ids [sentences, length], each up to its first `[SEP]`, without special tokens."""
        return [self._tokenizer.decode(self._until_end(row)) for row in input_ids.tolist()]

    def _row(self, text: str, first: str, max_length: int | None) -> list[int]:
        ids = self._tokenizer.encode(well_formed(text), add_special_tokens=False).ids
        if max_length is not None:
            ids = ids[: max_length - 2]
        elif len(ids) + 2 > self.max_positions:
            raise ValueError(
                f"{text[:60]!r} ... takes {len(ids) + 2} positions, special tokens included, and the model has "
                f"max_positions={self.max_positions}: shorten it, or let max_length=... cut it"
            )
        return [self._ids[first], *ids, self._ids["[SEP]"]]

    def _until_end(self, row: list[int]) -> list[int]:
        end = self._ids["[SEP]"]
        return row[: row.index(end)] if end in row else row


def clean_caption(text: str, max_words: int = 30) -> str:
    """Clean a caption as BLIP does: lower case, most punctuation replaced by spaces, cut to `max_words`.

    Args:
        text: The caption.
        max_words: Most words to keep; BLIP keeps 30 of captions, and 40 of the sentences of NLVR2.

    Returns:
        The words, joined by single spaces.
    """
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split()[:max_words])


def clean_question(text: str, max_words: int = 30) -> str:
    """Clean a question as BLIP does: as `clean_caption`, but punctuation is removed without a space.

    Args:
        text: The question.
        max_words: Most words to keep.

    Returns:
        The words, joined by single spaces.
    """
    return " ".join(re.sub(r"[.!\"()*#:;~]", "", text.lower()).split()[:max_words])


def _build_pipeline(vocabulary: Mapping[str, int]) -> Tokenizer:
    """The tokenizer of bert-base-uncased."""
    try:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    except ImportError as error:
        raise ImportError("BLIP's text needs the package tokenizers: pip install tokenizers") from error
    tokenizer = Tokenizer(models.WordPiece(dict(vocabulary), unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # they are in the vocabulary already; this keeps them from being split, and out of decoded text
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", CLS, "[SEP]"])
    return tokenizer


def _locate(source: str | Path, cache_dir: str | None) -> Path:
    """The file of a vocabulary."""
    path = Path(source)
    if path.is_dir():
        there = [path / name for name in _FILES if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(_FILES)}: give a tokenizer's file or folder")
        return there[0]
    if path.is_file():
        return path
    if path.suffix in (".txt", ".json") or str(source).count("/") > 1:
        raise FileNotFoundError(f"there is no file or folder {path}: give a tokenizer's, or a name on the hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), _FILES[0], cache_dir=cache_dir, library_name="vltprune"))
    # whatever a network does
    except Exception as error:
        raise OSError(
            f"cannot get {_FILES[0]} of {str(source)!r} from the hub: {error}. Offline, give the path of a copy of "
            "bert-base-uncased's vocab.txt or tokenizer.json"
        ) from error


def _load_vocabulary(file: Path) -> dict[str, int]:
    """Token to id, from one token a line or from the JSON of a tokenizer."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix != ".json":
        return {token: index for index, token in enumerate(text.removesuffix("\n").split("\n"))}
    try:
        model = json.loads(text)["model"]
        return {str(token): int(index) for token, index in model["vocab"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no tokenizer.json with a vocabulary of word pieces") from error
