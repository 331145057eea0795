"""The record of collectives: counts, bytes and order on every kind of mesh."""

from __future__ import annotations

import pytest
import torch

from fmegatron.sharding import abstract_mesh, thread_mesh, virtual_mesh
from fmegatron.sharding.bucket import start
from fmegatron.sharding.collectives import AllGather, AllToAll, Once, Ppermute, Psum, ReduceScatter, Take, apply
from fmegatron.sharding.mesh import with_transports
from fmegatron.sharding.rules import RULES
from fmegatron.sharding.shard_map import spmd
from fmegatron.sharding.sharding import Sharding
from fmegatron.sharding.traffic import counted, wire_bytes
from fmegatron.sharding.transports import Abstract

MESHES = {"virtual": virtual_mesh, "threads": thread_mesh, "abstract": abstract_mesh}
N = 4 * 6 * 8  # bytes of the local tensor below


def everything(mesh):
    """A program that uses each collective once on tp, and two that do not communicate."""
    tp, dp = mesh["tp"], mesh["dp"]
    ops = [Psum(tp), AllGather(tp, 0), ReduceScatter(tp, 0), AllToAll(tp, 0, 1), Ppermute(tp, (1, 0)), Take(tp, 0), Once(tp)]

    def program(sh, x):
        for op in ops:
            apply(x, sh.rank, op)
        return apply(x, sh.rank, Psum(dp))

    return program


@pytest.mark.parametrize("kind", MESHES)
def test_each_collective_is_noted_on_each_kind_of_mesh(kind):
    mesh, traffic = counted(MESHES[kind](dp=3, tp=2))
    sh = Sharding(mesh, RULES["tp"])
    ranks = (6,) if mesh.stacked else ()
    spmd(sh, everything(mesh))(torch.zeros(*ranks, 4, 6, dtype=torch.float64, device=mesh.device))
    expected = {
        ("all_reduce", "tp"): (1, N),
        ("all_gather", "tp"): (1, 2 * N),  # what is received
        ("reduce_scatter", "tp"): (1, N),
        ("all_to_all", "tp"): (1, N),
        ("permute", "tp"): (1, N),
        ("all_reduce", "dp"): (1, N),
    }
    assert set(traffic.events) == (set(range(6)) if kind == "threads" else {0})
    for rank in traffic.events:
        assert traffic.counts(rank) == expected
    sent = {(row.collective, row.axis): row.wire for row in traffic.rows()}
    assert sent["all_reduce", "dp"] == 4 * N // 3  # 2 (n - 1) / n
    assert sent["all_gather", "tp"] == N and sent["reduce_scatter", "tp"] == N // 2
    assert "all_to_all" in str(traffic) and f"{2 * N:,}" in str(traffic)
    traffic.clear()
    assert traffic.rows() == []


def test_backward_is_counted_too():
    mesh, traffic = counted(virtual_mesh(tp=2))
    sh = Sharding(mesh, RULES["tp"])

    def gradient(here, x):
        return torch.func.grad(lambda x: apply(x, here.rank, AllGather(mesh["tp"], 0)).square().sum())(x)

    spmd(sh, gradient)(torch.ones(2, 3))
    assert traffic.counts() == {("all_gather", "tp"): (1, 24), ("reduce_scatter", "tp"): (1, 24)}


class Background(Abstract):
    """Issued work goes on by itself."""

    background = True


def test_events_tell_what_is_under_way_while_a_program_goes_on():
    plain = abstract_mesh(dp=2, tp=2)
    mesh, traffic = counted(with_transports(plain, {"dp": Background(), "tp": Background()}))
    rank = torch.zeros((), dtype=torch.int64, device="meta")
    x = torch.empty(4, device="meta")
    finish = start([x, x], [(AllGather(mesh["dp"], 0), Psum(mesh["tp"]))] * 2, rank)
    start([x], [(Psum(mesh["tp"]),)], rank)(None)
    finish(None)
    assert [event[:3] for event in traffic.events[0]] == [
        ("issue", "all_gather", "dp"),
        ("issue", "all_reduce", "tp"),
        ("wait", "all_reduce", "tp"),
        ("wait", "all_gather", "dp"),
        ("issue", "all_reduce", "tp"),
        ("wait", "all_reduce", "tp"),
    ]


def test_leaves_that_lie_differently_share_their_collectives():
    mesh, traffic = counted(abstract_mesh(dp=2, cp=2))
    rank = torch.zeros((), dtype=torch.int64, device="meta")
    dp, cp = mesh["dp"], mesh["cp"]
    plans = [(AllGather(dp, 0),), (AllGather(cp, 0), AllGather(dp, 0)), (AllGather(cp, 1), AllGather(dp, 0))]
    start([torch.empty(4, 4, device="meta")] * 3, plans, rank)(None)
    assert {key: count for key, (count, _) in traffic.counts().items()} == {("all_gather", "cp"): 1, ("all_gather", "dp"): 1}


def test_what_a_ring_sends():
    assert wire_bytes("all_reduce", 4, 400) == 600
    assert wire_bytes("all_gather", 4, 400) == wire_bytes("reduce_scatter", 4, 400) == wire_bytes("all_to_all", 4, 400) == 300
    assert wire_bytes("permute", 4, 400) == 400
    assert wire_bytes("all_reduce", 1, 400) == 0
