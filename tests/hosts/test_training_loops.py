"""The training loops of each library, run on pruned models: keep-all trains as the dense model does."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import timm.optim
import timm.utils
import torch
import transformers as hf
from cases_transformers import HEADED
from checks import same
from test_hosts import make

import vltprune as vp

CLASSIFIERS = [f"transformers: headed: {name}" for name in HEADED if "Classification" in name and "Teacher" not in name]
KEEP_ALL = {"keep": "ratio(ratio=1.0)"}


def examples(case, names):
    """One dictionary an instance, as data sets of transformers give them."""
    columns = dict(zip(names, case.inputs, strict=False))
    return [{**{name: column[i] for name, column in columns.items()}, "labels": i % 2} for i in range(3)]


def train(model, rows, folder, **options):
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_steps=2,
        **options,
    )
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    losses = [trainer.train().training_loss, trainer.evaluate()["eval_loss"]]
    return losses, trainer.predict(rows).predictions


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_trainer(name, tmp_path):
    case = make(name)
    names = ("pixel_values",) if "Image" in name else ("input_ids", "attention_mask")
    rows = examples(case, names)
    pruned = vp.prune(copy.deepcopy(case.model), "random", **KEEP_ALL)
    (want, dense), (got, kept) = (train(model, rows, tmp_path) for model in (case.model, pruned))
    assert got == pytest.approx(want, rel=1e-4)
    assert kept == pytest.approx(dense, abs=1e-3)
    train(case.pruned("evit"), rows, tmp_path, gradient_accumulation_steps=2)


def test_trainer_of_two_towers(tmp_path):
    case = make("transformers: clip")
    rows = [
        {"input_ids": ids, "pixel_values": image, "return_loss": True} for ids, image in zip(*case.inputs, strict=True)
    ]
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, max_steps=2
    )

    def together(some):
        both = {name: torch.stack([row[name] for row in some]) for name in ("input_ids", "pixel_values")}
        return {**both, "return_loss": True}

    for model in (case.pruned("random", **KEEP_ALL), case.pruned("madtp")):
        trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=together)
        assert trainer.train().training_loss > 0


@pytest.mark.parametrize(
    "named",
    [
        {"output_attentions": False, "output_hidden_states": None, "head_mask": None, "past_key_values": None},
        {"use_cache": True, "num_items_in_batch": torch.tensor(3), "labels": None},
        {"token_type_ids": torch.zeros(3, 12, dtype=torch.int64), "return_dict": True},
    ],
)
@pytest.mark.parametrize(
    "name", ["bert: plain", "roberta: plain", "distilbert: plain", "mpnet: plain", "modernbert: plain"]
)
@torch.no_grad()
def test_keywords_that_change_no_answer(name, named):
    case = make(f"transformers: {name}")
    same(case.pruned("random", **KEEP_ALL)(*case.inputs, **named), case.expected())


@torch.no_grad()
def test_keywords_of_timm_that_change_no_answer():
    case = make("timm: vit: plain")
    pruned = case.pruned("random", **KEEP_ALL)
    same(pruned(*case.inputs, attn_mask=None, is_causal=False), case.expected())
    with pytest.raises(TypeError, match="attn_mask"):
        pruned(*case.inputs, attn_mask=torch.zeros(17, 17))


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    case = make("transformers: headed: BertForSequenceClassification")
    model = case.pruned("evit").train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(*case.inputs, labels=torch.tensor([0, 1, 0])).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert any((a != b).any() for a, b in zip(before, accelerator.unwrap_model(model).parameters(), strict=True))


@pytest.mark.parametrize("name", ["timm: vit: layer_scale", "timm: eva: rope dinov3"])
def test_a_step_of_timm(name):
    case = make(name)
    model = case.pruned("evit", scorer="self_attention").train()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(*case.inputs), torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
    assert average.module.eval()(*case.inputs).isfinite().all()


def test_an_epoch_of_open_clip():
    main = pytest.importorskip("open_clip_train.train")
    open_clip = pytest.importorskip("open_clip")
    case = make("open_clip: clip")
    model = case.pruned("evit")
    model.output_dict = True
    model.set_grad_checkpointing()
    model.lock_image_tower(unlocked_groups=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = model.logit_scale.item()

    data = {"train": SimpleNamespace(dataloader=Batches([case.inputs] * 2), set_epoch=lambda epoch: None)}
    arguments = SimpleNamespace(
        device="cpu", precision="fp32", accum_freq=1, distill=False, horovod=False, grad_clip_norm=1.0, rank=0, world_size=1,
        log_every_n_steps=1, batch_size=3, skip_scheduler=True, save_logs=False, wandb=False, distributed=False, local_rank=0,
    )  # fmt: skip
    main.train_one_epoch(model, data, open_clip.ClipLoss(), 0, optimizer, None, None, None, arguments)
    assert model.logit_scale.item() != before


class Batches(list):
    """A loader, as open_clip's training reads one."""

    num_batches, num_samples = 2, 6
