"""Scorers: how much each token matters."""
