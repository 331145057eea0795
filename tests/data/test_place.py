"""Who reads what: every row by exactly the ranks that need it, and each keeps the part that its placement says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fmegatron.data.batches import batches, rows_at
from fmegatron.data.place import own_rows, placer, reading, shards_of
from fmegatron.sharding import RULES, Sharding, abstract_mesh, virtual_mesh

SEQ = 16


class Counting:
    """Rows that write down which of them were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def row(self, number: int):
        self.read.append(number)
        tokens = 100 * number + np.arange(SEQ)
        return {"tokens": tokens, "weights": np.ones(SEQ, np.float32), "sample": np.array(number)}


meshes = st.fixed_dictionaries(
    {}, optional={axis: st.sampled_from([1, 2]) for axis in ("dp", "fsdp", "cp", "tp", "ep")}
).map(lambda sizes: {axis: sizes[axis] for axis in ("dp", "fsdp", "cp", "tp", "ep") if axis in sizes})
rules = st.sampled_from(["ddp_tp", "zero1_tp_sp", "fsdp_tp_sp", "hsdp_tp_sp"])


def rank_of(sizes: dict[str, int], name: str, rank: int) -> Sharding:
    """The sharding as one process of a real mesh sees it."""
    assume({axis for axis, size in sizes.items() if size > 1} <= RULES[name].axes)
    return Sharding(replace(abstract_mesh(**sizes), rank=rank, device="cpu"), RULES[name])


@given(meshes, rules, st.integers(0, 30))
def test_each_rank_reads_its_rows_only_and_all_ranks_agree(sizes, name, consumed):
    mesh = abstract_mesh(**sizes)
    cut = [axis for axis in rank_of(sizes, name, 0).placement("batch seq").of("batch")]
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.size):
        sh, rows = rank_of(sizes, name, rank), Counting()
        next(batches(rows, 16, consumed, ahead=0, **reading(sh)))
        own = own_rows(sh, 16)
        assert rows.read == [consumed + row for row in own]  # these, once each, and no others
        place = tuple(mesh.coordinates(rank)[axis] for axis in cut)
        assert groups.setdefault(place, rows.read) == rows.read  # ranks that differ in tp or cp read the same rows
    assert sorted(n for read in groups.values() for n in read) == list(range(consumed, consumed + 16))
    assert len(groups) == shards_of(rank_of(sizes, name, 0))


@given(meshes, rules)
def test_a_process_holds_what_its_rank_holds_on_a_virtual_mesh(sizes, name):
    whole, _ = rows_at(Counting(), range(16)), rank_of(sizes, name, 0)
    stacked = next(batches(Counting(), 16, ahead=0, **reading(Sharding(virtual_mesh(**(sizes or {"dp": 1})), RULES[name]))))
    for rank in range(abstract_mesh(**sizes).size):
        sh = rank_of(sizes, name, rank)
        mine = next(batches(Counting(), 16, ahead=0, **reading(sh)))
        for key, value in mine.items():
            assert torch.equal(value, stacked[key][rank])
            if not sizes:
                assert torch.equal(value, whole[key])


@pytest.mark.parametrize("sizes", [{"cp": 4}, {"dp": 2, "cp": 2}, {"cp": 2, "tp": 2}])
def test_under_zigzag_each_rank_gets_a_chunk_of_the_head_and_one_of_the_tail(sizes):
    """By hand: rank r of n along cp holds chunks r and 2 n - 1 - r of every row; under tp half of those."""
    n, chunk = sizes["cp"], SEQ // (2 * sizes["cp"])
    stacked = next(batches(Counting(), 4, ahead=0, **reading(Sharding(virtual_mesh(**sizes), RULES["cp_ring"]))))
    for rank in range(abstract_mesh(**sizes).size):
        at = abstract_mesh(**sizes).coordinates(rank)
        sh = Sharding(replace(abstract_mesh(**sizes), rank=rank, device="cpu"), RULES["cp_ring"])
        mine = next(batches(Counting(), 4, ahead=0, **reading(sh)))
        assert all(torch.equal(value, stacked[key][rank]) for key, value in mine.items())
        places = [c * chunk + i for c in (at["cp"], 2 * n - 1 - at["cp"]) for i in range(chunk)]
        share = len(places) // sizes.get("tp", 1)
        places = torch.tensor(places[share * at.get("tp", 0) :][:share])
        rows = torch.tensor(own_rows(sh, 4))
        assert torch.equal(mine["tokens"], 100 * rows[:, None] + places)


def test_what_does_not_divide_is_said():
    sh = Sharding(replace(abstract_mesh(dp=4), rank=1), RULES["ddp"])
    with pytest.raises(ValueError, match="6 samples does not divide over 4 data-parallel ranks: use 4 or 8"):
        own_rows(sh, 6)
    with pytest.raises(ValueError, match="seq of 15 does not divide over mesh axis 'cp' of 2"):
        placer(Sharding(replace(abstract_mesh(cp=2), rank=1), RULES["ddp"]))("tokens", torch.zeros(2, 15), "batch seq")
