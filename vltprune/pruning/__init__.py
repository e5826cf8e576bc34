"""Configs and presets, the decision of one pruned layer, the loop over layers, and the type of pruned models."""
