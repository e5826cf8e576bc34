"""Captions, scored by pycocoevalcap: what it is given, what is said where parts are missing, its numbers by hand.

The tests marked `captions` run the package itself and are skipped without it and Java; SPICE's also needs the jars of Stanford
CoreNLP and a Java that it runs on. docs/evaluate.md tells how to get them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from math import exp, sqrt

import pytest

from vltprune.evaluation import caption_metrics, metrics
from vltprune.evaluation.caption_metrics import caption_scores

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
BLEU = [f"BLEU-{n}" for n in (1, 2, 3, 4)]
MISSING, SPICE_MISSING = caption_metrics.caption_scorer_lacks(), caption_metrics.spice_lacks()
WRITTEN = {"a": "A dog runs on grass.", "b": "two men sit"}
REFERENCES = {"a": ["A dog runs on green grass !", "dog near grass"], "b": ["Two men sit", "a man sitting"]}
REAL = [pytest.mark.captions, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    for spice in (None, True, False):
        with pytest.raises(ImportError, match=r"pip install 'vltprune\[eval\]', and Java"):
            caption_scores({"a": "a dog"}, {"a": ["a dog"]}, spice=spice)
    assert metrics.caption_scores is caption_scores


def scorer(score):
    return lambda *n: types.SimpleNamespace(compute_score=score)


class Spice:
    """Fails as the package's does where its Java fails."""

    broken = False

    def compute_score(self, gts, res):
        if self.broken:
            raise subprocess.CalledProcessError(1, ["java", "-jar"])
        return 0.25, None


@pytest.fixture
def coco(monkeypatch, tmp_path):
    """Stands in for the package, with all that SPICE needs: its call forms, and scores that tell what it was given.

    Yields the folder of its SPICE."""
    modules = {
        "bleu.bleu": {
            "Bleu": lambda n: types.SimpleNamespace(compute_score=lambda gts, res, verbose: ([len(gts)] * n, 0))
        },
        "rouge.rouge": {"Rouge": scorer(lambda gts, res: (0.5, None))},
        "cider.cider": {"Cider": scorer(lambda gts, res: (len(gts["a"]), None))},
        "spice.spice": {"Spice": Spice},
        "tokenizer.ptbtokenizer": {"PTBTokenizer": lambda: types.SimpleNamespace(tokenize=dict)},
    }
    for name, contents in modules.items():
        for part in ("", f".{name.partition('.')[0]}", f".{name}"):
            monkeypatch.setitem(sys.modules, f"pycocoevalcap{part}", types.ModuleType("made up"))
        vars(sys.modules[f"pycocoevalcap.{name}"]).update(contents)
    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")
    monkeypatch.setattr(caption_metrics, "_spice_folder", lambda: tmp_path)
    java(monkeypatch, 'openjdk version "1.8.0_312"')
    (tmp_path / "lib").mkdir()
    for jar in JARS:
        (tmp_path / "lib" / jar).touch()
    return tmp_path


def java(monkeypatch, told):
    monkeypatch.setattr(subprocess, "run", lambda *args, **named: types.SimpleNamespace(stderr=told))


def scores(**named):
    return caption_scores({"a": "dog"}, {"a": ["a dog", "one dog"], "b": ["a cat"]}, **named)


def test_captions_go_to_the_package(coco):
    others = {**dict.fromkeys(BLEU, 1), "ROUGE-L": 0.5, "CIDEr": 2}
    assert scores() == scores(spice=True) == {**others, "SPICE": 0.25}
    assert scores(spice=False) == others


def test_without_java(coco, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(ImportError, match="by Java, and there is no program java on the PATH: install one"):
        scores()


def test_without_the_jars_of_spice(coco):
    """The rest is scored, and nobody tries to download anything."""
    (coco / "lib" / JARS[1]).unlink()
    assert set(scores()) == {*BLEU, "ROUGE-L", "CIDEr"}
    with pytest.raises(
        ImportError, match=r"lib has no stanford-corenlp-3\.6\.0-models\.jar: .*get_stanford_models"
    ) as told:
        scores(spice=True)
    assert str(coco / "lib") in str(told.value) and "stanford-corenlp-full-2015-12-09.zip" in str(told.value)


@pytest.mark.parametrize(
    ("told", "fits"),
    [
        ('java version "1.8.0_312"', True),
        ('openjdk version "11.0.22" 2024-01-16', True),
        ('openjdk version "14" 2020-03-17', True),
        ('openjdk version "15.0.1"', False),
        ('java version "1.7.0_80"', False),
        ("", False),
    ],
)
def test_spice_runs_on_old_javas(coco, monkeypatch, told, fits):
    java(monkeypatch, told)
    assert ("SPICE" in scores()) == fits
    assert fits or "SPICE runs on Java 8 to 14" in str(caption_metrics.spice_lacks())


def test_a_spice_that_fails_leaves_the_other_scores(coco, monkeypatch):
    monkeypatch.setattr(Spice, "broken", True)
    with pytest.warns(UserWarning, match="SPICE's program failed"):
        assert set(scores()) == {*BLEU, "ROUGE-L", "CIDEr"}
    with pytest.raises(RuntimeError, match="SPICE's program failed"):
        scores(spice=True)


class TestReal:
    """Two images. Counts of n-grams, matched / written: 8/8, 5/6, 3/4, 1/2; 8 words written, 9 in the closest references."""

    pytestmark = REAL

    def test_bleu(self):
        found = caption_scores(WRITTEN, REFERENCES, spice=False)
        precisions = (1, 5 / 6, 3 / 4, 1 / 2)
        product = 1.0
        for n, (name, precision) in enumerate(zip(BLEU, precisions, strict=True), start=1):
            product *= precision
            assert found[name] == pytest.approx(exp(1 - 9 / 8) * product ** (1 / n), rel=1e-6)

    def test_rouge(self):
        """Of image a, precision 1 and recall 5/6, the best of both references; F with beta 1.2. Image b repeats one."""
        recall = 5 / 6
        first = (1 + 1.2**2) * recall / (recall + 1.2**2)
        found = caption_scores(WRITTEN, REFERENCES, spice=False)
        assert found["ROUGE-L"] == pytest.approx((first + 1) / 2)

    def test_cider(self):
        """ "a" is in the references of both images and weighs nothing, all else the same: cosines of counts, and a Gaussian
        of the difference in length (sigma 6), mean over n = 1 to 4 and over references, times ten."""
        first = (4 / sqrt(4 * 5) + 3 / sqrt(4 * 5) + 2 / sqrt(3 * 4) + 1 / sqrt(2 * 3)) * exp(-1 / 72)
        second = 2 / sqrt(4 * 3) * exp(-4 / 72)
        repeated = 1 + 1 + 1
        found = caption_scores(WRITTEN, REFERENCES, spice=False)
        assert found["CIDEr"] == pytest.approx(10 * ((first + second) / 8 + repeated / 8) / 2)

    @pytest.mark.parametrize("gap", ["\n", "\r", "\u2028", "\x85", "\x0b"])
    def test_a_line_break_moves_no_caption(self, gap):
        broken = {"a": f"A dog{gap}runs on grass.{gap}", "b": "two men sit"}
        expected = caption_scores(WRITTEN, REFERENCES, spice=False)
        assert caption_scores(broken, REFERENCES, spice=False) == expected

    def test_nothing_written(self):
        found = caption_scores({"a": "", "b": "."}, REFERENCES, spice=False)
        assert found == dict.fromkeys([*BLEU, "ROUGE-L", "CIDEr"], pytest.approx(0, abs=1e-9))

    @pytest.mark.skipif(bool(SPICE_MISSING), reason=str(SPICE_MISSING))
    def test_spice(self):
        """Written are a dog and that it is black: of these a reference has one, or both."""
        written = dict.fromkeys("ab", "a black dog")
        found = caption_scores(written, {"a": ["a dog"], "b": ["a black dog"]}, spice=True)
        assert found["SPICE"] == pytest.approx((2 / 3 + 1) / 2)
