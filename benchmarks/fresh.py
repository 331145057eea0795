"""A benchmark in a process of its own, and another where that one dies: what breaks CUDA breaks it for its whole process.

`Notes` are a file on which the process says what it begins and which rows it has measured. After a death its parent, which
never touches the device, starts it again; the new one leaves out the measured rows, and the participant that ran last.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

BROKEN = 3  # exit code of a process whose device is of no use


@dataclass(frozen=True)
class Notes:
    """Lines of words apart by tabs: begin ROW WHO, done ROW, died. path None: nothing is noted, nothing has happened."""

    path: Path | None = None

    def add(self, *words: str) -> None:
        """One more line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\t".join(words) + "\n")

    @property
    def lines(self) -> list[list[str]]:
        """All of them, as words."""
        return [] if self.path is None else [line.split("\t") for line in self.path.read_text(encoding="utf-8").splitlines()]

    @property
    def done(self) -> set[str]:
        """Rows that were measured."""
        return {words[1] for words in self.lines if words[0] == "done"}

    @property
    def fatal(self) -> set[tuple[str, str]]:
        """(row, who) that ran when a process died."""
        lines = self.lines
        return {(a[1], a[2]) for a, b in zip(lines, lines[1:], strict=False) if (a[0], b[0]) == ("begin", "died")}


def watched(script: str, words: Sequence[str], left: Callable[[], float]) -> int:
    """Run `script words --notes FILE` until it ends well, time is over, or it dies before it begins anything; its exit code."""
    with TemporaryDirectory() as folder:
        notes = Notes(Path(folder) / "notes")
        notes.add("notes")
        while True:
            code = subprocess.run([sys.executable, script, *words, "--notes", str(notes.path)]).returncode
            if code == 0 or notes.lines[-1][0] != "begin" or left() < 20:
                return code
            _, row, who = notes.lines[-1]
            print(f"\n{who} of {row} ended the process ({code}): a fresh one goes on without it\n", flush=True)
            notes.add("died")


def broken(device: str) -> bool:
    """Whether the device fails whatever is asked of it: after an illegal access it does, until the process ends."""
    if device != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def end() -> None:
    """Leave at once: destructors would ask the broken device."""
    sys.stdout.flush()
    os._exit(BROKEN)
