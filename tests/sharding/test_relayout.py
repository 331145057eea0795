"""Relayout between any two placements moves what slicing the whole tensor gives; its backward is the transpose."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.sharding import Placement, Sharding, spmd, thread_mesh, virtual_mesh
from fmegatron.sharding.collectives import AllGather, AllToAll, Take
from fmegatron.sharding.relayout import plan_relayout, run
from fmegatron.sharding.rules import Rules
from fmegatron.sharding.shard_map import stack_shards, unstack_shards
from fmegatron.testing import assert_trees_all_close

torch.set_num_threads(1)
MESHES = ({"a": 2, "b": 2}, {"a": 2, "b": 2, "c": 2}, {"a": 3, "b": 2}, {"b": 4, "a": 2}, {"a": 1, "b": 2, "c": 3})
DIMS = ("x", "y", "z")


@st.composite
def placements(draw, axes, partial=()):
    """Axes spread over dims in any order; axes in `partial` may be partial instead."""
    lies = {dim: [] for dim in DIMS}
    some = set()
    for axis in draw(st.permutations(axes)):
        where = draw(st.sampled_from((*DIMS, None, *(["partial"] if axis in partial else []))))
        if where == "partial":
            some.add(axis)
        elif where:
            lies[where].append(axis)
    return Placement(DIMS, tuple(tuple(lies[dim]) for dim in DIMS), frozenset(some))


@st.composite
def moves(draw):
    sizes = draw(st.sampled_from(MESHES))
    axes = tuple(sizes)
    return sizes, draw(placements(axes, axes)), draw(placements(axes)), draw(st.integers(0, 999))


def pieces(mesh, whole, place, generator):
    """Local pieces of `whole`, whose sum over partial axes is right while no single one is."""
    local = stack_shards(mesh, whole, place)
    for axis in (mesh[name] for name in sorted(place.partial)):
        noise = torch.randn(local.shape, generator=generator, dtype=local.dtype)
        ranks = torch.arange(mesh.size) // axis.stride % axis.size
        others = noise.unflatten(0, (-1, axis.size, axis.stride))
        noise = (others - others.mean(1, keepdim=True)).reshape(local.shape)  # sums to zero along the axis
        first = (ranks == 0).reshape(-1, *[1] * whole.dim())
        local = torch.where(first, local, torch.zeros_like(local)) + noise
    return local


@given(moves())
def test_relayout_is_slicing(move):
    sizes, source, target, seed = move
    mesh = virtual_mesh(**sizes)
    n = mesh.size
    whole = torch.randn(n, 2 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    local = pieces(mesh, whole, source, torch.Generator().manual_seed(seed + 1))
    expected = stack_shards(mesh, whole, target)

    def go(make):
        sh = Sharding(make(**sizes), Rules(compute=(("any", tuple(sizes)),)))
        ops = plan_relayout(sh.mesh, source, target)
        return spmd(sh, lambda here, x: run(x, here.rank, ops))

    moved = go(virtual_mesh)(local)
    assert_trees_all_close({"moved": moved}, {"moved": expected}, 1e-12)
    assert_trees_all_close({"threads": go(thread_mesh)(local)}, {"threads": expected}, 1e-12)
    assert_trees_all_close({"back": unstack_shards(mesh, moved, target)}, {"back": whole}, 1e-12)
    ct = torch.randn(moved.shape, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    back = torch.func.vjp(go(virtual_mesh), local)[1](ct)[0]
    assert torch.allclose((moved * ct).sum(), (local * back).sum(), rtol=1e-10, atol=1e-10)


def test_an_axis_that_changes_its_dim_is_one_all_to_all():
    mesh = virtual_mesh(a=2, b=2)
    ops = plan_relayout(mesh, Placement(DIMS, (("a",), (), ())), Placement(DIMS, ((), ("a",), ())))
    assert ops == (AllToAll(mesh["a"], 1, 0),)


def test_dropping_an_outer_axis_is_a_gather_of_both_and_a_take():
    mesh = virtual_mesh(a=2, b=2)
    ops = plan_relayout(mesh, Placement(("x",), (("a", "b"),)), Placement(("x",), (("b",),)))
    assert [type(op) for op in ops] == [AllGather, AllGather, Take]
    assert [op.axis.name for op in ops] == ["b", "a", "b"]  # gathers go inner to outer


def test_gathers_go_inner_to_outer_and_takes_outer_to_inner():
    mesh = virtual_mesh(a=2, b=2)
    sharded, whole = Placement(("x",), (("a", "b"),)), Placement(("x",), ((),))
    assert [op.axis.name for op in plan_relayout(mesh, sharded, whole)] == ["b", "a"]
    assert [op.axis.name for op in plan_relayout(mesh, whole, sharded)] == ["a", "b"]
