"""Algorithms on padded batches of tokens, which parts and `vltprune.select` share: choice, matching, sampling, similarity."""
