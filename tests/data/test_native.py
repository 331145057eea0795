"""The compiled loops and their numpy forms fill the same arrays; without a compiler the numpy forms stand in."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmegatron.data import blend_index, blending, gpt_indices, native

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 1)


@pytest.fixture(scope="module")
def loops() -> native.Loops:
    found = native.loops()
    assert found is not None, "the tests need a C++ compiler"
    return found


@settings(max_examples=200)
@given(SIZES, st.integers(1, 50), st.integers(0, 1), st.integers(0, 3), st.sampled_from([np.int32, np.int64]), st.data())
def test_sample_index(
    loops: native.Loops, sizes: list[int], seq: int, extra: int, more: int, dtype: type, data: st.DataObject
) -> None:
    lengths = np.array(sizes, np.int32)
    order = np.array(data.draw(st.permutations(range(len(sizes)))) * (1 + more), np.int32)
    tokens = int(lengths[order].sum()) - extra
    rows = tokens // seq + data.draw(st.integers(0, 1)) * (tokens % seq > 0)  # a last sample that is not full
    mine, other = np.zeros((rows + 1, 2), dtype), np.zeros((rows + 1, 2), dtype)
    loops.sample_index(lengths, order, seq, extra, mine)
    gpt_indices._by_blocks(lengths, order, seq, extra, other)
    assert np.array_equal(mine, other)


FLOATS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12)
WEIGHTS = st.one_of(FLOATS, st.lists(st.integers(1, 4), min_size=1, max_size=40))


@settings(max_examples=200)
@given(WEIGHTS, st.integers(0, 3000), st.booleans())
@example([1] * 300, 5000, False)
def test_blend(loops: native.Loops, weights: list[float], size: int, limited: bool) -> None:
    limits = np.ceil(np.array(weights, np.float64)).astype(np.int64) if limited else None
    shares = np.array(weights, np.float64) / np.sum(weights)
    if limits is not None:
        size, shares = int(limits.sum()), limits / float(limits.sum())
    mine, other = [(np.zeros(size, np.int16), np.zeros(size, np.int64)) for _ in range(2)]
    loops.blend(shares, limits, *mine)
    blending._by_runs(shares, limits, *other)
    assert all(map(np.array_equal, mine, other))


def test_large_indices_are_made_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(native.Loops, "blend", lambda *given: calls.append("blend"))
    monkeypatch.setattr(native.Loops, "sample_index", lambda *given: calls.append("index"))
    blend_index([1, 2], blending.SMALL + 1)
    gpt_indices.gpt_index(np.full(gpt_indices.BLOCK, 3), None, 2, 0)
    assert calls == ["blend", "index"]


@pytest.mark.parametrize("missing", ["compiler", "folder"])
def test_without_it(missing: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = blend_index([0.3, 0.7], 20_000)
    if missing == "compiler":
        monkeypatch.setenv("PATH", os.devnull)
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        tmp_path.joinpath("fmegatron").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.loops() is None
    assert all(map(np.array_equal, blend_index([0.3, 0.7], 20_000), expected))
