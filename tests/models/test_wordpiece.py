"""BLIP's text: does it read as BERT's tokenizer of another package does, and are the prefixes BLIP's?"""

from __future__ import annotations

import json
import sys

import huggingface_hub
import pytest
import torch

from vltprune.models.wordpiece import ENC, BlipTokenizer, clean_caption, clean_question

WORDS = (  # noqa: SIM905 - easier to read so
    "[PAD] [UNK] [CLS] [SEP] [MASK] two dog ##s ##ged run on the snow , . ' s a picture of cafe 中 ! ( ) - 3"
).split()
TEXTS = [
    "Two dogs run!",
    "a picture of the snow-dog's café, (3)",
    "dogged 中 zebra",
    "  the\tsnow.  ",
    "",
    "[SEP] [ENC]",
]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer's folder, as the hub has it."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def blip(folder):
    return BlipTokenizer.load(folder)


def test_it_reads_as_bert(folder, blip):
    from tokenizers import BertWordPieceTokenizer

    bert = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    for text in TEXTS[:-1]:
        assert blip.encode(text)[0][0].tolist() == bert.encode(text).ids


def test_round_trip_and_padding(blip):
    sentences = ["two dogs run", "the snow"]
    input_ids, mask = blip.encode(sentences)
    assert input_ids.shape == mask.shape == (2, 6) and input_ids.dtype == mask.dtype == torch.int64
    assert mask.sum(1).tolist() == [6, 4]
    assert input_ids[1].tolist() == [2, 11, 12, 3, 0, 0]
    assert blip.decode(input_ids) == sentences
    assert blip.encode(["", "the"])[1].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_added_tokens_and_prefixes(blip):
    words = len(WORDS)
    assert (blip.id("[DEC]"), blip.id("[ENC]"), len(blip)) == (words, words + 1, words + 2)
    assert blip.encode("the snow", first=ENC)[0].tolist() == [[words + 1, 11, 12, 3]]
    assert blip.prompt("a picture of ", batch=2).tolist() == [[words, 17, 18, 19]] * 2
    written = torch.tensor([[words, 17, 18, 19, 11, 12, 3, 11, 11]])
    assert blip.decode(written) == ["a picture of the snow"]


def test_the_real_sizes():
    blip = BlipTokenizer({token: i for i, token in enumerate(WORDS + [f"[unused{i}]" for i in range(30522 - 27)])})
    assert (blip.id("[DEC]"), blip.id("[ENC]"), len(blip)) == (30522, 30523, 30524)


def test_cutting_is_asked_for(blip):
    assert blip.encode("the " * 9, max_length=5)[0].tolist() == [[2, 11, 11, 11, 3]]
    with pytest.raises(ValueError, match=r"max_length=1: .*512"):
        blip.encode("the", max_length=1)
    blip.max_positions = 8
    with pytest.raises(ValueError, match=r"'the the.*9 positions.*max_positions=8.*max_length"):
        blip.encode("the " * 7)
    with pytest.raises(ValueError, match=r"at least one sentence"):
        blip.encode([])


def test_files_and_the_hubs_cache(folder, blip, tmp_path):
    vocabulary = {token: i for i, token in enumerate(WORDS)}
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": vocabulary}}))
    cached = tmp_path / "cache/models--some--bert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())

    sources = [folder / "vocab.txt", other, other / "tokenizer.json"]
    tokenizers = [BlipTokenizer.load(source) for source in sources]
    tokenizers.append(BlipTokenizer.load("some/bert", cache_dir=str(tmp_path / "cache")))
    for one in tokenizers:
        assert torch.equal(one.encode(TEXTS)[0], blip.encode(TEXTS)[0])


def test_refusals(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("red\ngreen\n")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"\[PAD\], \[UNK\].*vocab.txt"):
        BlipTokenizer.load(tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"bad.json is no tokenizer.json"):
        BlipTokenizer.load(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match=r"neither vocab.txt nor tokenizer.json"):
        BlipTokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder nowhere.txt"):
        BlipTokenizer.load("nowhere.txt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"cannot get vocab.txt of 'no/bert'.*vocab.txt or tokenizer.json"):
        BlipTokenizer.load("no/bert", cache_dir=str(tmp_path / "empty"))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install tokenizers"):
        BlipTokenizer({token: i for i, token in enumerate(WORDS)})


def test_sentences_are_cleaned_as_for_blip():
    assert clean_caption('A dog (brown): "Rex"; runs~ fast.\n') == "a dog brown rex runs fast"
    assert clean_caption("one two three four", max_words=3) == "one two three"
    assert clean_question("Is it No.3 (or 4)?") == "is it no3 or 4?"
