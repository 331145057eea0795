"""Shuffles, partitions and draws beside mosaicml-streaming's own, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fmegatron.data.mds.partition import partition, traversal
from fmegatron.data.mds.sampling import of_shards
from fmegatron.data.mds.shuffle import ALGORITHMS, shuffle

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.sampled_from(sorted(ALGORITHMS)), SIZES, st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 5), st.data())
def test_shuffles_are_mosaics(
    mosaic: Any, algo: str, sizes: list[int], nodes: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    block = data.draw(st.integers(2, 300))
    assume(nodes <= sum(sizes))
    ours = shuffle(algo, np.array(sizes), nodes, seed, epoch, block)
    assert ours.tolist() == mosaic.shuffle(algo, np.array(sizes), nodes, seed, epoch, block).tolist()
    assert sorted(ours.tolist()) == list(range(sum(sizes)))


@QUICK
@given(
    st.sampled_from(["orig", "relaxed"]),
    st.tuples(
        *(st.integers(1, most) for most in (200, 12, 12, 4, 3, 5)), st.integers(0, 120), st.sampled_from([None, 1, 2, 3, 4, 6])
    ),
)
def test_partitions_are_mosaics(mosaic: Any, algo: str, args: tuple[Any, ...]) -> None:
    try:
        ours = partition(algo, *args)
    except ValueError:
        with pytest.raises(RuntimeError):
            mosaic.partition(algo, *args)
        return
    theirs = mosaic.partition(algo, *args)
    assert ours.shape == theirs.shape and (ours == theirs).all()


@QUICK
@given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_every_machine_count_sees_the_same_global_batches(
    samples: int, nodes: int, machines: int, ranks: int, workers: int, batch: int
) -> None:
    """Global batch k of any arrangement is positions k * B to (k + 1) * B of the one traversal."""
    assume(nodes % machines == 0 and nodes <= samples)
    order, whole = traversal(samples, nodes), machines * ranks * batch
    parts = partition("orig", samples, nodes, machines, ranks, workers, batch).transpose(3, 2, 0, 1, 4).reshape(-1, whole)
    for step in range(len(order) // whole):
        assert sorted(parts[step].tolist()) == sorted(order[step * whole : (step + 1) * whole].tolist())


@QUICK
@given(SIZES, st.integers(0, 500), st.integers(1, 7), st.integers(0, 99), st.integers(0, 3), st.booleans())
def test_draws_are_mosaics(
    mosaic: Any, sizes: list[int], count: int, granularity: int, seed: int, epoch: int, each: bool
) -> None:
    ours = of_shards(np.array(sizes), count, granularity, seed + epoch if each else seed)
    assert ours.tolist() == mosaic.of_shards(np.array(sizes), count, granularity, seed, epoch, each).tolist()
    assert ours.sum() == count


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shuffle("py9", np.array([3]), 1, 0, 0), "known are naive, py1br, py1e, py1s, py2s"),
        (lambda: shuffle("py1e", np.array([3, 2]), 6, 0, 0), "6 canonical nodes share 5 samples: choose 1 to 5"),
        (lambda: shuffle("py1e", np.array([3, 2]), 1, 0, 0, 1), "shuffle_block_size 1: at least 2"),
        (lambda: partition("orig", 10, 4, 3, 1, 1, 1), "4 canonical nodes and 3 machines"),
        (lambda: partition("best", 10, 4, 3, 1, 1, 1), "known are orig, relaxed"),
        (lambda: partition("orig", 10, 1, 1, 1, 1, 1, 12), "behind sample 12 of an epoch of 10"),
    ],
)
def test_mistakes_are_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
