"""Rank groups against Megatron-LM's published examples, and zigzag against its batch split."""

from __future__ import annotations

import pytest
import torch

from fmegatron.sharding import RULES, Sharding, abstract_mesh, shard, unshard, virtual_mesh
from fmegatron.sharding.zigzag import chunks, places, unzigzag, zigzag


def groups(mesh, axis):
    """The ranks that differ in one coordinate only, in order."""
    found = {}
    for rank in range(mesh.size):
        here = mesh.coordinates(rank)
        found.setdefault(tuple(n for name, n in here.items() if name != axis), []).append(rank)
    return sorted(found.values())


def test_sixteen_ranks_of_tp_2_and_pp_4():
    mesh = abstract_mesh(pp=4, dp=2, tp=2)  # Megatron-LM's order tp-cp-ep-dp-pp, inner to outer
    assert groups(mesh, "tp") == [[2 * i, 2 * i + 1] for i in range(8)]
    assert groups(mesh, "dp") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert groups(mesh, "pp") == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


def test_hierarchical_context_of_2_2_4():
    mesh = abstract_mesh(l3=4, l2=2, l1=2)  # sizes [2, 2, 4] are inner to outer
    assert groups(mesh, "l1") == [[2 * i, 2 * i + 1] for i in range(8)]
    assert groups(mesh, "l2") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert groups(mesh, "l3") == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_rank_holds_chunks_r_and_2_n_minus_1_minus_r(n):
    x = torch.arange(24)
    stored = zigzag(x, 0, n)
    assert torch.equal(unzigzag(stored, 0, n), x) and torch.equal(places(x, 24, n), stored)
    if n > 1:
        assert chunks(n)[2:4] == [1, 2 * n - 2] and stored[:12 // n].tolist() == list(range(12 // n))


@pytest.mark.parametrize("rules", ["cp_ring", "cp_hierarchical"])
def test_shards_and_back_and_an_index_that_tells_places(rules):
    from fmegatron.sharding import spmd

    sh = Sharding(virtual_mesh(dp=2, cp=2, cpa=2, tp=2), RULES[rules])
    x = torch.arange(4 * 16).reshape(4, 16)
    local = shard(sh, x, "batch seq")
    assert torch.equal(unshard(sh, local, "batch seq"), x)
    assert torch.equal(spmd(sh, lambda here, x: here.index("seq", "batch seq", x))(local), local[:, 0] % 16)
