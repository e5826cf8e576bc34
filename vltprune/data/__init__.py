"""Data sets for evaluation, training, benchmarks and the demo: annotation files, shards and synthetic NLVR."""

from vltprune.data.annotations import answer_list, captions, nlvr2, vqa
from vltprune.data.loader import Loader
from vltprune.data.records import Captioned, Question, Record, Records, Skipped, Statement
from vltprune.data.synthetic import SyntheticNLVR, SyntheticPair, SyntheticPairs, normalize

__all__ = [
    "Captioned",
    "Loader",
    "Question",
    "Record",
    "Records",
    "Skipped",
    "Statement",
    "SyntheticNLVR",
    "SyntheticPair",
    "SyntheticPairs",
    "answer_list",
    "captions",
    "nlvr2",
    "normalize",
    "vqa",
]
