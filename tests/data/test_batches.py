"""Batches: the same samples for every number of ranks, from any point of the run, with or without the thread."""

from __future__ import annotations

import itertools
import threading
import time
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmegatron.data.batches import NAMES, Batch, batch_at, batches, held_out_batches, rows_at
from fmegatron.data.indexed import IndexedDataset, IndexedWriter
from fmegatron.data.prefetch import prefetch
from fmegatron.data.samples import HeldOut, Samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix = tmp_path_factory.mktemp("corpus") / "x"
    with IndexedWriter(prefix, "<u2") as out:
        out.add_documents(list(range(n, n + 3 + n % 11)) for n in range(60))
    return IndexedDataset(prefix)


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() == NAMES.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_shapes_and_dtypes(data: IndexedDataset) -> None:
    batch = batch_at(Samples(data, 8, 0), 5, 4)
    for key, value in batch.items():
        assert value.shape == ((4, 8) if NAMES[key] == "batch seq" else (4,))
        assert value.dtype == (torch.float32 if key == "weights" else torch.int64)
    assert batch["sample"].tolist() == [5, 6, 7, 8]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 200), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 2), st.integers(0, 3))
def test_ranks_and_resumes_change_no_sample(
    data: IndexedDataset, consumed: int, ranks: int, ahead: int, skipped: int
) -> None:
    samples, share = Samples(data, 8, 3), 12 // ranks
    parts = [
        batches(Samples(data, 8, 3), 12, consumed, rows=range(r * share, (r + 1) * share), ahead=ahead)
        for r in range(ranks)
    ]
    for step in range(3):
        whole = batch_at(samples, consumed + 12 * step, 12)
        read = [next(part) for part in parts]
        assert equal(whole, {key: torch.cat([part[key] for part in read]) for key in NAMES})
        resumed = batch_at(Samples(data, 8, 3), consumed + skipped, 12 - skipped)
        assert step or equal(resumed, {key: value[skipped:] for key, value in whole.items()})
    for part in parts:
        part.close()


def test_held_out_batches_are_padded_rows(data: IndexedDataset) -> None:
    held_out = HeldOut(data, 16, 4)
    whole = list(held_out_batches(held_out))
    assert len(whole) == len(held_out) and {len(batch["tokens"]) for batch in whole} == {4}
    assert sum(int(batch["weights"].sum()) for batch in whole) == held_out.predicted == len(data.stream) - 1
    halves = zip(held_out_batches(held_out, rows=[0, 1]), held_out_batches(held_out, rows=[2, 3]), strict=True)
    for batch, (low, high) in zip(whole, halves, strict=True):
        assert equal(batch, {key: torch.cat([low[key], high[key]]) for key in NAMES})


def test_place_sees_every_tensor_with_its_names(data: IndexedDataset) -> None:
    seen = []

    def place(key: str, value: Tensor, names: str) -> Tensor:
        seen.append((key, names, threading.current_thread() is threading.main_thread()))
        return value[..., :2]

    batch = next(batches(Samples(data, 8, 0), 3, place=place))
    assert seen == [(key, names, True) for key, names in NAMES.items()]
    assert batch["tokens"].shape == (3, 2) and batch["sample"].shape == (2,)


def test_rows_in_any_order(data: IndexedDataset) -> None:
    samples = Samples(data, 8, 0)
    batch = rows_at(samples, [7, 0, 7])
    assert torch.equal(batch["tokens"][0], batch["tokens"][2]) and batch["sample"].tolist() == [7, 0, 7]
    with pytest.raises(ValueError, match="global_batch 0"):
        batches(samples, 0)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_prefetch_keeps_order_and_raises_where_the_error_was(ahead: int, threads: int) -> None:
    def make(n: int) -> int:
        time.sleep(0.002 * (n % 3 == 0))  # every third is slow
        if n == 5:
            raise KeyError("here")
        return n * n

    assert list(prefetch(make, range(5), ahead, threads)) == [n * n for n in range(5)]
    reader = prefetch(make, range(9), ahead, threads)
    assert list(islice(reader, 5)) == [n * n for n in range(5)]
    with pytest.raises(KeyError, match="here"):
        next(reader)
    assert not workers()


def test_prefetch_works_ahead_no_further_and_ends_when_closed(data: IndexedDataset) -> None:
    made = threading.Semaphore(0)
    count = []

    def make(n: int) -> int:
        count.append(n)
        made.release()
        return n

    reader = prefetch(make, itertools.count(), 2)
    assert next(reader) == 0
    for _ in range(3):  # one taken, two ready
        assert made.acquire(timeout=5)
    assert not made.acquire(timeout=0.05) and count == [0, 1, 2]
    reader.close()
    assert not workers()

    running = batches(Samples(data, 8, 0), 2)
    next(running)
    assert workers()
    running.close()
    assert not workers()
    lost = batches(Samples(data, 8, 0), 2)
    next(lost)
    del lost
    assert not workers()
