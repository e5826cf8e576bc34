"""Configs and presets, the decision of one pruned layer, the loop over layers, and `prune(model, config)`."""
