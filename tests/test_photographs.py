"""Scripts on photographs, where they need no weights: pages, and what can be foretold of a photograph's need."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"
PAGES = runpy.run_path(str(FOLDER / "photographs_on_pages.py"))


@pytest.fixture(scope="module")
def foretelling():
    """The script's functions; the scripts beside it are found as when it runs."""
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / "need_foretold.py"))
    finally:
        sys.path.remove(str(FOLDER))


def shown(page):
    """Top, bottom, left and right of what is not white."""
    dark = np.asarray(page).min(2) < 255
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def test_a_page_shows_its_whole_photograph_and_nothing_else():
    """A photograph of four colours: at any size and place all four corners are seen, and around it is white."""
    pixels = np.zeros((224, 160, 3), np.uint8)
    pixels[:112, :80, 0], pixels[:112, 80:, 1], pixels[112:, :80, 2] = 200, 200, 200
    shares, corners = [], set()
    for place in range(200):
        page = PAGES["page"](Image.fromarray(pixels), "dev", place)
        assert page.size == (160, 224)
        top, bottom, left, right = shown(page)
        height, width = bottom - top, right - left
        assert abs(height / 224 - width / 160) <= 1 / 160
        shares.append(height / 224)
        corners.add((top, left))
        inside = np.asarray(page)[top:bottom, left:right].astype(int)
        quarters = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(inside - quarters).max() == 0
    assert 0.4 <= min(shares) < 0.45
    assert 0.95 < max(shares) <= 1
    assert abs(np.mean(shares) - 0.7) < 4 * 0.6 / np.sqrt(12 * 200)
    assert len(corners) > 150


def test_pages_are_the_same_each_time_and_differ_between_splits_and_places():
    photograph = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    one = shown(PAGES["page"](photograph, "dev", 3))
    assert one == shown(PAGES["page"](photograph, "dev", 3))
    assert one != shown(PAGES["page"](photograph, "dev", 4))
    assert one != shown(PAGES["page"](photograph, "train", 3))


def test_what_can_be_told_is_foretold_and_noise_is_not(foretelling):
    generator = torch.Generator().manual_seed(0)
    known, asked = torch.randn(2, 600, 8, generator=generator)

    def wanted(features):
        return torch.stack([2 * features[:, 0] + 3, features[:, 1] * features[:, 2]], 1)

    told = foretelling["foretold"](known, wanted(known), asked)
    assert foretelling["explained"](wanted(asked)[:, 0], told[:, 0]) > 0.9
    noise = torch.randn(2, 600, 1, generator=generator)
    told = foretelling["foretold"](known, noise[0], asked)
    assert abs(foretelling["explained"](noise[1][:, 0], told[:, 0])) < 0.1


def test_a_gain_is_what_own_shares_recall_above_one_share_at_the_same_cost(foretelling):
    """Half of the photographs are lost below the whole, and half never: who knows it loses nothing at half the cost."""
    shares, n = len(foretelling["SHARES"]), 40
    split = foretelling["Split"].__new__(foretelling["Split"])
    own = torch.eye(n)
    split.text, split.scale = own.expand(foretelling["CAPTIONS"], n, n), torch.tensor(10.0)
    needy = torch.arange(n) < n // 2
    split.costs = torch.linspace(0.3, 1, shares)
    split.image = torch.stack([torch.where(needy[:, None] & (cost < 1), -own, own) for cost in split.costs])
    assert split.recall(own) == 100
    cells = [float(cell) for cell in foretelling["gains"](split, split.damage()).split()]
    assert cells == [50, 0]  # 35 % fewer where the needy keep all; 70 % where MACs are too dear for anybody
    assert (split.loss()[needy].diff(dim=1)[:, -1] < -1).all()
    assert split.loss()[~needy].diff(dim=1).abs().max() < 1e-4
