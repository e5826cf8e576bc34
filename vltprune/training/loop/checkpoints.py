"""Checkpoints of a run, written so that the last one is always whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException

_STATE = "state.json"


class Checkpoints:
    """Folders step_00000500, ... of which the last two are kept. Each is written under another name, and then renamed.

    Args:
        folder: where they stand.
        accelerator: Accelerate's; it saves model, optimizer and random numbers of every process.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint.

        Args:
            step: number of whole steps.
            state: further plain data that json can write.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are unchanged.
        """
        final = self.folder / f"step_{step:08d}"
        part = final.with_suffix(".part")
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(part), safe_serialization=False)  # towers share tensors
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (part / _STATE).write_text(json.dumps({"step": step, **state}))
                part.rename(final)
        except (OSError, RuntimeError, CheckpointException) as error:  # a full disk is any of them, by the writer
            shutil.rmtree(part, ignore_errors=True)
            why = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise OSError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {why}. Free space there and give the same "
                f"command again: it resumes from step {self.last_step()}"
            ) from error
        if self.accelerator.is_main_process:
            for old in self._all()[:-2]:
                shutil.rmtree(old)

    def restore(self) -> dict[str, Any] | None:
        """Restores everything as it was at the last checkpoint.

        Returns:
            Its `state`, with "step"; None where there is no checkpoint.
        """
        checkpoints = self._all()
        if not checkpoints:
            return None
        self.accelerator.load_state(str(checkpoints[-1]))
        return json.loads((checkpoints[-1] / _STATE).read_text())

    def last_step(self) -> int:
        """Step of the last checkpoint, 0 where there is none."""
        checkpoints = self._all()
        return int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step_*") if path.suffix != ".part")
