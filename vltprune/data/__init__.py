"""Data sets for benchmarks, examples and tests. The library itself never enters here."""

from vltprune.data.synthetic import Pair, SyntheticPairs, normalise

__all__ = ["Pair", "SyntheticPairs", "normalise"]
