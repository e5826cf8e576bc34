"""What published GFLOPs count: each number, rebuilt from the MACs that this library counts.

    OMP_NUM_THREADS=1 python benchmarks/published_macs.py       # 20 seconds on one core, 1.2 GB of memory

The numbers are those that UPop (arXiv 2301.13741) measured with fvcore and that MADTP's reference compares with, and a plain
ViT's. fvcore counts multiply-accumulates, and five for each number that goes through a layer norm, which this library does
not count; here that rule is applied, and fvcore is not needed.
Models have weights of zero, and no product with them is computed: costs depend on shapes alone. Expected: every published
number to its last digit, as it is in docs/cost.md; and the MACs of one instance at inference, which for VQA, retrieval and
CLIP are something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vltprune as vp
from vltprune.cost.macs import CostMeter
from vltprune.cost.sample_cost import keep_all
from vltprune.models.generation import BeamSearch
from vltprune.utils.modes import on_meta

SENTENCE = 36  # tokens of the one that NLVR2's number was measured with
CAPTION = 15  # likewise "a picture of car driving down a road behind a lot of sheep"
QUESTIONS, QUESTION, ANSWERS, ANSWER = 32, 14, 47, 5  # so many of so many tokens, the longest of each
LONGEST = 35  # what retrieval pads its texts to
QUEUE = 57600  # features of images, and of texts, that a batch is compared with in training


@dataclass(frozen=True)
class Published:
    """A published number, what it counts, that as counted here in GMACs, and what fvcore adds for norms."""

    what: str
    published: float
    counts: str
    macs: float
    norms: float

    def __str__(self) -> str:
        return f"| {self.what} | {self.published} | {self.counts} | {self.macs:.2f} | {self.with_norms:.2f} |"

    @property
    def with_norms(self) -> float:
        return self.macs + self.norms


@dataclass(frozen=True)
class Instance:
    """GMACs of one instance at inference."""

    what: str
    macs: float

    def __str__(self) -> str:
        return f"| {self.what} | {self.macs:.1f} |"


class Count:
    """Counts calls of a dense model: count(call) -> [2], GMACs of matrix products, and what fvcore makes of its norms."""

    def __init__(self, build: Callable[[], nn.Module]):
        self.model = keep_all(_of_zeros(build))
        self.meter, self.normed = CostMeter(self.model), 0
        self.layers = [module for module in self.model.modules() if isinstance(module, nn.LayerNorm)]

    @torch.no_grad()
    def __call__(self, call: Callable[[Any], object]) -> Tensor:
        self.normed = 0
        hooks = [layer.register_forward_hook(self._note) for layer in self.layers]
        with _ProductsOfZeros():
            with vp.collect() as traces:
                call(self.model)
            for hook in hooks:  # a model whose hooks refer to its counter is not freed with it
                hook.remove()
            macs = self.meter(traces).padded_total
        return torch.tensor([macs, 5 * self.normed], dtype=torch.float64) / 1e9

    def _note(self, norm: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        self.normed += out.numel()


def vit() -> Iterator[Published | Instance]:
    count = Count(lambda: vp.backbones["blip_base"]().visual)
    found = count(lambda model: model(_images()))
    yield Published("ViT-B/16, 384 px", 55.5, "one image", *found.tolist())


def nlvr() -> Iterator[Published | Instance]:
    count, images = Count(vp.backbones["blip_nlvr_base"]), _images(2)[None]
    found = count(lambda model: model(images, _ids(1, SENTENCE)))
    yield Published("BLIP NLVR2, 384 px", 132.54, f"two images, a sentence of {SENTENCE} tokens", *found.tolist())
    found = count(lambda model: model(images, _ids(1, 35)))
    yield Instance("BLIP NLVR2: two images, a sentence of 35 tokens", float(found[0]))


def caption() -> Iterator[Published | Instance]:
    count, images = Count(vp.backbones["blip_caption_base"]), _images()
    found = count(lambda model: model(images, _ids(1, CAPTION)))
    yield Published("BLIP caption, 384 px", 65.7, f"an image, a given caption of {CAPTION} tokens", *found.tolist())
    found = count(lambda model: model.generate(images, BeamSearch(3), max_length=20))
    yield Instance("BLIP caption: an image, a caption of 20 tokens by three beams", float(found[0]))


def answering() -> Iterator[Published | Instance]:
    count, images = Count(vp.backbones["blip_vqa_base"]), _images(1, 480)

    def measured(model: Any) -> None:
        states = model.text(_ids(QUESTIONS, QUESTION), None, model.visual(images))
        model.decoder(_ids(ANSWERS, ANSWER), model.decoder.start(states.select_instances([0])))

    counts = f"an image, {QUESTIONS} questions of {QUESTION} tokens, {ANSWERS} answers of {ANSWER} tokens to the first"
    yield Published("BLIP VQA, 480 px", 186.1, counts, *count(measured).tolist())
    question = count(lambda model: model.text(_ids(1, QUESTION), None, model.visual(images)))
    yield Instance(f"BLIP VQA: an image, a question of {QUESTION} tokens, before the answer", float(question[0]))
    found = count(lambda model: model.generate(images, _ids(1, QUESTION), None, BeamSearch(3), max_length=10))
    yield Instance("BLIP VQA: the same, and an answer of 10 tokens by three beams", float(found[0]))


def retrieval() -> Iterator[Published | Instance]:
    count, images, ids = Count(vp.backbones["blip_retrieval_base"]), _images(), _ids(1, LONGEST)
    image, text = count(lambda model: model.image_features(images)), count(lambda model: model.text_features(ids))
    match = count(lambda model: model(images, ids)) - image
    queues = torch.tensor([4 * 256 * QUEUE, 0]) / 1e9  # image and text, model and copy
    counts = (
        f"a step of training: an image and a text of {LONGEST} tokens, by the model and its momentum copy; "
        "three pairs matched; queues"
    )
    yield Published("BLIP retrieval, 384 px", 153.2, counts, *(2 * (image + text) + 3 * match + queues).tolist())
    yield Instance(f"BLIP retrieval: features of an image and of a text of {LONGEST} tokens", float((image + text)[0]))
    yield Instance("BLIP retrieval: matching one such pair, the image's tokens being there", float(match[0]))


def clip() -> Iterator[Published | Instance]:
    count = Count(lambda: CLIP(**open_clip.get_model_config("ViT-L-14-336")))
    ids = _ids(1, 77)
    ids[:, -1] = 49407  # the end, behind which nothing would be counted
    found = count(lambda model: model(_images(1, 336), ids))
    queues = torch.tensor([4 * 768 * QUEUE, 0]) / 1e9
    counts = "a step of training: an image and a text of 77 tokens, by the model and its momentum copy; queues"
    yield Published("CLIP ViT-L/14, 336 px", 395.7, counts, *(2 * found + queues).tolist())
    yield Instance("CLIP ViT-L/14: features of an image and of a text of 77 tokens", float(found[0]))


MODELS = (vit, nlvr, caption, answering, retrieval, clip)
PUBLISHED = "| model | published | what it counts | MACs, here | and norms, as fvcore |\n|---|---|---|---|---|"
INSTANCES = "| one instance | GMACs |\n|---|---|"


def main() -> None:
    rows = [row for model in MODELS for row in model()]
    for kind, head in ((Published, PUBLISHED), (Instance, INSTANCES)):
        print(head, *(row for row in rows if isinstance(row, kind)), "", sep="\n")


class _ProductsOfZeros(TorchDispatchMode):
    """Answers matrix products and attention with zeros of their shape: where all weights are zero, so are they."""

    _PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    _ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._PRODUCTS:
            left, right = args[-2:]
            return left.new_zeros(*left.shape[:-1], right.shape[-1])
        if func is self._ATTENTION:
            query = args[0]
            sums = query.new_zeros(query.shape[:-1])  # of exponentials, which nobody asks for
            return torch.zeros_like(query), sums
        return func(*args, **(kwargs or {}))


def _of_zeros(build: Callable[[], nn.Module]) -> nn.Module:
    """The model in evaluation on the CPU, each of its tensors one zero that is repeated: there is none to draw or to hold."""
    with on_meta():
        model = build()
    return model._apply(lambda values: torch.zeros((), dtype=values.dtype).expand(values.shape)).eval()


def _images(number: int = 1, size: int = 384) -> Tensor:
    return torch.zeros(number, 3, size, size)


def _ids(rows: int, length: int) -> Tensor:
    return torch.full((rows, length), 100)


if __name__ == "__main__":
    main()
