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
    """A run was stopped by Ctrl-C or SIGTERM. Its text says where the same call goes on."""


class Stop:
    """Whether a signal asks the run to end. Within `watched` the first one is noted, for the loop to end behind its step.

    A second Ctrl-C leaves at once, by a KeyboardInterrupt; where several processes run it is not heard, for their launcher
    hands each signal on, and a process that leaves would keep the others waiting.
    """

    def __init__(self, processes: int = 1):
        self.asked, self._processes = False, processes

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the `with` block signals are noted; only the main thread may hear them, and elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT and self._processes == 1:
                raise KeyboardInterrupt
            return
        self.asked = True
        again = "; Ctrl-C again leaves at once, without a checkpoint" if self._processes == 1 else ""
        # not by print, which may be at work just now
        os.write(2, f"\nvltprune: stopping behind this step, with a checkpoint{again}\n".encode())
