"""Checks of parts: the invariants of each kind of part, and `check_part`, which holds a part to them on random batches."""
