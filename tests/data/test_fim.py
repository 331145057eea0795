"""Fill in the middle: nothing is lost but what the row has no room for; rates; the same on any ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.data import tokenizers
from fmegatron.data.batches import batches
from fmegatron.data.fim import Fim
from fmegatron.data.indexed import IndexedDataset, IndexedWriter
from fmegatron.data.samples import Samples

PRE, MID, SUF, EOD = 301, 302, 303, 256


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix, draw = tmp_path_factory.mktemp("fim") / "x", np.random.default_rng(0)
    with IndexedWriter(prefix, "<u2") as out:
        for _ in range(80):
            text = "".join(chr(c) for c in draw.integers(97, 123, draw.integers(0, 30))) + "é" * int(draw.integers(0, 3))
            out.add_document([*text.encode(), EOD])
    return IndexedDataset(prefix)


def fim(data: IndexedDataset, seq: int = 64, **more) -> Fim:
    return Fim(Samples(data, seq, 3, reset_positions=True), 5, PRE, MID, SUF, EOD, **more)


def documents(text) -> list[list[int]]:
    """The documents of a row's text, without their ends."""
    ends = [0, *(np.flatnonzero(text == EOD) + 1), len(text)]
    return [[int(t) for t in text[a:b] if t != EOD] for a, b in zip(ends, ends[1:], strict=False)]


@given(st.integers(0, 40), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_every_document_comes_back(data, number, rate, spm, characters):
    made = fim(data, rate=rate, spm=spm, codec=tokenizers.Bytes() if characters else None)
    row = made.rows.row(number)
    text = np.append(row["tokens"], row["labels"][-1])
    new = made.transform(text, number)
    before, after = documents(text), documents(new)
    assert [i for i, t in enumerate(before) if t][:-1] == [i for i, t in enumerate(after) if t][:-1]
    assert [made.restore(body) for body in after] == before
    moved = [body for body in after if body and body[0] == PRE]
    assert rate or not moved
    assert rate < 1 or len(moved) == sum(bool(body) for body in before)
    for body in moved:
        assert (body[1] == SUF) == (spm == 1) or 0 < spm < 1 or body[1] == SUF  # an empty beginning looks like SPM
        assert [body.count(mark) for mark in (PRE, MID, SUF)] == [1, 1, 1]


@given(st.integers(0, 40), st.booleans())
def test_rows_keep_their_shape_and_their_labels(data, number, reset):
    made = fim(data, reset_positions=reset)
    row, old = made.row(number), made.rows.row(number)
    assert {key: (v.shape, v.dtype) for key, v in row.items()} == {key: (v.shape, v.dtype) for key, v in old.items()}
    assert (row["tokens"][1:] == row["labels"][:-1]).all() and row["weights"].all()
    ends = np.flatnonzero(row["tokens"] == EOD)
    assert (np.diff(row["documents"]).nonzero()[0] == ends[ends < 63]).all()
    for document in np.unique(row["documents"]):
        here = row["documents"] == document
        start = 0 if reset else np.flatnonzero(here)[0]
        assert (row["positions"][here] == start + np.arange(here.sum())).all()


def test_nothing_moves_at_rate_zero(data):
    made = fim(data, rate=0.0)
    for number in range(20):
        row, old = made.row(number), made.rows.row(number)
        assert all((row[key] == old[key]).all() for key in old)


def test_rates_are_kept_and_cuts_are_anywhere(data):
    made, moved, count, spm, cuts = fim(data, rate=0.3, spm=0.25), 0, 0, 0, []
    body = list(range(9))
    for sample in range(400):
        new = made.transform(np.array([*body, EOD, *body, EOD]), sample)
        for one in documents(new)[:2]:
            count += 1
            moved += one != body
            if one != body:
                spm += one[1] == SUF and one[2:3] != [0]
                middle = one[one.index(MID) + 1 :]
                cuts.append(len(middle))
    assert 0.25 < moved / count < 0.35 and 0.15 < spm / moved < 0.4 and set(cuts) == set(range(10))


def test_the_same_on_any_ranks_from_any_point(data):
    made = fim(data)
    whole = batches(made, 4, 8, ahead=0)
    parts = [batches(fim(data), 4, 8, rows=[r], workers=2) for r in range(4)]
    for step in range(3):
        batch = next(whole)
        read = [next(part) for part in parts]
        for key, value in batch.items():
            assert value.tolist() == [row for one in read for row in one[key].tolist()]
        assert next(batches(fim(data), 4, 8 + 4 * step, ahead=0))["tokens"].tolist() == batch["tokens"].tolist()
    for part in parts:
        part.close()


def test_a_rate_above_one():
    with pytest.raises(ValueError, match="rate 1.5"):
        Fim(None, 0, 1, 2, 3, 4, rate=1.5)  # type: ignore[arg-type]
