"""When a run ends before its last step, cleanly: a signal, its time, a step, or a file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fmegatron.train.signals import Stop


@dataclass(frozen=True)
class Ends:
    """minutes: of this process (0: any). interval: a step that it divides is the last one (0: none). file: stops it."""

    file: Path
    minutes: float = 0.0
    interval: int = 0
    start: int = 0  # step at which this process began
    began: float = 0.0  # on the monotonic clock

    def why(self, signal: Stop, done: int) -> str | None:
        """Why to stop after `done` steps, as this process sees it; None: go on."""
        if signal.requested:
            return signal.reason
        if self.minutes and time.monotonic() - self.began >= 60 * self.minutes:
            return f"run.minutes = {self.minutes:g}"
        if self.interval and done > self.start and done % self.interval == 0:
            return f"run.exit_interval = {self.interval}"
        if self.file.exists():
            return f"the file {self.file}"
        return None
