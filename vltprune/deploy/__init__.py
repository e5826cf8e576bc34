"""Deployment of pruned models: fixed counts, files for other engines, and copies finished for inference."""
