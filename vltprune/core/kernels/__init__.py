"""Kernels for GPUs, each with the condition under which it is used; without one the same is computed by plain torch."""
