"""Work done ahead by background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def prefetch(
    make: Callable[[A], B], items: Iterable[A], ahead: int, workers: int = 1, then: Callable[[B], B] = lambda made: made
) -> Generator[B, None, None]:
    """`then(make(item))` of each item in order, up to `ahead` of them made in advance by `workers` threads; `ahead` 0: none.

    `then` runs in the caller's thread, before a worker is woken: beside Python that works, it would wait for the interpreter.
    `items` is read in the caller's thread, as far ahead as that. An error is raised where its value would have come.
    Closing the generator, or leaving it to be collected, ends the threads.
    """
    if ahead == 0:
        yield from (then(make(item)) for item in items)
        return
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                if len(waiting) < ahead:
                    waiting.append(pool.submit(make, item))
                    continue
                value = then(waiting.popleft().result())
                waiting.append(pool.submit(make, item))
                yield value
            while waiting:
                yield then(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()
