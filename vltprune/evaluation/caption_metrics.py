"""Caption metrics: BLEU, ROUGE-L, CIDEr and SPICE by pycocoevalcap, the package of COCO's evaluation, and Java."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_JAVA = range(8, 15)  # SPICE 1.0 writes its results by Java's own JavaScript (Nashorn), which ended with 14


def caption_scores(
    generated: Mapping[str, str], references: Mapping[str, Sequence[str]], spice: bool | None = None
) -> dict[str, float]:
    """BLEU-1 to 4, ROUGE-L, CIDEr-D and SPICE of one generated caption an image.

    CIDEr weighs words by how few of these images' references have them: a single image gets 0. Nothing is downloaded.

    Args:
        generated: The generated caption of each image, by the image's id.
        references: People's captions, by the same ids.
        spice: True to require SPICE, False to leave it out, None to score it where `spice_lacks` is None and to warn if its
            program fails.

    Returns:
        "BLEU-1" to "BLEU-4", "ROUGE-L", "CIDEr" and, where it is scored, "SPICE"; all of them 0 .. 1, but CIDEr 0 .. 10.

    Raises:
        ImportError: If the package, Java, or with `spice=True` what SPICE needs is missing; the message says what to install.
        RuntimeError: If SPICE's program fails with `spice=True`.
    """
    if missing := spice_lacks() if spice else caption_scorer_lacks():
        raise ImportError(missing)
    bleu_of, rouge_of, cider_of, tokenizer_of = _pycocoevalcap()
    tokenize = tokenizer_of().tokenize
    predictions = tokenize({key: _lines([text]) for key, text in generated.items()})
    targets = tokenize({key: _lines(references[key]) for key in generated})

    bleu, _ = bleu_of(4).compute_score(targets, predictions, verbose=0)
    scores = {f"BLEU-{n}": float(score) for n, score in enumerate(bleu, start=1)}
    scores["ROUGE-L"] = float(rouge_of().compute_score(targets, predictions)[0])
    scores["CIDEr"] = float(cider_of().compute_score(targets, predictions)[0])
    if spice is False or (spice is None and spice_lacks()):
        return scores
    return scores | _spice(targets, predictions, required=spice is True)


def caption_scorer_lacks() -> str | None:
    """What `caption_scores` needs and lacks on this machine, and how to get it; None for nothing."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        return "captions are scored by the package pycocoevalcap: pip install 'vltprune[eval]', and Java"
    if shutil.which("java") is None:
        return "pycocoevalcap tokenizes captions by Java, and there is no program java on the PATH: install one (8 or later)"
    return None


def spice_lacks() -> str | None:
    """What SPICE needs besides and lacks, and how to get it; None for nothing. It checks files and `java -version` only."""
    if missing := caption_scorer_lacks():
        return missing
    folder = _spice_folder() / "lib"
    if absent := [jar for jar in _JARS if not (folder / jar).is_file()]:
        return (
            f"SPICE parses by Stanford CoreNLP 3.6.0, and {folder} has no {' and no '.join(absent)}: let pycocoevalcap "
            "download them, python -m pycocoevalcap.spice.get_stanford_models, or put them there out of "
            "stanford-corenlp-full-2015-12-09.zip (nlp.stanford.edu/software)"
        )
    if (java := _java_version()) not in _JAVA:
        return f"SPICE runs on Java 8 to {_JAVA[-1]}, and the PATH's is {java or 'of no known version'}: put such a one first"
    return None


def _spice(targets: object, predictions: object, required: bool) -> dict[str, float]:
    """SPICE by itself; nothing, with a warning, where its program fails and it is not required."""
    from pycocoevalcap.spice.spice import Spice

    try:
        return {"SPICE": float(Spice().compute_score(targets, predictions)[0])}
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        how = f"exit status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else error
        message = (
            f"SPICE's program failed ({how}), see its output above; it takes up to 8 GB and writes to {_spice_folder()}"
        )
        if required:
            raise RuntimeError(message) from error
        warnings.warn(message, stacklevel=3)
        return {}


def _pycocoevalcap() -> tuple[Callable[..., Any], ...]:
    """The package's makers of BLEU, ROUGE-L, CIDEr and its tokenizer."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return Bleu, Rouge, Cider, PTBTokenizer


def _lines(texts: Sequence[str]) -> list[dict[str, str]]:
    """Each text as one line, in the tokenizer's form: it counts lines, and any other break would move the captions after.

    What UTF-8 cannot write, half of a character, becomes a question mark: the tokenizer is another program.
    """
    return [{"caption": " ".join(text.encode("utf-8", "replace").decode("utf-8").split())} for text in texts]


def _spice_folder() -> Path:
    found = importlib.util.find_spec("pycocoevalcap.spice")
    return Path(found.origin).parent if found is not None and found.origin else Path("pycocoevalcap", "spice")


def _java_version() -> int | None:
    """8 for "1.8.0_312", 17 for "17.0.15"."""
    printed = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', printed)
    return int(found[1]) if found else None
