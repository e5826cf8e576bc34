"""Keepers (keep-ratio predictors): how many tokens of an instance stay."""
