"""Work done ahead by one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], ahead: int) -> Generator[T, None, None]:
    """The same items, up to `ahead` of them made in advance; `ahead` 0 is no thread.

    An error is raised where its item would have come. Closing the generator, or leaving it to be collected, ends the
    thread.
    """
    if ahead == 0:
        yield from items
        return
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                ready.put(("item", item))
                if stopped.is_set():
                    return
            ready.put(("end", None))
        except BaseException as error:  # whatever it is, it belongs to the reader
            ready.put(("error", error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        while thread.is_alive():  # the thread may wait to put one last thing
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                pass
        thread.join()
