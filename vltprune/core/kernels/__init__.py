"""Kernels for GPUs and CPUs, each with the condition under which it is used; without one plain torch computes the same."""
