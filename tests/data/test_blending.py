"""The interleaving of blends against megatron-core's own compiled loop, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmegatron.data import blend_index

helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")

FLOATS = st.floats(1e-6, 1e3)
TIES = st.integers(1, 4).map(float)  # equal lags, of which the first wins
WEIGHTS = st.one_of(st.lists(FLOATS, min_size=1, max_size=12), st.lists(TIES, min_size=1, max_size=40))


def theirs(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    number, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(number, sample, weights, len(weights), size, False)
    return number, sample


@settings(max_examples=120)
@given(WEIGHTS, st.integers(0, 5000))
@example([1.0] * 300, 5000)
@example([1e-9, 0.5, 0.5], 100_000)
def test_equal_to_megatron(weights: list[float], size: int) -> None:
    normal = np.array(weights) / np.sum(weights)
    for given_weights in (weights, normal):
        for ours, oracle in zip(blend_index(given_weights, size), theirs(normal, size), strict=True):
            assert ours.dtype == oracle.dtype and np.array_equal(ours, oracle)


def test_many_runs_that_fall_into_step_late() -> None:
    weights = np.random.default_rng(0).pareto(0.3, 30) + 1e-6
    weights /= weights.sum()
    assert all(np.array_equal(*pair) for pair in zip(blend_index(weights, 60_000), theirs(weights, 60_000), strict=True))


@settings(max_examples=80)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=15))
@example([1, 4000, 1, 2, 4000])
def test_exhaustive_is_equal_to_megatron(sizes: list[int]) -> None:
    number, sample = np.zeros(sum(sizes), np.int16), np.zeros(sum(sizes), np.int64)
    helpers.build_exhaustive_blending_indices(number, sample, np.array(sizes), len(sizes))
    ours = blend_index(sizes)
    assert np.array_equal(ours[0], number) and np.array_equal(ours[1], sample)
    for i, size in enumerate(sizes):
        assert ours[1][ours[0] == i].tolist() == list(range(size))


def test_a_longer_blend_begins_like_a_shorter_one() -> None:
    long, short = blend_index([0.3, 0.7, 0.11], 3000), blend_index([0.3, 0.7, 0.11], 700)
    assert all(np.array_equal(a[:700], b) for a, b in zip(long, short, strict=True))


@pytest.mark.parametrize(
    ("weights", "size", "message"),
    [
        ([0.5, 0.0], 5, "weight 1 of the blend is 0.0: weights are above 0; leave out"),
        ([-1.0], 5, "weight 0 of the blend is -1.0"),
        ([float("nan"), 1], 5, "weight 0 of the blend is nan"),
        ([], 5, "a blend has 1 to 32766 weights"),
        (np.ones(32767), 5, "a blend has 1 to 32766 weights"),
        ([0.5, 0.5], None, "without a size they are the sizes"),
        ([1.0], -1, "size -1 of a blend"),
    ],
)
def test_mistakes(weights: list[float], size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend_index(weights, size)
