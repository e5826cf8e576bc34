"""MACs of a forward pass, and calibration: a pruned model at a given cost."""
