"""Modes: what measures or evaluates a model leaves every module in its own mode, and torch's random numbers where they were."""

from __future__ import annotations

import open_clip
import pytest
import torch
from small_models import BLIP, images, scrambled, sentences
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vltprune as vp
from vltprune.demo.measure import evaluate_models, generate_batches, time_models
from vltprune.evaluation.evaluator import Evaluator
from vltprune.models.blip import BlipNlvr
from vltprune.training.losses.decoding import DecodeWork
from vltprune.utils.modes import evaluating, on_meta

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16, "patch_dropout": 0.3},
    "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 3},
}


def vit():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**sizes, proj_drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3), (images(2),)


def nlvr():
    return BlipNlvr(**BLIP, dropout=0.3, drop_path=0.3), (images(2, 2), *sentences(2))


def clip():
    return open_clip.CLIP(**CLIP), (images(2), torch.randint(1, 40, (2, 12)))


def of_two_modes(model: nn.Module) -> nn.Module:
    """In training, with every third module frozen: in evaluation."""
    model.train()
    for module in [*model.modules()][::3]:
        module.training = False
    return model


def modes(model) -> list[bool]:
    return [module.training for whole in (model, model.pruning.host) for module in whole.modules()]


@pytest.fixture(params=[vit, nlvr, clip])
def case(request):
    dense, inputs = request.param()
    return of_two_modes(scrambled(dense)), inputs


def pruned(dense, **parts):
    return vp.prune(dense, "madtp", **{"guide": "codebook(anchors=5)", "keep": "ratio(ratio=0.5)", **parts})


def search(model, batch):
    return DecodeWork.measure(model, [lambda model: model(*batch)])


MEASURES = {
    "count": lambda model, batch: vp.count_macs(model, *batch),
    "fit_guide": lambda model, batch: vp.fit_guide(model, [batch]),
    "measure": lambda model, batch: vp.measure(model, [batch], 0.4),
    "calibrate": lambda model, batch: vp.calibrate(model, [batch], 0.3, tolerance=0.2),
    "search": search,
}


def test_pruning_leaves_the_modes_of_the_dense_model_alone(case):
    dense, _ = case
    before = [module.training for module in dense.modules()]
    model = pruned(dense)
    assert [module.training for module in dense.modules()] == before
    assert model.training == model.pruning.guide.training == dense.training
    for tower in model.pruning.towers.values():
        assert {module.training for module in (tower, *tower.pruners.modules())} == {tower.host.training}


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_leaves_modes_and_random_numbers_alone(case, measure):
    dense, batch = case
    model = of_two_modes(pruned(dense))
    before, drawn = modes(model), torch.get_rng_state()
    MEASURES[measure](model, batch)
    assert modes(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("measure", MEASURES)
def test_modes_and_knobs_come_back_after_an_error(case, measure):
    dense, (image, *rest) = case
    model = of_two_modes(pruned(dense))
    keepers = [module for module in model.modules() if isinstance(module, vp.KeepRatioPredictor)]
    for place, keeper in enumerate(keepers):
        keeper.ratio = 0.3 + place / 100
    before = modes(model)
    with pytest.raises(ValueError, match=r"images"):
        MEASURES[measure](model, (image[:, :1], *rest))
    assert modes(model) == before
    assert [keeper.ratio for keeper in keepers] == [0.3 + place / 100 for place in range(len(keepers))]
    assert keepers == [module for module in model.modules() if isinstance(module, vp.KeepRatioPredictor)]


def test_a_target_that_is_missed_leaves_every_depth_its_own_value():
    dense, batch = vit()
    model = pruned(dense)
    keepers = [module for module in model.modules() if isinstance(module, vp.KeepRatioPredictor)]
    for place, keeper in enumerate(keepers):
        keeper.ratio = 0.3 + place / 100
    with pytest.raises(vp.BudgetError):
        vp.calibrate(model, [batch], 0.999)
    assert [keeper.ratio for keeper in keepers] == [0.3 + place / 100 for place in range(len(keepers))]


def test_a_meter_measures_in_evaluation_whatever_the_mode_is(case):
    dense, batch = case
    model = pruned(dense)
    with vp.collect() as traces:
        model(*batch)
    before, drawn = modes(model), torch.get_rng_state()
    cost = vp.CostMeter(model)(traces)
    assert modes(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    with evaluating(model):
        assert vp.CostMeter(model)(traces).total == cost.total


def test_evaluation_leaves_modes_alone_and_answers_as_evaluation_does():
    sizes = {"merge_from": 2, "dropout": 0.3}
    dense = vp.create_model("blip_nlvr_tiny", **sizes)
    model = of_two_modes(pruned(dense))
    batches, models = generate_batches("val", 2, batch_size=2), {"dense": dense, "pruned": model}
    before, drawn = modes(model), torch.get_rng_state()
    first = evaluate_models(models, batches)
    time_models(models, batches)
    assert modes(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    again = evaluate_models({"dense": dense.eval(), "pruned": model.eval()}, batches)
    assert all((first[name].probability == again[name].probability).all() for name in models)


@pytest.mark.parametrize("kind", [lambda dense: dense, pruned], ids=["dense", "pruned"])
def test_evaluator_leaves_modes_unchanged(kind, tmp_path):
    from vltprune.data import Loader
    from vltprune.evaluation.results_log import ResultsLog
    from vltprune.evaluation.tasks import Nlvr, Options
    from vltprune.io.preprocessing import transforms

    model = kind(vp.create_model("blip_nlvr_tiny", dropout=0.3))
    task = Nlvr.from_model(model, Options())
    loader = Loader(Nlvr.load_records("synthetic:val:2", ""), transforms(model))
    of_two_modes(model)
    before, drawn = [module.training for module in model.modules()], torch.get_rng_state()
    rows = []
    for folder in ("train", "eval"):
        log = ResultsLog(tmp_path / folder, {})
        Evaluator(task, model).run(loader, log)
        rows.append([row["probability"] for row in log.rows])
        if folder == "train":
            assert [module.training for module in model.modules()] == before
            assert torch.equal(torch.get_rng_state(), drawn)
        model.eval()
    assert rows[0] == rows[1]


def test_a_module_of_two_parents_and_one_with_a_mode_of_its_own_keep_theirs():
    class Merged(nn.Module):
        """Does something when its mode changes, as adapters that merge their weights do."""

        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    shared, own = nn.Dropout(), Merged()
    model = nn.ModuleDict({"a": nn.Sequential(shared, own), "b": nn.Sequential(shared)})
    model.train()
    model["a"].training = shared.training = False
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert own.merged
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert own.training and not own.merged


def test_what_is_put_back_later_does_not_reach_what_was_put_back_before():
    """The one parent in training, the other and their child in evaluation."""
    shared = nn.Dropout()
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)}).eval()
    model["b"].training = True
    with evaluating(model):
        assert not model["b"].training
    assert model["b"].training and not shared.training


def test_modules_on_meta_differ_in_nothing_but_their_numbers():
    built = [vp.create_model(name) for name in ("blip_vqa_tiny", "test_vit")]
    with on_meta():
        empty = [vp.create_model(name) for name in ("blip_vqa_tiny", "test_vit")]
        filled = torch.zeros(2, device="cpu").fill_(3.0).add_(1.0)
    assert filled.tolist() == [4.0, 4.0]
    for one, other in zip(built, empty, strict=True):
        assert {t.device.type for t in (*other.parameters(), *other.buffers())} == {"meta"}
        shapes = [{name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (one, other)]
        assert shapes[0] == shapes[1] and repr(one) == repr(other)
