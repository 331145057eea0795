"""Work done ahead by background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def prefetch(make: Callable[[A], B], items: Iterable[A], ahead: int, workers: int = 1) -> Generator[B, None, None]:
    """`make(item)` of each item in order, up to `ahead` of them made in advance by `workers` threads; `ahead` 0: none.

    `items` is read in the caller's thread, as far ahead as that. An error is raised where its value would have come.
    Closing the generator, or leaving it to be collected, ends the threads.
    """
    if ahead == 0:
        yield from (make(item) for item in items)
        return
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
