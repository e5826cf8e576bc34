"""Published annotation files to records: NLVR2, VQAv2 and Visual Genome, DAQUAR, COCO, Flickr30k and Flickr8k.

The forms are those in which BLIP's authors publish them (lists of objects in JSON), and two smaller ones:

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
from .records import Captioned, ImageSource, Question, R, Records, Skipped, Statement

Folder = str | Path
_LABELS = {"True": 1, "False": 0, True: 1, False: 0}  # 1 and 0 are equal to True and False
KEY = "__key__"  # of a sample in a shard, as webdataset names it: the identifier of an entry that has none
_VISUAL_GENOME = 0.2  # what BLIP lets its questions count
UNREADABLE = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
)  # what an entry of another form raises
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[][{},]', re.DOTALL)  # what tells where the elements of a JSON list end


def nlvr2(file: str | Path, images: Folder, *, strict: bool = False) -> Records[Statement]:
    """NLVR2 (`nlvr_train.json`, `nlvr_dev.json`, `nlvr_test.json`). images: the folder that the entries' paths begin in.

    OSError for no such file; ValueError for one that is no list of entries, or where none of them can be read.
    """

    def read(index: int, entry: Mapping[str, Any]) -> Statement:
        left, right = entry["images"]
        if not isinstance(entry["images"], list):
            raise ValueError(f"'images' must be a list of two paths, it is {_shown(entry['images'])}")
        return parse_statement(index, entry, (Path(images, left), Path(images, right)))

    return _records(file, read, strict)


def parse_statement(index: int, entry: Mapping[str, Any], images: Sequence[ImageSource]) -> Statement:
    """One entry of NLVR2 about two images. Raises one of `UNREADABLE` for another form."""
    entry = _given(entry)
    if entry["label"] not in _LABELS:
        raise ValueError(f"label {_shown(entry['label'])} is neither True nor False")
    return Statement(index, _so_many(2, images), _text(entry, "sentence"), _LABELS[entry["label"]])


def vqa(file: str | Path, images: Folder | Mapping[str, Folder], *, strict: bool = False) -> Records[Question]:
    """VQAv2 (`vqa_train.json`, `vqa_val.json`, `vqa_test.json`), Visual Genome (`vg_qa.json`), DAQUAR.

    images: the folder that the entries' paths begin in, or one for each "dataset", as {"vqa": ..., "vg": ...}. Raises as
    `nlvr2`.
    """

    def read(index: int, entry: Mapping[str, Any]) -> Question:
        source = entry.get("dataset", "vqa")
        folder = images[source] if isinstance(images, Mapping) else images
        return parse_question(index, entry, (Path(folder, _name(entry, "image")),))

    return _records(file, read, strict)


def parse_question(index: int, entry: Mapping[str, Any], images: Sequence[ImageSource]) -> Question:
    """One question about an image. Raises one of `UNREADABLE` for another form."""
    entry = _given(entry)
    source = entry.get("dataset", "vqa")
    weight = _VISUAL_GENOME if source == "vg" else 1.0
    answers, together = _answers(entry, source)
    original_id = _identifier(entry, "question_id")
    id = str(entry.get(KEY, index) if original_id is None else original_id)
    return Question(index, _so_many(1, images), id, _text(entry, "question"), answers, together, weight, original_id)


def captions(file: str | Path, images: Folder, *, strict: bool = False) -> Records[Captioned]:
    """COCO (`coco_karpathy_train.json`, `..._val.json`, `..._test.json`), Flickr30k likewise, Flickr8k.

    The training files have an entry a caption, the others an entry an image. images: the folder that the entries' paths
    begin in. Raises as `nlvr2`.
    """

    def read(index: int, entry: Mapping[str, Any]) -> Captioned:
        return parse_captioned(index, entry, (Path(images, _name(entry, "image")),))

    return _records(file, read, strict)


def parse_captioned(index: int, entry: Mapping[str, Any], images: Sequence[ImageSource]) -> Captioned:
    """One image with its captions. Raises one of `UNREADABLE` for another form."""
    entry = _given(entry)
    written = _texts(entry, "captions" if "captions" in entry else "caption")
    original_id = _identifier(entry, "image_id")
    id = str(entry.get("image", entry.get(KEY, index)) if original_id is None else original_id)
    return Captioned(index, _so_many(1, images), id, written, original_id)


def answer_list(file: str | Path) -> tuple[str, ...]:
    """The candidate answers of `answer_list.json`, a list of texts. OSError, ValueError as above."""
    answers = entries(Path(file))
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{file} is no list of answers: give BLIP's answer_list.json")
    return tuple(map(well_formed, answers))


def entries(file: Path) -> list[Any]:
    """What an annotation file lists; a RecursionError in the place of an entry that is nested too deeply.

    OSError for no such file; ValueError for one that holds no list.
    """
    try:
        text = decoded(file.read_bytes())
        found = _listed(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no annotation file {file}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{file} must hold a list of entries, it holds a {type(found).__name__}")
    return found


def decoded(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or 32, with or without a byte order mark.

    Bytes that are no UTF-8 become lone surrogates, as in the names of files.
    """
    encoding = json.detect_encoding(data)
    return data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass")


def parsed(text: str) -> Any:
    """What JSON says. ValueError for what is not JSON, RecursionError for what is nested too deeply."""
    return json.loads(text, parse_int=_integer)


def reason(error: Exception) -> str:
    """What is wrong with an entry, of an error of `UNREADABLE`."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _records(file: str | Path, read: Callable[[int, Mapping[str, Any]], R], strict: bool) -> Records[R]:
    path, records, skipped = Path(file), [], []
    for index, entry in enumerate(entries(path)):
        try:
            if isinstance(entry, RecursionError):
                raise entry
            records.append(read(index, _given(entry)))
        except UNREADABLE as error:
            if strict:
                raise ValueError(f"{path}, entry {index}: {reason(error)}") from error
            skipped.append(Skipped(index, reason(error)))
    if not records:
        first = f"; {skipped[0]}" if skipped else ""
        raise ValueError(f"none of the {len(skipped)} entries of {path} can be read: is it of this task?{first}")
    return Records(path, tuple(records), tuple(skipped))


def _answers(entry: Mapping[str, Any], source: str) -> tuple[tuple[str, ...], bool]:
    """As people gave them, and whether they belong together; none where the key is missing, as in the test file."""
    if "answer" not in entry:
        return (), False
    if isinstance(entry["answer"], str) and source != "vg":
        return tuple(answer.strip() for answer in _text(entry, "answer").split(",")), True
    return _texts(entry, "answer"), False


def _so_many(n: int, images: Sequence[ImageSource]) -> tuple[ImageSource, ...]:
    if len(images) != n:
        raise ValueError(f"it has {len(images)} pictures, and needs {n}")
    return tuple(images)


def _text(entry: Mapping[str, Any], key: str) -> str:
    return well_formed(_name(entry, key))


def _name(entry: Mapping[str, Any], key: str) -> str:
    """A text as it is, half characters included."""
    if not isinstance(entry[key], str) or not entry[key].strip():
        raise ValueError(f"{key!r} must be a text, it is {_shown(entry[key])}")
    return entry[key]


def _texts(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """One text, or a list of some."""
    value = [entry[key]] if isinstance(entry[key], str) else entry[key]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{key!r} must be a text or a list of texts, it is {_shown(entry[key])}")
    return tuple(map(well_formed, value))


def _identifier(entry: Mapping[str, Any], key: str) -> str | int | float | None:
    """An identifier as it stands there, None for none."""
    value = entry.get(key)
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{key!r} must be a text or a number, it is {_shown(value)}")


def _given(entry: Any) -> Any:
    """An entry without its nulls; what is no entry, as it is."""
    return {key: value for key, value in entry.items() if value is not None} if isinstance(entry, Mapping) else entry


def _integer(digits: str) -> int | str:
    """A number of JSON; one longer than Python reads stays a text."""
    try:
        return int(digits)
    except ValueError:
        return digits


def _listed(text: str) -> Any:
    """What JSON says; of a list, elements that are nested too deeply are a RecursionError each."""
    try:
        return parsed(text)
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


def _element(text: str) -> Any:
    try:
        return parsed(text)
    except RecursionError as error:
        return error


def _shown(value: Any) -> str:
    """A value as messages show it, shortened."""
    return reprlib.repr(value)
