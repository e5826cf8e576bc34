"""Selectors: which tokens stay, and what each of the others resembles."""
