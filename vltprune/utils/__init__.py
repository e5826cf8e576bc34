"""Helpers that know nothing of pruning: files, frozen values, modes, wrappers, progress bars."""
