"""Pruned encoders as a module of sentence-transformers, by the class of its page: the embeddings of pooling by hand."""

from __future__ import annotations

import pages
import pytest
import torch

import vltprune as vp

pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page defines, after its code has run."""
    folder = tmp_path_factory.mktemp("sentences")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pages.run(pages.ROOT / "docs" / "sentence_transformers.md") as names:
            yield {**names, "folder": folder / "encoder"}


def by_hand(model, batch, pooling):
    """Embeddings [sentences, dim], one sentence at a time, without padding."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        with vp.collect() as traces, torch.no_grad():
            tokens = model(input_ids=ids[mask > 0][None]).last_hidden_state[0]
        weight = traces[0].output_tokens.weight
        assert len(weight) == len(tokens)
        rows.append(tokens[0] if pooling == "cls" else (weight[:, None] * tokens).sum(0) / weight.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("preset", [None, "evit", "tome"])
def test_embeddings_are_those_of_pooling_by_hand(preset, pooling, page):
    module = page["PrunedTransformer"](str(page["folder"]))
    torch.manual_seed(0)
    module.model = vp.prune(module.model, preset or "evit", **({} if preset else {"keep": "ratio(ratio=1.0)"}))
    encoder = page["SentenceTransformer"](modules=[module, page["Pooling"](32, pooling)])
    sentences = page["sentences"]
    want = by_hand(module.model, encoder.tokenizer(sentences, padding=True, return_tensors="pt"), pooling)
    for batch_size in (1, 3, 4):  # sorted by length: batches of one length, and of several
        found = encoder.encode(sentences, batch_size=batch_size, convert_to_tensor=True)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    if preset is None:
        dense = page["SentenceTransformer"](modules=[page["Transformer"](str(page["folder"])), encoder[1]])
        torch.testing.assert_close(dense.encode(sentences, convert_to_tensor=True), want, atol=1e-5, rtol=1e-5)
