"""Parts that are registered while a test runs."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def registered(registry, **makers):
    """Registers makers within the `with` block alone."""
    for name, maker in makers.items():
        registry.register(name)(maker)
    try:
        yield
    finally:
        for name in makers:
            del registry._makers[name]
