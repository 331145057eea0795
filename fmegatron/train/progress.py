"""What a person sees while a run trains: a bar in a terminal, a line every few steps anywhere else.

    with progress(steps=2000, start=0, every=10) as show:
        for ...:
            show.update(record)                  # metrics.Record; held-out numbers stay on show until the next ones
            show.note("saved run/checkpoints/step-00000100")

Both are also `metrics.Writer`s, so a trainer may treat them as one more place where records go.
"""

from __future__ import annotations

import resource
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fmegatron.train.metrics import Clean, Record, clean, describe, step_line


def progress(steps: int, *, start: int = 0, every: int = 10, console: Console | None = None) -> Bar | Lines:
    """A bar where the console (default: stdout) is a terminal, else lines: each `every` steps, and held-out ones."""
    console = console or Console()
    return Bar(console, steps, start) if console.is_terminal else Lines(console, steps, every)


class Lines:
    """Plain logs: one `step_line` at a time, never rewritten."""

    def __init__(self, console: Console, steps: int, every: int) -> None:
        self._console, self._steps, self._every = console, steps, every

    def update(self, record: Record) -> None:
        step = int(record["step"])
        if step % self._every == 0 or step == self._steps or "heldout_loss" in record or "bits_per_byte" in record:
            self.note(step_line(record, self._steps))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    write = update

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Bar:
    """Two rows that are redrawn: how far and how long; below, the last step's numbers and the last held-out ones."""

    _ROW = ("loss", "tokens_per_second", "tflops", "mfu", "memory_bytes", "skipped", "heldout_loss", "bits_per_byte")

    def __init__(self, console: Console, steps: int, start: int) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=start)
        self._values: Clean = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=False)

    def _render(self) -> RenderableType:
        hidden = "heldout_loss" if self._values.get("bits_per_byte") else ""
        parts = [text for name in self._ROW if name != hidden and (text := describe(name, self._values))]
        return Group(self._bar, Text("  ".join(parts), overflow="ellipsis", no_wrap=True))

    def update(self, record: Record) -> None:
        self._values |= clean(record)
        self._bar.update(self._task, completed=int(record["step"]))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    write = update

    def close(self) -> None:
        self._live.stop()

    def __enter__(self) -> Self:
        self._live.start()
        self._console.show_cursor(True)  # a second Ctrl-C ends the process without a chance to show it again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def memory_bytes(device: torch.device | str) -> int:
    """What `memory_bytes` of a record says: resident memory of this process on CPU, peak allocation on a GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    pages = Path("/proc/self/statm")  # psutil reads five files to make a Process, a millisecond in every step
    if pages.is_file():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return int(psutil.Process().memory_info().rss)
