"""Training data: which records a step sees, how they are opened, and batches that calibration runs on."""
