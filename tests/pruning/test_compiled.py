"""Does a model with fixed counts compile as one graph, and does inference skip what nobody reads?"""

import pytest
import torch
from small_models import images, sentences, small

import vltprune as vp
from vltprune.core.kernels import native


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(model):
    return torch.compile(model, fullgraph=True, backend="eager", dynamic=False)


def plain(model, inputs):
    """Without compiled kernels, which a recorded graph does not have either."""
    with native.paused():
        return model(inputs)


@pytest.mark.parametrize("config", [{"preset": "evit"}, {"preset": "tome"}, {"preset": "madtp", "keep": "ratio(0.6)"}])
@torch.no_grad()
def test_fixed_counts_compile_as_one_graph(config):
    model, batch = vp.prune(small("vit").model, **config), images(3)
    assert torch.equal(whole(model)(batch), plain(model, batch))


@torch.no_grad()
def test_texts_of_one_length_compile_as_one_graph():
    model, (ids, _) = vp.prune(small("text").model, "evit"), sentences(3)
    assert torch.equal(whole(model)(ids), plain(model, ids))


@torch.no_grad()
def test_a_compiled_model_is_collected_where_graphs_may_break():
    model, batch = vp.prune(small("vit").model, "evit"), images(2)
    compiled = torch.compile(model, backend="eager")
    compiled(batch)
    with vp.collect() as compiled_traces:
        compiled(batch)
    with vp.collect() as traces:
        model(batch)
    assert [trace.lengths for trace in compiled_traces] == [trace.lengths for trace in traces]


def test_where_all_tokens_stay_inference_scores_none(monkeypatch):
    model, batch = vp.prune(small("vit").model, "madtp", keep="ratio(1.0)"), images(2)
    with torch.enable_grad():
        scored = model(batch)
    cost = vp.count_macs(model, batch)
    assert cost.total == cost.dense_total

    def refuse(*args, **named):
        raise AssertionError("scored")

    for pruner in model.pruners.values():
        monkeypatch.setattr(pruner.scorer, "forward", refuse)
    with torch.no_grad():
        assert torch.allclose(model(batch), scored, atol=1e-6)
    with pytest.raises(AssertionError, match="scored"), torch.enable_grad():
        model(batch)
