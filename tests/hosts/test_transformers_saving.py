"""Pruned models of transformers in the library's own hands: save_pretrained, from_pretrained, and the Trainer's checkpoints."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import vltprune as vp

LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def clip():
    text = {**LAYERS, "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**LAYERS, "image_size": 32, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=40, max_position_embeddings=16, **LAYERS)).eval()


@pytest.mark.parametrize("make", [clip, bert])
@pytest.mark.parametrize("parts", [{"config": "madtp", "guide": "codebook(anchors=6)"}, {"config": "evit"}], ids=str)
def test_from_pretrained_finds_the_dense_weights(tmp_path, make, parts):
    dense = make()
    vp.prune(dense, **parts).save_pretrained(tmp_path)
    again = type(dense).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in dense.state_dict().items())


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, place):
        mask = torch.ones(8, dtype=torch.long)
        return {"input_ids": torch.arange(8) + place, "attention_mask": mask, "labels": torch.tensor(place % 2)}


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path):
    def trainer():
        settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
        arguments = hf.TrainingArguments(str(tmp_path), **settings, **quiet)
        return hf.Trainer(vp.prune(bert(), "evit"), arguments, train_dataset=Sentences())

    whole, cut = trainer(), trainer()
    whole.train()
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    right, found = whole.model.state_dict(), cut.model.state_dict()
    assert all(torch.allclose(value, found[key], atol=1e-6) for key, value in right.items())
