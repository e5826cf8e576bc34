"""Published annotation files to records: NLVR2, VQAv2 and Visual Genome, DAQUAR, COCO, Flickr30k and Flickr8k.

The forms are those in which BLIP's authors publish them (lists of objects in JSON), and two smaller ones:

  nlvr2     {"images": [left, right], "sentence": ..., "label": "True" or "False"}
  vqa       {"image", "question", "question_id", "dataset": "vqa" or "vg", "answer": [ten answers], of "vg" one}
            DAQUAR: {"image", "question", "answer": "one, or several with commas"}
  captions  {"image", "caption": one or a list, "image_id"}; Flickr8k: {"image", "captions": [...]}

`statement`, `question` and `captioned` read one entry whose pictures are at hand, wherever they come from. In a file, an
entry that cannot be read is set aside with its place and the reason, unless `strict` makes it a ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import Captioned, Picture, Question, R, Records, Skipped, Statement

Folder = str | Path
_LABELS = {"True": 1, "False": 0, True: 1, False: 0}  # 1 and 0 are equal to True and False
_VISUAL_GENOME = 0.2  # what BLIP lets its questions count
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError)  # what an entry of another form raises


def nlvr2(file: str | Path, images: Folder, *, strict: bool = False) -> Records[Statement]:
    """NLVR2 (`nlvr_train.json`, `nlvr_dev.json`, `nlvr_test.json`). images: the folder that the entries' paths begin in.

    OSError for no such file; ValueError for one that is no list of entries, or where none of them can be read.
    """

    def read(index: int, entry: Mapping[str, Any]) -> Statement:
        left, right = entry["images"]
        return statement(index, entry, (Path(images, left), Path(images, right)))

    return _records(file, read, strict)


def statement(index: int, entry: Mapping[str, Any], images: Sequence[Picture]) -> Statement:
    """One entry of NLVR2 about two images. Raises one of `UNREADABLE` for another form."""
    if entry["label"] not in _LABELS:
        raise ValueError(f"label {entry['label']!r} is neither True nor False")
    return Statement(index, _so_many(2, images), _text(entry, "sentence"), _LABELS[entry["label"]])


def vqa(file: str | Path, images: Folder | Mapping[str, Folder], *, strict: bool = False) -> Records[Question]:
    """VQAv2 (`vqa_train.json`, `vqa_val.json`, `vqa_test.json`), Visual Genome (`vg_qa.json`), DAQUAR.

    images: the folder that the entries' paths begin in, or one for each "dataset", as {"vqa": ..., "vg": ...}. Raises as
    `nlvr2`.
    """

    def read(index: int, entry: Mapping[str, Any]) -> Question:
        source = entry.get("dataset", "vqa")
        folder = images[source] if isinstance(images, Mapping) else images
        path = Path(folder, _text(entry, "image"))
        return question(index, {"question_id": index, **entry}, (path,))

    return _records(file, read, strict)


def question(index: int, entry: Mapping[str, Any], images: Sequence[Picture]) -> Question:
    """One question about an image. Raises one of `UNREADABLE` for another form."""
    source = entry.get("dataset", "vqa")
    share = _VISUAL_GENOME if source == "vg" else 1.0
    answers, together = _answers(entry, source)
    name = str(entry["question_id"])
    return Question(index, _so_many(1, images), name, _text(entry, "question"), answers, together, share)


def captions(file: str | Path, images: Folder, *, strict: bool = False) -> Records[Captioned]:
    """COCO (`coco_karpathy_train.json`, `..._val.json`, `..._test.json`), Flickr30k likewise, Flickr8k.

    The training files have an entry a caption, the others an entry an image. images: the folder that the entries' paths
    begin in. Raises as `nlvr2`.
    """

    def read(index: int, entry: Mapping[str, Any]) -> Captioned:
        image = _text(entry, "image")
        return captioned(index, {"image_id": image, **entry}, (Path(images, image),))

    return _records(file, read, strict)


def captioned(index: int, entry: Mapping[str, Any], images: Sequence[Picture]) -> Captioned:
    """One image with its captions. Raises one of `UNREADABLE` for another form."""
    written = _texts(entry, "captions" if "captions" in entry else "caption")
    return Captioned(index, _so_many(1, images), str(entry["image_id"]), written)


def answer_list(file: str | Path) -> tuple[str, ...]:
    """The candidate answers of `answer_list.json`, a list of texts. OSError, ValueError as above."""
    answers = entries(Path(file))
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{file} is no list of answers: give BLIP's answer_list.json")
    return tuple(answers)


def entries(file: Path) -> list[Any]:
    """What an annotation file lists. OSError for no such file; ValueError for one that holds no list."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no annotation file {file}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{file} must hold a list of entries, it holds a {type(found).__name__}")
    return found


def reason(error: Exception) -> str:
    """What is wrong with an entry, of an error of `UNREADABLE`."""
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _records(file: str | Path, read: Callable[[int, Mapping[str, Any]], R], strict: bool) -> Records[R]:
    path, records, skipped = Path(file), [], []
    for index, entry in enumerate(entries(path)):
        try:
            records.append(read(index, entry))
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


def _so_many(n: int, images: Sequence[Picture]) -> tuple[Picture, ...]:
    if len(images) != n:
        raise ValueError(f"it has {len(images)} pictures, and needs {n}")
    return tuple(images)


def _text(entry: Mapping[str, Any], key: str) -> str:
    if not isinstance(entry[key], str) or not entry[key].strip():
        raise ValueError(f"{key!r} must be a text, it is {entry[key]!r}")
    return entry[key]


def _texts(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """One text, or a list of some."""
    value = [entry[key]] if isinstance(entry[key], str) else entry[key]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{key!r} must be a text or a list of texts, it is {entry[key]!r}")
    return tuple(value)
