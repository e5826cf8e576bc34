"""Scores against numbers worked out by hand."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from vltprune.evaluation import metrics


def test_accuracy():
    assert metrics.accuracy([0.9, 0.4, 0.6, 0.1], [1, 0, 0, 1]) == 0.5
    assert metrics.accuracy([0.5], [0]) == 1  # who cannot tell does not say that it is true
    with pytest.raises(ValueError, match="no statements"):
        metrics.accuracy([], [])


SIMILARITY = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.3, 0.5, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4]])


def test_recalls_by_hand():
    """Image 0 owns texts 0 and 1, image 1 text 2, image 2 text 3."""
    found = metrics.recalls(SIMILARITY, [0, 0, 1, 2], ranks=(1, 2))
    assert found["i2t_r1"] == found["i2t_r2"] == 1
    assert found["t2i_r1"] == 2 / 4  # text 1 is nearest to image 1, text 2 to image 0
    assert found["t2i_r2"] == 3 / 4  # text 1's own image is the last of three
    assert found["mean_recall"] == pytest.approx((1 + 1 + 0.5 + 0.75) / 4)


def test_equals_find_nothing():
    assert metrics.recalls(torch.zeros(3, 6), [0, 0, 1, 1, 2, 2], ranks=(1,))["mean_recall"] == 0
    assert metrics.recalls(torch.zeros(1, 2), [0, 0])["mean_recall"] == 1  # where there are no others


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_recalls_as_by_sorting(images, each, seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randperm(images * images * each, generator=generator).float().view(images, -1)
    text_to_image = torch.arange(images).repeat_interleave(each)[torch.randperm(images * each, generator=generator)]
    found = metrics.recalls(similarity, text_to_image, ranks=(1, 2))
    for k in (1, 2):
        texts = [text_to_image[row.argsort(descending=True)[:k]] for row in similarity]
        nearest = [column.argsort(descending=True)[:k] for column in similarity.T]
        assert found[f"i2t_r{k}"] == pytest.approx(sum(i in t.tolist() for i, t in enumerate(texts)) / images)
        hits = sum(o in n.tolist() for o, n in zip(text_to_image.tolist(), nearest, strict=True))
        assert found[f"t2i_r{k}"] == pytest.approx(hits / len(text_to_image))


@pytest.mark.parametrize(
    ("similarity", "text_to_image", "text"),
    [
        (torch.zeros(2, 3), [0, 1], r"text_to_image \[texts\]"),
        (torch.tensor([[float("nan")]]), [0], "finite"),
        (torch.zeros(2, 2), [0, 0], "every image needs a text"),
    ],
)
def test_recalls_refuse(similarity, text_to_image, text):
    with pytest.raises(ValueError, match=text):
        metrics.recalls(similarity, text_to_image)


@pytest.mark.parametrize(("people", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_person_out(people, score):
    answers = ["dog"] * people + [f"cat {i}" for i in range(10 - people)]
    assert metrics.vqa_accuracy("The dog.", answers) == pytest.approx(score)
    subsets = [answers[:i] + answers[i + 1 :] for i in range(10)]
    assert metrics.vqa_accuracy("dog", answers) == pytest.approx(sum(min(s.count("dog") / 3, 1) for s in subsets) / 10)


def test_vqa_accuracy_needs_answers():
    with pytest.raises(ValueError, match="several people's answers, got 0"):
        metrics.vqa_accuracy("dog", [])


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog.", "dog"),
        ("a  cat, an owl", "cat owl"),
        ("Two", "2"),
        ("none", "0"),
        ("100,978", "100978"),
        ("7.5 m.", "7.5 m"),
        ("u.s.a.", "usa"),
        ("dont know", "don't know"),
        ("couldntve", "couldn't've"),
        ("the dog's bowl", "dog's bowl"),
        ("10:30", "10:30"),
        ("t-shirt/jeans", "t shirt jeans"),
        ("well", "well"),
        ("", ""),
    ],
)
def test_answers_are_normalized(answer, normal):
    assert metrics.normalize_answer(answer) == normal
    assert metrics.normalize_answer(normal) == normal


def test_answer_sets():
    assert metrics.answer_sets("Lamp", ["lamp"]) == {"exact": 1, "overlap": 1}
    assert metrics.answer_sets("lamp, cup", ["cup", "lamp"])["exact"] == 1
    assert metrics.answer_sets("lamp", ["cup", "lamp"]) == {"exact": 0, "overlap": 0.5}
