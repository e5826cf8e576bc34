"""Processes that share an evaluation: what one has, all get, and an error in one ends all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class ProcessError(RuntimeError):
    """Another process of the group failed, or was lost."""


@dataclass(frozen=True)
class Processes:
    """The group of processes that evaluate together, seen from one of them; by default that one alone.

    A group of several needs torch's default process group. All its processes call the same methods in the same order.

    Attributes:
        rank: This process, from 0. Process 0 is the main one, which reads and writes the results.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs the `with` block in all processes, and waits for all of them at its end.

        Raises:
            Exception: What the block raised in this process.
            ProcessError: If it raised in another one, with that one's message; or if another one was lost.
        """
        try:
            yield
        except Exception as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        failed = [(rank, text) for rank, text in enumerate(self.gather(None)) if text is not None]
        if failed:
            rank, text = failed[0]
            raise ProcessError(f"process {rank} of {self.count} failed: {text}")

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks, in each of them.

        Args:
            value: What pickle can write.

        Raises:
            ProcessError: If another process was lost.
        """
        values: list[Any] = [value] * self.count
        if self.count > 1:
            self._exchange(lambda: dist.all_gather_object(values, value))
        return values

    def broadcast(self, value: T) -> T:
        """The main process's value, in each of them.

        Args:
            value: What pickle can write; that of other processes is not read.

        Raises:
            ProcessError: If another process was lost.
        """
        values: list[Any] = [value]
        if self.count > 1:
            self._exchange(lambda: dist.broadcast_object_list(values, src=0))
        return values[0]

    def _exchange(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise ProcessError(f"process {self.rank} of {self.count} lost another one: {error}") from error
