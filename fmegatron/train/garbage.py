"""When Python looks for objects that refer to each other in circles: at chosen steps, on all ranks at once.

    with collecting(every=50) as collect:
        for step in range(1, steps + 1):
            ...
            collect(step)

By itself Python looks when it has made so many objects: each rank at a moment of its own, for which the others wait in the next
collective; and most of what it looks at while graphs are compiled stays. A step leaves no circles, so little is lost meanwhile.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

YOUNG = 1  # generation: what was made since the last time; all that a process holds takes up to a second


@contextmanager
def paused() -> Iterator[None]:
    """Inside, Python does not collect by itself; afterwards it does if it did before."""
    automatic = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if automatic:
            gc.enable()


@contextmanager
def collecting(every: int) -> Iterator[Callable[[int], None]]:
    """A function to call after each step, by the step's number: it collects after the first (which compiles) and where `every`
    divides. Python's own collection is paused meanwhile. 0: Python collects when it likes."""
    if not every:
        yield lambda step: None
        return
    fresh = True

    def collect(step: int) -> None:
        nonlocal fresh
        if fresh or step % every == 0:
            gc.collect(YOUNG)
        fresh = False

    with paused():
        yield collect
