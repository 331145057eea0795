"""Rows of samples. Every token of these files has an id of its own, so a row tells where each came from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmegatron.data.indexed import IndexedDataset, IndexedWriter
from fmegatron.data.samples import HeldOut, Row, Samples, permutation

PINNED = [[0, 2, 1, 5, 4, 3, 6, 7], [3, 5, 6, 1, 2, 7, 0, 4]]  # a change of these changes everybody's runs
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1)


@contextmanager
def numbered(lengths: list[int]) -> Iterator[tuple[IndexedDataset, list[int], list[int]]]:
    """A file whose tokens are 0, 1, 2, …; with it, each token's document and its place in that document."""
    with tempfile.TemporaryDirectory() as folder:
        bounds = np.cumsum([0, *lengths])
        with IndexedWriter(Path(folder, "x"), np.uint16) as out:
            out.add_documents(np.arange(first, stop) for first, stop in pairwise(bounds.tolist()))
        document = np.repeat(np.arange(len(lengths)), lengths).tolist()
        yield IndexedDataset(Path(folder, "x")), document, [n for length in lengths for n in range(length)]


def check_row(row: Row, document: list[int], place: list[int], reset: bool) -> None:
    """Labels follow tokens, in a document or into the next one's start; numbers and positions tell the documents."""
    count = int(row["weights"].sum())
    tokens, labels = row["tokens"][:count].tolist(), row["labels"][:count].tolist()
    assert tokens[1:] == labels[:-1] and (row["weights"] == (np.arange(len(row["weights"])) < count)).all()
    for token, label in zip(tokens, labels, strict=True):
        within = document[token] == document[label]
        assert label == token + 1 if within else place[label] == 0
    begins = [i for i in range(len(tokens)) if i and document[tokens[i]] != document[tokens[i - 1]]]
    for i in range(count):
        assert row["documents"][i] == sum(begin <= i for begin in begins)
        assert row["positions"][i] == i - (max([0, *(b for b in begins if b <= i)]) if reset else 0)
    assert not set(row["documents"][:count]) & set(row["documents"][count:])  # padding is nobody's neighbour


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(-5, 2**70), st.integers(0, 3), st.booleans())
def test_an_epoch_reads_every_token_once(lengths: list[int], seq: int, seed: int, epoch: int, reset: bool) -> None:
    total = sum(lengths)
    seq = min(seq, total - 1)
    with numbered(lengths) as (data, document, place):
        samples = Samples(data, seq, seed, reset_positions=reset, vocab_size=total)
        numbers = range(epoch * samples.per_epoch, (epoch + 1) * samples.per_epoch)
        rows = [samples.row(number) for number in numbers]
        read = [token for row in rows for token in row["tokens"].tolist()]
        assert len(set(read)) == len(read) and 1 <= total - len(read) <= seq
        for number, row in zip(numbers, rows, strict=True):
            assert row["weights"].all() and row["sample"] == number
            check_row(row, document, place, reset)
        for number, row in list(zip(numbers, rows, strict=True))[::-1]:  # at random, by another object
            other = Samples(data, seq, seed, reset_positions=reset).row(number)
            assert all((other[key] == row[key]).all() and other[key].dtype == row[key].dtype for key in row)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 4), st.none() | st.integers(1, 5), st.booleans())
def test_held_out_predicts_each_token_once(
    lengths: list[int], seq: int, batch: int, limit: int | None, reset: bool
) -> None:
    total = sum(lengths)
    sizes = np.arange(total) ** 2
    with numbered(lengths) as (data, document, place):
        held_out = HeldOut(data, seq, batch, token_bytes=sizes, limit=limit, reset_positions=reset, vocab_size=total)
        numbers = [number for some in held_out.numbers() for number in some]
        rows = [held_out.row(number) for number in numbers]
        assert len(numbers) == len(held_out) * batch and numbers == list(range(len(numbers)))
        assert len(held_out) == -(-held_out.rows // batch)
        predicted = [label for row in rows for label in row["labels"][row["weights"] > 0].tolist()]
        assert predicted == list(range(1, min(total, (limit or total) * seq + 1)))
        assert held_out.predicted == len(predicted) and held_out.bytes == sum(n * n for n in predicted)
        for row in rows:
            check_row(row, document, place, reset)
            assert not row["tokens"][row["weights"] == 0].any()


def test_orders_depend_on_seed_and_epoch_only_and_are_pinned() -> None:
    assert permutation(8, 0, 0).tolist() == PINNED[0] and permutation(8, 1, 5).tolist() == PINNED[1]
    orders = {tuple(permutation(50, seed, number)) for seed in range(5) for number in range(5)}
    assert permutation(9, 2**64 - 1, 0).tolist() != permutation(9, 2**64 - 2, 0).tolist()
    assert len(orders) == 25 and all(sorted(order) == list(range(50)) for order in orders)


def test_documents_and_rows_are_both_shuffled() -> None:
    with numbered([7] * 60) as (data, document, _):
        samples = Samples(data, 20, 0)
        rows = [samples.row(n) for n in range(2 * samples.per_epoch)]
        following = sum(int(a["labels"][-1] == b["tokens"][0]) for a, b in pairwise(rows))
        assert following < len(rows) / 2
        joined = [(document[a], document[b]) for row in rows for a, b in pairwise(row["labels"]) if b != a + 1]
        assert len(joined) > len(rows) and sum(b == a + 1 for a, b in joined) < len(joined) / 2
        cuts = [{int(row["tokens"][0]) for row in half} for half in (rows[:20], rows[samples.per_epoch :][:20])]
        assert cuts[0] != cuts[1]  # other documents side by side, so other cuts


def test_what_cannot_be_a_sample_is_refused() -> None:
    with numbered([3, 2]) as (data, _, _):
        with pytest.raises(ValueError, match=r"5 tokens give no row of seq 5; choose seq in 1\.\.4"):
            Samples(data, 5, 0)
        with pytest.raises(ValueError, match="must not be negative"):
            Samples(data, 2, 0).row(-1)
        with pytest.raises(ValueError, match=r"ids 0\.\.4 near token \d, but the vocabulary ends at 3"):
            Samples(data, 4, 0, vocab_size=4).row(0)
        with pytest.raises(ValueError, match="nothing to predict"):
            HeldOut(data, 2, 0)
        assert HeldOut(data, 2, 1).bytes is None
