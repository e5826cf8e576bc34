"""L_align against a loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vltprune.pruning.losses import alignment


@pytest.mark.parametrize(("groups", "images", "sentences"), [(3, 1, 1), (3, 2, 1), (2, 1, 3), (2, 2, 3), (1, 1, 1)])
def test_alignment(groups, images, sentences):
    image, text = torch.randn(groups * images, 5, 7), torch.randn(groups * sentences, 5, 7)
    terms = []
    for s in range(len(text)):
        group = s // sentences
        seen = image[group * images : (group + 1) * images].mean(0)
        terms += [1 - F.cosine_similarity(seen[k], text[s, k], dim=0) for k in range(5)]
    assert_close(alignment(image, text, images), torch.stack(terms).mean())


def test_what_agrees_costs_nothing_and_nothing_is_finite():
    x = torch.randn(2, 3, 4)
    assert_close(alignment(x, 5 * x), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert_close(alignment(x, -x), torch.tensor(2.0))
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    loss = alignment(zero, x)
    loss.backward()
    assert loss.item() == 1
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize(("image", "text", "images"), [(3, 3, 2), (0, 2, 1), (2, 3, 1), (1, 1, 2)])
def test_batches_that_do_not_fit(image, text, images):
    with pytest.raises(ValueError, match=f"{text} sentences cannot be aligned with {image} images at {images} images"):
        alignment(torch.zeros(image, 2, 3), torch.zeros(text, 2, 3), images)
