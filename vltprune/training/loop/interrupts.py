"""Interrupts: Ctrl-C and SIGTERM end a run after a whole step, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM. Its text says from which step the same call resumes."""


class InterruptHandler:
    """Signal handler that notes the first Ctrl-C or SIGTERM in `requested`, for the loop to end behind its step.

    A second Ctrl-C leaves at once, by a KeyboardInterrupt. Where several processes run it is ignored: their launcher hands
    each signal on, and a process that leaves would keep the others waiting.

    Args:
        processes: number of processes of the run.
    """

    def __init__(self, processes: int = 1):
        self.requested, self._processes = False, processes

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles signals within the `with` block; in another thread than the main one nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT and self._processes == 1:
                raise KeyboardInterrupt
            return
        self.requested = True
        again = "; Ctrl-C again leaves at once, without a checkpoint" if self._processes == 1 else ""
        # not by print, which may be at work just now
        os.write(2, f"\nvltprune: stopping behind this step, with a checkpoint{again}\n".encode())
