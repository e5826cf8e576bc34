"""Training loop: trainer, budget controller, optimizer groups, checkpoints, metrics and interrupts."""
