"""torch.profiler's traces of a run's steps, one file a step, when a run asks for them; nothing is recorded elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from fmegatron.config.monitors import Profile
from fmegatron.sharding import Mesh


class Traces:
    """`begin(step)` before each step: those from the first to the last that are asked for become FOLDER/rank-R.step-N.json."""

    def __init__(self, c: Profile, folder: Path, mesh: Mesh) -> None:
        self.c, self.folder, self.rank = c, folder, mesh.rank or 0
        ranks = mesh.size if mesh.rank is not None else 1
        if c.steps and (far := [rank for rank in c.ranks if not 0 <= rank < ranks]):
            raise ValueError(f"profile.ranks = {list(c.ranks)}: there is no {far[0]}, processes are 0 to {ranks - 1}")
        self.cuda = torch.device(mesh.device).type == "cuda"
        self.wanted = range(c.steps[0], c.steps[1] + 1) if c.steps and self.rank in c.ranks else range(0)
        self.open: tuple[int, Any] | None = None

    def begin(self, step: int) -> None:
        """Step number `step` begins, and the one before is over."""
        self.end()
        if step in self.wanted:
            kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if self.cuda else [])]
            tracer = torch.profiler.profile(
                activities=kinds, record_shapes=self.c.shapes, with_stack=self.c.stack, profile_memory=self.c.memory
            )
            tracer.start()
            self.open = (step, tracer)

    def end(self) -> None:
        """Write the trace of the step that is over."""
        if self.open is not None:
            (step, tracer), self.open = self.open, None
            tracer.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            tracer.export_chrome_trace(str(self.folder / f"rank-{self.rank}.step-{step:08d}.json"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
