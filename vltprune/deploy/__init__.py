"""Deployment of pruned models: fixed counts, and files for other engines."""
