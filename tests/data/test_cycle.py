"""Rows without end, rows left out, rows once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.data.batches import batches, held_out_batches
from fmegatron.data.cycle import Cycle, InOrder, Skip


class Numbers:
    """Row n says n; as long as asked, then padding."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def row(self, number: int):
        tokens = np.full(2, number if number < self.count else -1)
        return {"tokens": tokens, "sample": np.array(number)}


def read(rows, numbers) -> list[int]:
    return [int(rows.row(n)["tokens"][0]) for n in numbers]


@given(st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_each_epoch_has_each_row_once(count, seed, shuffle):
    cycle = Cycle(Numbers(count), seed, shuffle=shuffle, epochs=3)
    every = read(cycle, range(3 * count))
    for epoch in range(3):
        assert sorted(every[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert shuffle or every == 3 * list(range(count))
    backwards = range(3 * count - 1, -1, -1)
    assert read(Cycle(Numbers(count), seed, shuffle=shuffle), backwards) == every[::-1]  # any order, from nothing
    assert int(cycle.row(count)["sample"]) == count
    for wrong in (-1, 3 * count):
        with pytest.raises(ValueError, match=f"sample number {wrong}: they go from 0 to {3 * count - 1}"):
            cycle.row(wrong)


def test_epochs_differ():
    cycle = Cycle(Numbers(50), 0)
    assert read(cycle, range(50)) != read(cycle, range(50, 100))
    assert read(cycle, range(50)) != read(Cycle(Numbers(50), 1), range(50))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=5))
def test_skip_leaves_out_what_it_says_and_nothing_else(pairs):
    ranges = [(first, first + count) for first, count in pairs]
    gone = {n for first, stop in ranges for n in range(first, stop)}
    kept = [n for n in range(200) if n not in gone]
    skip = Skip(Cycle(Numbers(1000), 0, shuffle=False), ranges)
    assert read(skip, range(len(kept))) == kept
    assert [int(skip.row(i)["sample"]) for i in range(len(kept))] == kept


@given(st.integers(0, 40), st.integers(1, 20))
def test_skipping_what_is_ahead_changes_nothing_behind(consumed, more):
    before = Skip(Cycle(Numbers(1000), 0), [(3, 5)])
    first = before.number(consumed)
    after = Skip(before.rows, [(3, 5), (first, first + more)])
    assert read(after, range(consumed)) == read(before, range(consumed))
    assert not set(read(after, range(consumed, consumed + 100))) & set(read(before.rows, range(first, first + more)))


@given(st.integers(1, 20), st.integers(1, 6), st.none() | st.integers(1, 30))
def test_in_order_covers_every_row_once_and_pads(count, batch, limit):
    rows = InOrder(Numbers(count), batch, limit)
    made = list(held_out_batches(rows, ahead=0))
    assert len(made) == len(rows) and {len(b["tokens"]) for b in made} == {batch}
    flat = [int(n) for b in made for n in b["tokens"][:, 0]]
    expected = min(count, limit or count)
    assert flat == list(range(expected)) + [-1] * (len(flat) - expected)
    assert [int(n) for b in made for n in b["sample"]] == list(range(len(flat)))


def test_what_cannot_be():
    for make, message in [
        (lambda: Cycle(Numbers(0), 0), "no rows"),
        (lambda: InOrder(Numbers(0), 1), "0 rows in batches of 1"),
        (lambda: Skip(Numbers(3), [(5, 5)]), "skip 5:5"),
        (lambda: batches(Cycle(Numbers(3), 0)), "Cycle has no steps of its own"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
