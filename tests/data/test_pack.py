"""Pack indices: nothing lost, nothing cut, first fit by its plain definition; steps found at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.data.batches import batches
from fmegatron.data.pack import Packed, Steps, by_length, cached, first_fit, lay, one_each
from fmegatron.data.samples import permutation


class Numbered:
    """Example i of n places: tokens 100 i, 100 i + 1, …; every second label is learned."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int64)

    def __getitem__(self, index: int):
        tokens = 100 * index + np.arange(self.lengths[index] + 1)
        return tokens, tokens % 2


lists = st.lists(st.integers(1, 16), min_size=1, max_size=40)


def plain_first_fit(lengths: list[int], order: list[int], seq: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for i in order:
        for row in rows:
            if sum(lengths[j] for j in row) + lengths[i] <= seq:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


@given(lists, st.integers(16, 40), st.integers(0, 3))
def test_first_fit_is_the_first_row_that_fits(lengths, seq, seed):
    starts, items = first_fit(np.array(lengths), seq, seed)
    rows = [items[first:stop].tolist() for first, stop in zip(starts, starts[1:], strict=False)]
    assert rows == plain_first_fit(lengths, permutation(len(lengths), seed, 0).tolist(), seq)


@given(lists, st.integers(16, 40), st.booleans())
def test_rows_hold_whole_examples_that_do_not_see_each_other(lengths, seq, pack):
    examples = Numbered(lengths)
    index = first_fit(examples.lengths, seq, 1) if pack else one_each(examples.lengths, seq)
    packed, seen = Packed(examples, index, seq), []
    for number in range(len(packed)):
        row = packed.row(number)
        assert all(value.shape == (seq,) for key, value in row.items() if key != "sample")
        for document in np.unique(row["documents"]):
            here = row["documents"] == document
            assert row["positions"][here].tolist() == list(range(here.sum()))
            if document == packed.index.starts[number + 1] - packed.index.starts[number]:
                assert not row["weights"][here].any() and here[-1]  # padding is the last document
                continue
            tokens, labels = row["tokens"][here], row["labels"][here]
            seen.append(int(tokens[0]) // 100)
            assert tokens.tolist() == list(range(100 * seen[-1], 100 * seen[-1] + lengths[seen[-1]]))
            assert (labels == tokens + 1).all() and (row["weights"][here] == labels % 2).all()
    assert sorted(seen) == list(range(len(lengths)))
    beyond = packed.row(len(packed))
    assert not beyond["weights"].any() and not beyond["documents"].any()


def test_too_long_is_refused_with_the_numbers():
    for build in (lambda n: first_fit(n, 8, 0), lambda n: one_each(n, 8)):
        with pytest.raises(ValueError, match="2 of 4 examples are longer than a row of 8, the first is example 1 of 9.* 12"):
            build(np.array([3, 9, 8, 12]))
    with pytest.raises(ValueError, match="budget of 20 tokens: the longest example takes 16 .* 2 rows of it, so .* 32"):
        by_length(np.array([3, 9]), 20, 0, rows=2)


@given(lists, st.sampled_from([1, 2, 3]), st.integers(1, 8), st.integers(0, 3))
def test_steps_keep_their_budget_and_are_found_at_random(lengths, rows, multiple, seed):
    budget, examples = 32 * rows, Numbered(lengths)
    index = by_length(examples.lengths, budget, seed, rows=rows, multiple=multiple)
    steps = Steps(examples, index, seed)
    total = len(index.items)
    for epoch in range(2):
        consumed, seen = epoch * total, []
        while consumed < (epoch + 1) * total:
            step = Steps(examples, index, seed).step(consumed)  # anew: nothing is remembered
            made = [steps.row(number) for number in step]
            length = len(made[0]["tokens"])
            assert len(step) % rows == 0 and len(step) * length <= budget and length % multiple == 0
            assert {len(row["tokens"]) for row in made} == {length}
            assert [int(row["sample"]) for row in made] == list(step)
            seen += [int(row["tokens"][0]) // 100 for row in made if row["labels"].any()]
            consumed = step.stop
        assert consumed == (epoch + 1) * total and sorted(seen) == list(range(len(lengths)))
    if len(steps.step(0)) > 1:
        with pytest.raises(ValueError, match="1 samples end within a step, the last one began at 0"):
            steps.step(1)


def test_batches_of_unequal_steps_are_the_same_for_any_number_of_ranks():
    examples = Numbered([int(n) for n in np.random.default_rng(0).integers(1, 17, 50)])
    steps = Steps(examples, by_length(examples.lengths, 128, 0, rows=4), 0)
    whole = batches(steps)
    parts = [batches(steps, rows=lambda n, r=r: range(r * n // 4, (r + 1) * n // 4), workers=2) for r in range(4)]
    consumed = 0
    for _ in range(2 * len(steps.index.lengths)):
        batch, read = next(whole), [next(part) for part in parts]
        assert batch["sample"].tolist() == [n for part in read for n in part["sample"].tolist()]
        assert batch["tokens"].tolist() == [row for part in read for row in part["tokens"].tolist()]
        resumed = batches(steps, consumed=consumed, ahead=0)
        assert next(resumed)["tokens"].tolist() == batch["tokens"].tolist()
        consumed += len(batch["sample"])
    for feed in [whole, *parts]:
        feed.close()


def test_lay_keeps_running_positions_when_asked():
    pieces = [(np.array([1, 2, 3]), np.ones(3)), (np.array([4, 5]), np.ones(2))]
    row = lay(pieces, 5, reset_positions=False)
    assert row["positions"].tolist() == [0, 1, 2, 3, 4] and row["documents"].tolist() == [0, 0, 1, 2, 2]
    assert row["tokens"].tolist() == [1, 2, 4, 0, 0] and row["labels"].tolist() == [2, 3, 5, 0, 0]


def test_cached_arrays_are_made_once_whole_or_not_at_all(tmp_path: Path):
    made = []

    def build():
        made.append(1)
        return {"starts": np.arange(3), "items": np.arange(5)}

    for _ in range(2):
        arrays = cached(tmp_path, "key", build)
        assert arrays["starts"].tolist() == [0, 1, 2] and arrays["items"].tolist() == [0, 1, 2, 3, 4]
    assert made == [1] and isinstance(arrays["items"], np.memmap)

    def fails():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached(tmp_path, "other", fails)

    def slower():
        cached(tmp_path, "race", lambda: {"x": np.array([1])})
        return {"x": np.array([2])}

    assert cached(tmp_path, "race", slower)["x"].tolist() == [1]  # the faster process is taken
    assert len(list(tmp_path.iterdir())) == 2  # no scratch folder is left
