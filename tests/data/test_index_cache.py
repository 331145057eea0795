"""Index arrays on disk: drawn once by ranks that start together, never read half written, never taken for other ones."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmegatron.data.index_cache import cached


def rank(folder: Path, number: int, start: Any, queue: Any) -> None:
    def build() -> Any:
        (folder / f"built-{number}").touch()
        return np.arange(200_000), np.full(3, 7)

    start.wait()
    arrays = cached(folder / "cache", "x", {"seed": 1}, ("a", "b"), build)
    queue.put(int(arrays[0].sum() + arrays[1].sum()))


@pytest.mark.parametrize("locks", [True, False])
def test_many_ranks_start_together(tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With locks one of them draws; without, any number, and all read whole arrays."""
    if not locks:
        import fcntl

        def none(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(fcntl, "flock", none)
    context = multiprocessing.get_context("fork")
    start, queue = context.Barrier(6), context.Queue()
    ranks = [context.Process(target=rank, args=(tmp_path, i, start, queue)) for i in range(6)]
    for process in ranks:
        process.start()
    sums = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    assert set(sums) == {200_000 * 199_999 // 2 + 21}
    built = len(list(tmp_path.glob("built-*")))
    assert built == 1 if locks else 1 <= built <= 6
    assert not list((tmp_path / "cache").glob(".*"))


def test_another_description_is_another_entry_and_damage_is_mended(tmp_path: Path) -> None:
    def get(value: int) -> int:
        return int(cached(tmp_path, "x", {"value": value}, ("a",), lambda: (np.array([value]),))[0][0])

    assert [get(1), get(2), get(1)] == [1, 2, 1] and len(list(tmp_path.glob("*.npy"))) == 2
    for path in tmp_path.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:50])
    assert [get(1), get(2)] == [1, 2]
    for path in tmp_path.glob("*description.txt"):
        path.write_text(json.dumps({"value": 3}))
    assert [get(1), get(2)] == [1, 2]


def test_a_full_disk_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: the indices need room here.*a.npy"):
        cached(tmp_path, "x", {}, ("a",), lambda: (np.arange(9),))
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*"))
