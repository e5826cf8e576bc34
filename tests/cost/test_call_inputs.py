"""Batches as data loaders give them: calibrate, fit_guide and prune take the model's inputs of each."""

from __future__ import annotations

import open_clip
import pytest
import torch
import transformers
from small_models import images, small
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

import vltprune as vp
from vltprune.cost.inputs import model_inputs, run_batch

LABELS = torch.arange(6)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GUIDE = "codebook(anchors=5)"


def vit():
    return small("vit").model, images(6)


def hf_vit():
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    return transformers.ViTModel(config, add_pooling_layer=False).eval(), images(6)


def bert():
    config = transformers.BertConfig(**SIZES, vocab_size=40)
    return transformers.BertModel(config, add_pooling_layer=False).eval(), torch.randint(4, 40, (6, 9))


MODELS = {"timm": vit, "transformers' ViT": hf_vit, "BERT": bert}


class Pairs(torch.utils.data.Dataset):
    """Inputs with their labels, as a tuple, a list or a mapping."""

    def __init__(self, inputs, kind):
        self.inputs, self.kind = inputs, kind

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        pair = (self.inputs[index], int(LABELS[index]))
        return self.kind(pair) if self.kind is not dict else dict(zip(("data", "label"), pair, strict=True))


def loader(inputs, kind):
    return DataLoader(Pairs(inputs, kind), batch_size=3)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        dense, inputs = MODELS[request.param]()
    plain = vp.calibrate(pruned(dense), list(inputs.split(3)), 0.3, tolerance=0.1)
    return dense, inputs, plain


def pruned(dense):
    return vp.prune(dense, "random", keep="ratio")


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [(tuple, 0), (list, 0), (dict, "data"), (tuple, lambda batch: batch[0]), (dict, lambda batch: (batch["data"],))],
    ids=["tuple-0", "list-0", "dict-data", "tuple-function", "dict-function"],
)
def test_the_models_inputs_are_selected(case, kind, inputs):
    dense, data, plain = case
    assert vp.calibrate(pruned(dense), loader(data, kind), 0.3, tolerance=0.1, inputs=inputs) == plain
    measured = vp.measure(pruned(dense), loader(data, kind), plain.value, inputs=inputs)
    assert measured == plain
    at_once = vp.prune(
        dense, "random", keep="ratio", reduction=0.3, data=loader(data, kind), tolerance=0.1, inputs=inputs
    )
    assert at_once.pruning.config.keep.args["ratio"] == plain.value


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_labels_are_refused_with_the_argument_that_leaves_them_out(case, kind):
    """Not with an error of a forward() that knows no data loader."""
    dense, data, _ = case
    batches = [kind(batch) if kind is not dict else batch for batch in loader(data, kind)]
    asked = r"does not take a batch of .*\[3.*: .*say which part the model takes: inputs=0"
    for call in (
        lambda: vp.calibrate(pruned(dense), batches),
        lambda: vp.measure(pruned(dense), batches),
        lambda: vp.prune(dense, "random", reduction=0.3, data=batches),
        lambda: vp.fit_guide(vp.prune(dense, "madtp", guide=GUIDE), batches),
    ):
        with pytest.raises((TypeError, ValueError), match=asked):
            call()


def test_batches_of_transformers_and_open_clip_are_taken_whole():
    config = transformers.BertConfig(**SIZES, vocab_size=40)
    torch.manual_seed(0)
    model = vp.prune(transformers.BertModel(config, add_pooling_layer=False).eval(), "random", keep="ratio")
    ids = torch.randint(4, 40, (4, 9))
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert vp.measure(model, [batch]) == vp.measure(model, [ids])
    assert vp.measure(model, [batch], inputs="input_ids") == vp.measure(model, [ids])

    clip = open_clip.create_model("ViT-S-32", force_image_size=64)
    model, words = vp.prune(clip, "random", keep="ratio"), torch.randint(1, 99, (2, 77))
    words[:, 20] = 49407
    assert vp.measure(model, [(torch.randn(2, 3, 64, 64), words)]) == vp.measure(
        model, [[torch.zeros(2, 3, 64, 64), words]]
    )
    with pytest.raises(TypeError, match=r"a batch of float32 \[2, 3, 64, 64\], a list: .*inputs="):
        vp.measure(model, [(torch.randn(2, 3, 64, 64), ["a dog", "a cat"])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_floating_inputs_take_the_models_type(dtype):
    inputs = images(6)
    model = vp.prune(VisionTransformer(**VIT).to(dtype).eval(), "random", keep="ratio")
    seen = []
    model.host.patch_embed.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    vp.measure(model, [inputs])
    vp.measure(model, [{"images": inputs}])
    assert set(seen) == {dtype}
    assert run_batch(lambda_model(dtype), (inputs, LABELS)) == [dtype, torch.int64]


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


def lambda_model(dtype):
    """A model that tells the types of what it is given."""
    model = torch.nn.Linear(1, 1, dtype=dtype)
    model.forward = lambda *given: [one.dtype for one in given]
    return model


def test_inputs_move_to_the_models_device():
    model = torch.nn.Linear(1, 1, device="meta")
    model.forward = lambda *given, **named: [one.device.type for one in (*given, *named.values())]
    images, ids = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    for batch in ((images, ids), [images, ids], {"images": images, "ids": ids}):
        assert run_batch(model, batch) == ["meta", "meta"]


@pytest.mark.parametrize(
    ("batches", "inputs", "says"),
    [
        (torch.zeros(2, 3, 32, 32), None, r"a list of batches, not float32 \[2, 3, 32, 32\]: write \[batch\]"),
        ({"x": torch.zeros(2, 3)}, None, r"a list of batches, not x \(float32 \[2, 3\]\): write \[batch\]"),
        ("folder/", None, "a list of batches, not a str"),
        (7, None, "a list of batches, not a int"),
        ([{"image": LABELS}], "pixels", r"inputs='pixels' is no part of a batch of image \(int64 \[6\]\): say"),
        ([(LABELS, LABELS)], 2, r"inputs=2 is no part of a batch of int64 \[6\], int64 \[6\]"),
        ([LABELS.tolist], "pixels", "inputs='pixels' is no part of a batch of a builtin_function_or_method"),
    ],
)
def test_what_is_no_batch(batches, inputs, says):
    with pytest.raises(TypeError, match=says):
        list(model_inputs(batches, inputs))


@pytest.mark.parametrize(("progress", "shown"), [(None, False), (False, False), (True, True)])
def test_progress_is_shown_where_it_was_asked_for(capsys, progress, shown):
    """By default only where stderr is a terminal, which it is not here."""
    dense, data = vit()
    vp.prune(dense, "madtp", keep="ratio", guide=GUIDE, reduction=0.3, data=[data], tolerance=0.1, progress=progress)
    told = capsys.readouterr()
    assert told.out == ""
    for what in ("placing the guide's anchors", "calibrating to 30 % fewer MACs"):
        assert (what in told.err) == shown


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    vp.calibrate(pruned(vit()[0]), [vit()[1]], 0.3, tolerance=0.1)
    assert "calibrating to 30 % fewer MACs" in capsys.readouterr().err
