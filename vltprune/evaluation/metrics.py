"""Metrics: accuracy, recall, VQA accuracy and captioning scores, as fractions of 1 (CIDEr may exceed it)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .caption_metrics import caption_scores as caption_scores  # captions have a module of their own

RANKS = (1, 5, 10)


def main_score(scores: Mapping[str, Any]) -> str | None:
    """The score to chart: the main one of its task, else the first; None where nothing was scored."""
    main = [name for name in ("accuracy", "vqa_accuracy", "CIDEr", "mean_recall") if name in scores]
    return next(iter([*main, *scores]), None)


def accuracy(probabilities: Sequence[float], labels: Sequence[int]) -> float:
    """The share of statements that were judged right.

    Args:
        probabilities: [statements], the probability given to "true"; above 0.5 counts as true.
        labels: [statements], 1 for true and 0 for false.

    Returns:
        The share, 0 .. 1.

    Raises:
        ValueError: If there are no statements, if a probability is NaN or infinite, or if the lengths differ.
    """
    if not probabilities:
        raise ValueError("accuracy of no statements: give at least one")
    wrong = [f"probabilities[{i}] is {value}" for i, value in enumerate(probabilities) if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"accuracy needs the probability that each statement is true, and {wrong[0]}")
    correct = [(value > 0.5) == (label == 1) for value, label in zip(probabilities, labels, strict=True)]
    return sum(correct) / len(correct)


def recalls(
    similarity: Tensor,
    text_to_image: Sequence[int] | Tensor,
    ranks: Sequence[int] = RANKS,
    by_text: Tensor | None = None,
) -> dict[str, float]:
    """Recall at k of image-text retrieval in both directions, and the mean of all.

    "i2t_r1" is the share of images whose nearest text is one of their own, "t2i_r1" the share of texts whose nearest image is
    theirs. Of equal similarities the wrong ones rank first, so that a constant similarity finds nothing.

    Args:
        similarity: [images, texts].
        text_to_image: [texts], the index of each text's image.
        ranks: The values of k.
        by_text: [images, texts], what ranks images for a text, where it is not `similarity`.

    Returns:
        "i2t_rK" and "t2i_rK" for each k, and "mean_recall".

    Raises:
        ValueError: If similarities are not finite, or if an image has no text.
    """
    own_image = torch.as_tensor(text_to_image, device=similarity.device)
    by_text = similarity if by_text is None else by_text
    finite = bool(similarity.isfinite().all() and by_text.isfinite().all())
    if (
        similarity.dim() != 2
        or own_image.shape != similarity.shape[1:]
        or by_text.shape != similarity.shape
        or not finite
    ):
        raise ValueError(
            "similarity, and by_text if it is given, must be finite [images, texts], with each text's image in text_to_image "
            f"[texts]; got {list(similarity.shape)} and {list(own_image.shape)}{'' if finite else ', with NaN or infinity'}"
        )
    own = torch.arange(len(similarity), device=similarity.device)[:, None] == own_image
    if not own.any(1).all() or not own.any(0).all():
        raise ValueError("every image needs a text, and every text one of the images: see text_to_image")

    best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    texts_before = ((similarity >= best) & ~own).sum(1)
    images_before = ((by_text >= by_text.gather(0, own_image[None])) & ~own).sum(0)
    found = {f"i2t_r{k}": int((texts_before < k).sum()) / len(texts_before) for k in ranks}
    found |= {f"t2i_r{k}": int((images_before < k).sum()) / len(images_before) for k in ranks}
    return {**found, "mean_recall": sum(found.values()) / len(found)}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al., ICCV 2015): min(n / 3, 1) for an answer that n people gave.

    It is the mean over subsets that leave one person's answer out. Both sides are normalized as the official evaluation does.

    Args:
        prediction: The model's answer.
        answers: One answer a person.

    Returns:
        The accuracy, 0 .. 1.

    Raises:
        ValueError: If there are fewer than two answers.
    """
    if len(answers) < 2:
        raise ValueError(f"VQA accuracy compares with several people's answers, got {len(answers)}")
    total, predicted = len(answers), normalize_answer(prediction)
    n = sum(normalize_answer(answer) == predicted for answer in answers)
    return (n * min((n - 1) / 3, 1) + (total - n) * min(n / 3, 1)) / total


def answer_sets(prediction: str, answers: Iterable[str]) -> dict[str, float]:
    """Compare two sets of answers, as in DAQUAR.

    Args:
        prediction: The model's answers, separated by commas.
        answers: The right answers.

    Returns:
        "exact", 1 if the sets are equal (WUPS at threshold 1; Malinowski and Fritz, NeurIPS 2014), and "overlap", their
        intersection over union.
    """
    predicted, right = ({part.strip().lower() for part in parts} for parts in (prediction.split(","), answers))
    return {"exact": float(predicted == right), "overlap": len(predicted & right) / len(predicted | right)}


def normalize_answer(text: str) -> str:
    """Normalize an answer as VQA's evaluation does, in the order that visualqa.org describes under "Evaluation Code".

    - lower case, no full stops but decimal points, number words as digits, no articles
    - contractions with their apostrophes
    - other punctuation, except apostrophes and colons, as spaces, a comma between digits as nothing
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", _PUNCTUATION.sub(" ", text))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-<>@`,?!]""")
_COUNT = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNT)}}


def _without_apostrophes(word: str) -> Iterable[str]:
    """The word with every choice of its apostrophes missing, at least one."""
    first, *rest = word.split("'")
    for marks in itertools.product(("'", ""), repeat=len(rest)):
        if "" in marks:
            yield first + "".join(mark + part for mark, part in zip(marks, rest, strict=True))


# Without those whose bare form is another word, such as we'll, or becomes one in lower case, such as I'm.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that'd that'd've that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
_CONTRACTIONS = {bare: word for word in _CONTRACTED for bare in _without_apostrophes(word)}
