"""Annotation files: NLVR2, VQAv2 and Visual Genome, DAQUAR, COCO, Flickr30k and Flickr8k to records.

The formats are those in which BLIP's authors publish them (lists of objects in JSON), and two smaller ones:

  nlvr2     {"images": [left, right], "sentence": ..., "label": "True" or "False"}
  vqa       {"image", "question", "question_id", "dataset": "vqa" or "vg", "answer": [ten answers], of "vg" one}
            DAQUAR: {"image", "question", "answer": "one, or several with commas"}
  captions  {"image", "caption": one or a list, "image_id"}; Flickr8k: {"image", "captions": [...]}

`parse_statement`, `parse_question` and `parse_captioned` parse one entry whose images are at hand. In a file, an entry that
cannot be parsed is skipped and listed with its index and the reason; with `strict` it is a ValueError. A null value counts as
missing. In texts, a lone surrogate becomes U+FFFD; file names and identifiers stay as they are.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.wordpiece import well_formed
from .images import ImageSource
from .records import Captioned, Question, R, Records, Skipped, Statement

Folder = str | Path
# one entry of an annotation file, as its JSON has it
Entry = Mapping[str, Any]
KEY = "__key__"  # webdataset's name for a sample's key, the identifier of an entry that has none
# What parsing an entry of another format raises.
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
_LABELS = {"True": 1, "False": 0, True: 1, False: 0}  # 1 and 0 are equal to True and False
_VISUAL_GENOME = 0.2  # BLIP's weight of its questions in training
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[][{},]', re.DOTALL)  # what delimits the elements of a JSON list


def nlvr2(file: str | Path, images: Folder, *, strict: bool = False) -> Records[Statement]:
    """Load NLVR2 (`nlvr_train.json`, `nlvr_dev.json`, `nlvr_test.json`).

    Args:
        file: The annotation file.
        images: The folder that the entries' image paths begin in.
        strict: Whether an entry that cannot be parsed is an error; otherwise it is skipped.

    Returns:
        The records, and the entries that were skipped.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no list of entries, if no entry can be parsed, or, with `strict`, if one cannot.
    """

    def parse(index: int, entry: Entry) -> Statement:
        left, right = entry["images"]
        if not isinstance(entry["images"], list):
            raise ValueError(f"'images' must be a list of two paths, it is {_shown(entry['images'])}")
        return parse_statement(index, entry, (Path(images, left), Path(images, right)))

    return _records(file, parse, strict)


def parse_statement(index: int, entry: Entry, images: Sequence[ImageSource]) -> Statement:
    """Parse one entry of NLVR2.

    Args:
        index: The record's index, as `Record.index`.
        entry: The entry, as an annotation file has it; its paths are not followed.
        images: Its two images, left and right.

    Returns:
        The record.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, RecursionError: If the entry has another format.
    """
    entry = _without_nulls(entry)
    if entry["label"] not in _LABELS:
        raise ValueError(f"label {_shown(entry['label'])} is neither True nor False")
    return Statement(index, _exactly(2, images), _text(entry, "sentence"), _LABELS[entry["label"]])


def vqa(file: str | Path, images: Folder | Mapping[str, Folder], *, strict: bool = False) -> Records[Question]:
    """Load VQAv2 (`vqa_train.json`, `vqa_val.json`, `vqa_test.json`), Visual Genome (`vg_qa.json`) or DAQUAR.

    Args:
        file: The annotation file.
        images: The folder that the entries' image paths begin in, or one for each "dataset": {"vqa": ..., "vg": ...}.
        strict: Whether an entry that cannot be parsed is an error; otherwise it is skipped.

    Returns:
        The records, and the entries that were skipped.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no list of entries, if no entry can be parsed, or, with `strict`, if one cannot.
    """

    def parse(index: int, entry: Entry) -> Question:
        source = entry.get("dataset", "vqa")
        folder = images[source] if isinstance(images, Mapping) else images
        return parse_question(index, entry, (Path(folder, _name(entry, "image")),))

    return _records(file, parse, strict)


def parse_question(index: int, entry: Entry, images: Sequence[ImageSource]) -> Question:
    """Parse one question about one image.

    Args:
        index: The record's index, as `Record.index`.
        entry: The entry, as an annotation file has it; its paths are not followed.
        images: The image alone.

    Returns:
        The record.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, RecursionError: If the entry has another format.
    """
    entry = _without_nulls(entry)
    source = entry.get("dataset", "vqa")
    original_id = _identifier(entry, "question_id")
    answers, is_answer_set = _answers(entry, source)
    return Question(
        index=index,
        images=_exactly(1, images),
        id=str(entry.get(KEY, index) if original_id is None else original_id),
        question=_text(entry, "question"),
        answers=answers,
        is_answer_set=is_answer_set,
        weight=_VISUAL_GENOME if source == "vg" else 1.0,
        original_id=original_id,
    )


def captions(file: str | Path, images: Folder, *, strict: bool = False) -> Records[Captioned]:
    """Load COCO (`coco_karpathy_train.json`, `..._val.json`, `..._test.json`), Flickr30k likewise, or Flickr8k.

    Training files have an entry a caption, the others an entry an image.

    Args:
        file: The annotation file.
        images: The folder that the entries' image paths begin in.
        strict: Whether an entry that cannot be parsed is an error; otherwise it is skipped.

    Returns:
        The records, and the entries that were skipped.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no list of entries, if no entry can be parsed, or, with `strict`, if one cannot.
    """

    def parse(index: int, entry: Entry) -> Captioned:
        return parse_captioned(index, entry, (Path(images, _name(entry, "image")),))

    return _records(file, parse, strict)


def parse_captioned(index: int, entry: Entry, images: Sequence[ImageSource]) -> Captioned:
    """Parse one image with its captions.

    Args:
        index: The record's index, as `Record.index`.
        entry: The entry, as an annotation file has it; its paths are not followed.
        images: The image alone.

    Returns:
        The record.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, RecursionError: If the entry has another format.
    """
    entry = _without_nulls(entry)
    texts = _texts(entry, "captions" if "captions" in entry else "caption")
    original_id = _identifier(entry, "image_id")
    id = str(entry.get("image", entry.get(KEY, index)) if original_id is None else original_id)
    return Captioned(index, _exactly(1, images), id, texts, original_id)


def answer_list(file: str | Path) -> tuple[str, ...]:
    """Load the candidate answers of `answer_list.json`, a list of texts.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no list of texts.
    """
    answers = entries(Path(file))
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{file} is no list of answers: give BLIP's answer_list.json")
    return tuple(map(well_formed, answers))


def entries(file: Path) -> list[Any]:
    """The entries of an annotation file; a RecursionError in the place of one that is nested too deeply.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no list.
    """
    try:
        text = decode_text(file.read_bytes())
        found = _elements(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no annotation file {file}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{file} must hold a list of entries, it holds a {type(found).__name__}")
    return found


def decode_text(data: bytes) -> str:
    """Decode a file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Bytes that are no UTF-8 become lone surrogates, as in file names.
    """
    encoding = json.detect_encoding(data)
    return data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass")


def parse_json(text: str) -> Any:
    """Parse JSON; an integer that is too long for Python stays a text.

    Raises:
        ValueError: If the text is not JSON.
        RecursionError: If it is nested too deeply.
    """
    return json.loads(text, parse_int=_integer)


def reason(error: Exception) -> str:
    """What is wrong with an entry, from the exception of `UNREADABLE` that parsing it raised."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _records(file: str | Path, parse: Callable[[int, Entry], R], strict: bool) -> Records[R]:
    path = Path(file)
    records, skipped = [], []
    for index, entry in enumerate(entries(path)):
        try:
            if isinstance(entry, RecursionError):
                raise entry
            records.append(parse(index, _without_nulls(entry)))
        except UNREADABLE as error:
            if strict:
                raise ValueError(f"{path}, entry {index}: {reason(error)}") from error
            skipped.append(Skipped(index, reason(error)))
    if not records:
        first = f"; {skipped[0]}" if skipped else ""
        raise ValueError(f"none of the {len(skipped)} entries of {path} can be read: is it of this task?{first}")
    return Records(path, tuple(records), tuple(skipped))


def _answers(entry: Entry, source: str) -> tuple[tuple[str, ...], bool]:
    """The answers, and whether they form one answer; none where the key is missing, as in the test file."""
    if "answer" not in entry:
        return (), False
    if isinstance(entry["answer"], str) and source != "vg":
        return tuple(answer.strip() for answer in _text(entry, "answer").split(",")), True
    return _texts(entry, "answer"), False


def _exactly(n: int, images: Sequence[ImageSource]) -> tuple[ImageSource, ...]:
    if len(images) != n:
        raise ValueError(f"it has {len(images)} images, and needs {n}")
    return tuple(images)


def _text(entry: Entry, key: str) -> str:
    return well_formed(_name(entry, key))


def _name(entry: Entry, key: str) -> str:
    """A text as it is, half characters included."""
    if not isinstance(entry[key], str) or not entry[key].strip():
        raise ValueError(f"{key!r} must be a text, it is {_shown(entry[key])}")
    return entry[key]


def _texts(entry: Entry, key: str) -> tuple[str, ...]:
    """One text, or a list of some."""
    value = [entry[key]] if isinstance(entry[key], str) else entry[key]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{key!r} must be a text or a list of texts, it is {_shown(entry[key])}")
    return tuple(map(well_formed, value))


def _identifier(entry: Entry, key: str) -> str | int | float | None:
    """An entry's identifier, unchanged; None where it has none."""
    value = entry.get(key)
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{key!r} must be a text or a number, it is {_shown(value)}")


def _without_nulls(entry: object) -> Any:
    """An entry without its null values; anything else as it is."""
    return {key: value for key, value in entry.items() if value is not None} if isinstance(entry, Mapping) else entry


def _integer(digits: str) -> int | str:
    """A number of JSON; one longer than Python reads stays a text."""
    try:
        return int(digits)
    except ValueError:
        return digits


def _elements(text: str) -> object:
    """What JSON holds; of a list, elements that are nested too deeply are a RecursionError each."""
    try:
        return parse_json(text)
    except RecursionError as error:
        if not text.lstrip().startswith("["):
            raise ValueError("it is nested too deeply") from error
    found, depth, start = [], 0, text.index("[") + 1
    for mark in _MARKS.finditer(text):
        depth += (mark[0] in "[{") - (mark[0] in "]}")
        if depth == 0 or (depth == 1 and mark[0] == ","):
            found.append(_element(text[start : mark.start()]))
            start = mark.end()
    return found


def _element(text: str) -> object:
    try:
        return parse_json(text)
    except RecursionError as error:
        return error


def _shown(value: object) -> str:
    """A value as messages show it, shortened."""
    return reprlib.repr(value)
