"""The sample index against megatron-core: its GPTDataset, and its compiled helper on shapes that a data set rarely has."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmegatron.data import gpt_index

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    datasets = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.utils import Split

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 1)


def theirs(lengths: list[int], documents: list[int], seq: int, seed: int, samples: int | None, extra: bool, drop: bool) -> Any:
    """(document, sample, shuffle) of a GPTDataset that has only what the index needs."""
    config = SimpleNamespace(
        defer_npy_index_mmap=False, path_to_cache=None, mock=True, sequence_length=seq, random_seed=seed,
        drop_last_partial_validation_sequence=drop, add_extra_token_to_sequence=extra,
    )  # fmt: skip
    own = object.__new__(datasets.GPTDataset)
    own.config, own.num_samples, own.index_split = config, samples, Split.train if drop else Split.valid
    own.indices, own.dataset = np.array(documents, np.int32), SimpleNamespace(sequence_lengths=np.array(lengths, np.int32))
    return own._build_document_sample_shuffle_indices()


def check(ours: Any, oracle: Any) -> None:
    for mine, other in zip(ours, oracle, strict=True):
        assert mine.dtype == other.dtype and np.array_equal(mine, other)


@settings(max_examples=250)
@given(LENGTHS, st.integers(1, 50), st.integers(0, 2**32 - 1), st.integers(1, 200), st.booleans(), st.data())
def test_equal_to_megatron(
    lengths: list[int], seq: int, seed: int, samples: int, extra: bool, data: st.DataObject
) -> None:
    some = st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True)
    documents = data.draw(some.filter(lambda chosen: sum(lengths[i] for i in chosen) > 1))
    check(gpt_index(lengths, documents, seq, seed, samples=samples, extra_token=extra),
          theirs(lengths, documents, seq, seed, samples, extra, True))  # fmt: skip
    tokens = sum(lengths[i] for i in documents)
    if tokens >= seq + extra:
        check(gpt_index(lengths, documents, seq, seed, extra_token=extra),
              theirs(lengths, documents, seq, seed, None, extra, True))  # fmt: skip


@pytest.mark.parametrize("samples", [176, 177, 178, 179, 180])
def test_the_last_epoch_is_apart_up_to_80_percent_of_it(samples: int) -> None:
    """An epoch of 99 samples, and from 77 to 81 of the second one."""
    given = [10] * 200, list(range(200)), 20, 5
    check(gpt_index(*given, samples=samples), theirs(*given, samples, True, True))


@settings(max_examples=100)
@given(LENGTHS.filter(lambda lengths: min(lengths) > 0), st.integers(1, 50), st.integers(0, 9), st.booleans())
def test_a_last_sample_that_is_not_full(lengths: list[int], seq: int, seed: int, extra: bool) -> None:
    documents = list(range(len(lengths)))
    ours = gpt_index(lengths, None, seq, seed, epochs=1, extra_token=extra, drop_last=False)
    check(ours, theirs(lengths, documents, seq, seed, None, extra, False))


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 50), st.integers(0, 9), st.integers(1, 6))
def test_whole_epochs(lengths: list[int], seq: int, seed: int, epochs: int) -> None:
    """Asked for every sample that e epochs hold, Megatron takes e epochs and shuffles them as one."""
    samples = (epochs * sum(lengths) - 1) // seq
    ours = gpt_index(lengths, None, seq, seed, epochs=epochs)
    assert len(ours.document) == epochs * len(lengths) and len(ours.shuffle) == samples
    if samples and (epochs == 1 or samples * seq >= (epochs - 1) * sum(lengths)):
        check(ours, gpt_index(lengths, None, seq, seed, samples=samples))


@pytest.mark.parametrize("seq", [1, 7, 64, 5000])
def test_many_blocks_of_documents(seq: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 60, 100_000).astype(np.int32)
    ours = gpt_index(lengths, None, seq, 5)
    oracle = helpers.build_sample_idx(lengths, ours.document, seq, 1, int(lengths.sum()), True, True)
    assert np.array_equal(ours.sample, oracle)


def test_what_a_seed_gives_is_pinned() -> None:
    ours = gpt_index([3, 0, 9, 4], [0, 1, 2, 3], 4, 1234, samples=9)
    assert ours.document.tolist() == [3, 0, 3, 2, 1, 2, 1, 0, 0, 1, 2, 3]
    assert ours.sample[:, 0].tolist() == [0, 1, 2, 3, 3, 5, 5, 5, 8, 10, 10, 11]
    assert ours.sample[:, 1].tolist() == [0, 0, 1, 1, 5, 0, 4, 8, 0, 1, 5, 0]
    assert ours.shuffle.tolist() == [3, 9, 2, 1, 7, 5, 4, 0, 8, 6, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0], [0, 1], 4, 0), "2 documents without a token"),
        (([], [], 4, 0), "at least one number"),
        (([3, -1], [0], 4, 0), "lengths -1..3: a document has 0 to 2147483647 tokens"),
        (([3, 2**31], [0], 4, 0), "lengths 3..2147483648"),
        (([3, 3], [2], 4, 0), r"documents 2..2: there are lengths for 0..1"),
        (([3], [0], 0, 0), "seq_length 0"),
        (([3], [0], 2, 0, 1, 1), "epochs 1 and samples 1: give one of the two"),
        (([3], [0], 2, 0, None, 0), "samples 0: at least 1"),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt_index(*arguments)
