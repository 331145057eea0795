"""Ctrl-C and SIGTERM ask a run to stop between steps, so that it saves and leaves cleanly.

with stop_on_signals() as stop:
    for batch in batches:
        state, metrics = step(state, batch)
        if any_rank(stop.requested):
            break
save(...)
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist


class Stop:
    """A request to stop: `requested` turns True and `reason` says why, "SIGINT" or "SIGTERM"."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None


@contextmanager
def stop_on_signals(*, grace: float | None = None) -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request that is read between steps; put the old handlers back at the end.

    A second Ctrl-C ends the process at once, also inside a collective that hangs: the system does it, not Python. Under
    torchrun one press of Ctrl-C arrives twice, from the terminal and from torchrun, so there the second counts only
    `grace` seconds (default 1) after the first. Outside the main thread no handler can be set and nothing is requested.
    """
    stop = Stop()
    if grace is None:
        grace = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    pressed: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if stop.reason is None:
            stop.reason = signal.Signals(number).name
            # not print: a handler may run inside another write to the same buffer
            os.write(2, f"\n{stop.reason}: stopping after this step; Ctrl-C again to exit at once\n".encode())
        if number == signal.SIGINT:
            now = time.monotonic()
            if pressed is None:
                pressed = now
                if grace == 0:
                    signal.signal(signal.SIGINT, signal.SIG_DFL)
            elif now - pressed > grace:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(flag: bool, *, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None) -> bool:
    """Whether the flag is set on any rank: a signal reaches ranks at different steps, and all must stop at the same."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return bool(votes.item())
