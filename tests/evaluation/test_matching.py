"""BLIP's second stage: which pairs are judged, and that each is judged as the model alone would."""

from __future__ import annotations

import pytest
import torch

import vltprune as vp
from vltprune import data
from vltprune.evaluation import metrics, tasks
from vltprune.evaluation.tasks import matching

IMAGES = torch.randn(4, 1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
WORDS = ("a red star", "a circle", "two blue squares", "no star", "a star", "three green circles")
RECORDS = [data.Captioned(i, (), str(i), WORDS[i : i + 1 + i % 2]) for i in range(4)]


@pytest.fixture(params=["dense", "pruned"])
def model(request):
    dense = vp.create_model("blip_retrieval_tiny")
    return dense if request.param == "dense" else vp.prune(dense, "evit")


@torch.no_grad()
def rows_of(task, model, records, images):
    rows = []
    for i, record in enumerate(records):
        texts, _ = task.tokenize([record])
        rows += [{"index": i, **row} for row in task.predict(model, [record], images(record), texts)]
    return rows


@pytest.fixture
def second(model):
    """The second stage behind a first, with the two nearest judged."""
    first = tasks.Retrieval.from_model(model)
    return first.matching(RECORDS, rows_of(first, model, RECORDS, lambda record: IMAGES[[record.index]]), k=2)


def test_only_models_with_a_head_have_one():
    assert tasks.Retrieval.from_model(vp.create_model("blip_retrieval_tiny_evit")).has_head
    assert not tasks.Retrieval.from_model(vp.create_model("clip_vit_s_32_alt")).has_head


def test_pairs_are_the_nearest_of_either_side(second):
    near = torch.zeros(4, 6, dtype=torch.bool)
    near.scatter_(1, second.similarity.topk(2, 1).indices, True)
    near.scatter_(0, second.similarity.topk(2, 0).indices, True)
    pairs = second.pairs()
    assert [(pair.row, text) for pair in pairs for text in pair.texts.tolist()] == [
        *map(tuple, near.nonzero().tolist())
    ]
    assert [pair.index for pair in pairs] == list(range(len(pairs)))


def test_popular_images_are_judged_in_several_calls(second, monkeypatch):
    whole = second.pairs()
    monkeypatch.setattr(matching, "_TEXTS_PER_CALL", 1)
    assert all(len(pair.texts) == 1 for pair in second.pairs())
    assert sum(len(pair.texts) for pair in whole) == len(second.pairs())


@torch.no_grad()
def test_each_pair_gets_its_logit_added_to_its_cosine(second, model):
    pairs = second.pairs()
    rows = rows_of(second, model, pairs, lambda pair: IMAGES[[pair.row]])

    ids, mask = second.encode([text for record in RECORDS for text in record.captions])
    logits = torch.stack([model(image, ids, mask)[:, 1] for image in IMAGES])  # all texts against each image
    by_image, by_text = tasks.rerank(second.similarity, lambda images, texts: logits[images, texts], 2)
    judged = by_image > -1e3
    assert judged.sum(1).tolist() == [2] * 4 and (by_text > -1e3).sum(0).tolist() == [2] * 6
    torch.testing.assert_close(by_image[judged], (second.similarity + logits)[judged])
    assert second.text_to_image == [0, 1, 1, 2, 3, 3]
    assert second.score(rows) == metrics.recalls(by_image, second.text_to_image, by_text=by_text)


def test_a_pair_that_was_not_judged_comes_last(second, model):
    rows = rows_of(second, model, second.pairs(), lambda pair: IMAGES[[pair.row]])
    with_all, with_none = second.score(rows), second.score([])
    assert set(with_all) == set(with_none)
    assert with_none["i2t_r10"] == with_none["t2i_r10"] == 1  # fewer than ten of each: all are found
