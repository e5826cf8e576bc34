"""What each task is trained to do, against the models' own losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import config

import vltprune as vp
from vltprune.data import Loader
from vltprune.evaluation import tasks
from vltprune.evaluation.tasks.nlvr import Nlvr
from vltprune.io.preprocessing import transforms
from vltprune.training.losses.objectives import MomentumObjective, build_objective
from vltprune.training.models import load_dense_model


def setting(name, folder, limit=4):
    """A dense model in training, its task, its objective, and a batch."""
    settings = config(name, folder)
    model = load_dense_model(settings).train()
    kind = tasks.tasks[name]
    task = kind.from_model(model, tasks.Options(settings.vocabulary))
    records = kind.load_records(settings.data, str(Path(settings.data).parent))
    batch, images = next(iter(Loader(records, transforms(model), limit)))
    return model, task, build_objective(task, model), batch, images


def test_statements_and_their_further_sentences(tmp_path):
    model, task, objective, records, images = setting("nlvr", tmp_path)
    loss = objective(model, records, images, 0)
    ids, mask = task.tokenizer.encode([record.sentence for record in records])
    labels = torch.tensor([record.label for record in records])
    right = torch.nn.functional.cross_entropy(model(images, ids, mask), labels, reduction="sum")
    torch.testing.assert_close(loss.total, right)
    assert loss.count == 4

    drawn = Nlvr.load_records("synthetic:train:3x5", "")
    assert [1 + len(record.more) for record in drawn] == [5, 5, 5]
    tiny = vp.create_model("blip_nlvr_tiny", pretrained=True)
    task = Nlvr.from_model(tiny)
    records, images = next(iter(Loader(drawn, transforms(tiny), 3)))
    found = build_objective(task, tiny)(tiny, records, images, 0)
    alone = [build_objective(task, tiny)(tiny, [record], images[i : i + 1], 0) for i, record in enumerate(records)]
    assert found.count == 15
    torch.testing.assert_close(found.total, sum(one.total for one in alone))


@pytest.mark.filterwarnings("ignore:captions are written, and not scored")
def test_captions_as_the_model_costs_them(tmp_path):
    model, task, objective, records, images = setting("caption", tmp_path)
    loss = objective(model, records, images, 3)
    said = [objective.choose_text(record, record.captions, 3) for record in records]
    ids, mask = task.tokenizer.encode(
        [f"a above {text}" for text in said]
    )  # the prompt of these models, and the caption
    torch.testing.assert_close(loss.total / loss.count, model.loss(images[:, 0], ids, mask))
    assert loss.outputs.shape == (loss.count, model.decoder.bias.numel())


def test_answers_as_the_model_costs_them(tmp_path):
    model, task, objective, records, images = setting("vqa", tmp_path)
    loss = objective(model, records, images, 0)
    questions = task.tokenizer.encode([record.question for record in records])
    answers = task.answer_tokenizer.encode(["red", "blue"] * 4)
    weight = torch.tensor([0.7, 0.3] * 4)
    right = model.loss(images[:, 0], *questions, *answers, torch.arange(4).repeat_interleave(2), weight)
    torch.testing.assert_close(loss.total / loss.count, right)


def test_pairs_of_one_image_are_all_right(tmp_path):
    _, task, objective, records, _ = setting("retrieval", tmp_path)
    assert isinstance(objective, MomentumObjective)
    clip = vp.create_model("clip_vit_s_32_alt").train()
    task = tasks.Retrieval.from_model(clip)
    objective, pixels = build_objective(task, clip), torch.rand(4, 1, 3, 224, 224)
    loss = objective(clip, records, pixels, 0)
    texts = task.encode([objective.choose_text(record, record.captions, 0) for record in records])[0]
    image, text = clip.encode_image(pixels[:, 0], normalize=True), clip.encode_text(texts, normalize=True)
    logits = clip.logit_scale.exp() * image @ text.T
    both = sum(torch.nn.functional.cross_entropy(one, torch.arange(4)) for one in (logits, logits.T)) / 2
    torch.testing.assert_close(loss.total / loss.count, both, atol=1e-4, rtol=1e-4)

    twice = [records[0], records[0], *records[2:]]
    same = objective(clip, twice, pixels[[0, 0, 2, 3]], 0)
    assert same.total.isfinite()
    assert same.outputs.shape == (8, 4)


def test_what_is_chosen_depends_on_seed_step_and_record(tmp_path):
    _, _, objective, records, _ = setting("retrieval", tmp_path)
    several = [str(i) for i in range(50)]
    first = [objective.choose_text(record, several, 5) for record in records]
    assert first == [objective.choose_text(record, several, 5) for record in records]
    assert first != [objective.choose_text(record, several, 6) for record in records]
    assert len(set(first)) > 1


def test_tasks_that_cannot_be_trained():
    with pytest.raises(TypeError, match="a str cannot be trained: nlvr, caption, vqa, retrieval can"):
        build_objective("nlvr", vp.create_model("blip_nlvr_tiny"))
