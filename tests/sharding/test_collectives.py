"""Each collective is adjoint to its transpose, on stacked ranks and on threads alike, for any mesh, axis and dim."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.sharding import RULES, Sharding, spmd, thread_mesh, virtual_mesh
from fmegatron.sharding.collectives import (
    AllGather,
    AllToAll,
    Once,
    Place,
    Pmax,
    Ppermute,
    Psum,
    ReduceScatter,
    Take,
    apply,
)
from fmegatron.sharding.rules import Rules
from fmegatron.testing import assert_trees_all_close, assert_trees_all_equal

torch.set_num_threads(1)
MESHES = ({"a": 2, "b": 2}, {"a": 4}, {"a": 2, "b": 3}, {"b": 1, "a": 3}, {"c": 2, "a": 2, "b": 2}, {"a": 1})
KINDS = ("psum", "all_gather", "reduce_scatter", "take", "place", "all_to_all", "ppermute", "once")


def sharding(make, sizes):
    return Sharding(make(**sizes), Rules(compute=(("any", tuple(sizes)),)))


def make_op(kind, axis, dim, other, source):
    return {
        "psum": lambda: Psum(axis),
        "once": lambda: Once(axis),
        "all_gather": lambda: AllGather(axis, dim),
        "reduce_scatter": lambda: ReduceScatter(axis, dim),
        "take": lambda: Take(axis, dim),
        "place": lambda: Place(axis, dim),
        "all_to_all": lambda: AllToAll(axis, dim, other),
        "ppermute": lambda: Ppermute(axis, tuple(source)),
    }[kind]()


@st.composite
def problems(draw):
    """(mesh sizes, axis, dims, permutation of the axis, local shape, seed)."""
    sizes = draw(st.sampled_from(MESHES))
    axis = draw(st.sampled_from(list(sizes)))
    dim, other = draw(st.permutations(range(3)))[:2]
    shape = [draw(st.integers(1, 3)) * sizes[axis] for _ in range(3)]
    source = draw(st.permutations(range(sizes[axis])))
    return sizes, axis, dim, other, source, shape, draw(st.integers(0, 999))


@pytest.mark.parametrize("kind", KINDS)
@given(problem=problems())
def test_adjoint_involutive_and_equal_on_both_transports(kind, problem):
    sizes, axis, dim, other, source, shape, seed = problem
    generator = torch.Generator().manual_seed(seed)
    ranks = virtual_mesh(**sizes).size
    x = torch.randn(ranks, *shape, generator=generator, dtype=torch.float64)

    def forward(make, op_of=lambda op: op):
        sh = sharding(make, sizes)
        op = op_of(make_op(kind, sh.mesh[axis], dim, other, source))
        return spmd(sh, lambda here, x: apply(x, here.rank, op)), op

    run, op = forward(virtual_mesh)
    y = run(x)
    ct = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    back = spmd(sharding(virtual_mesh, sizes), lambda here, x: apply(x, here.rank, op.transpose))(ct)
    assert op.transpose.transpose == op
    assert torch.allclose((y * ct).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)  # <Lx, y> = <x, L'y>
    def rank_vjp(here, x, ct):
        return torch.func.vjp(lambda x: apply(x, here.rank, op), x)[1](ct)[0]

    inside = spmd(sharding(virtual_mesh, sizes), rank_vjp)
    outside = torch.func.vjp(run, x)[1](ct)[0]  # the primitives' own derivative: an oracle
    assert_trees_all_close({"inside": inside(x, ct), "outside": outside}, {"inside": back, "outside": back}, 1e-14)
    assert_trees_all_equal({"jvp": torch.func.jvp(run, (x,), (x,))[1]}, {"jvp": y})
    threads, _ = forward(thread_mesh)
    assert_trees_all_close({"threads": threads(x)}, {"threads": y}, 1e-14)
    transposed, _ = forward(thread_mesh, lambda op: op.transpose)
    assert_trees_all_close({"threads": transposed(ct)}, {"threads": back}, 1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [2, 4])  # as many as ranks on the axis, and on the mesh
def test_a_vmap_of_ones_own_is_one_more_dim(kind, examples):
    sh = sharding(virtual_mesh, {"a": 2, "b": 2})
    op = make_op(kind, sh.mesh["b"], 0, 1, (1, 0))
    x = torch.randn(4, examples, 2, 4)
    run = spmd(sh, lambda here, x: apply(x, here.rank, op))
    expected = torch.stack([run(x[:, i]) for i in range(examples)], 1)
    inside = spmd(sh, lambda here, x: torch.vmap(lambda one: apply(one, here.rank, op))(x))(x)
    outside = torch.vmap(run, in_dims=1, out_dims=1)(x)
    assert_trees_all_equal({"inside": inside, "outside": outside}, {"inside": expected, "outside": expected})


def test_pmax_is_the_maximum_and_has_no_derivative():
    sh = sharding(virtual_mesh, {"a": 2, "b": 2})
    x = torch.randn(4, 3)
    run = spmd(sh, lambda here, x: apply(x, here.rank, Pmax(sh.mesh["b"])))
    assert torch.equal(run(x), x.reshape(2, 2, 3).amax(1, keepdim=True).expand(2, 2, 3).reshape(4, 3))
    with pytest.raises(RuntimeError, match="pmax has no derivative"):
        spmd(sh, lambda here, x: torch.func.grad(lambda x: apply(x, here.rank, Pmax(sh.mesh["b"])).sum())(x))(x)


def test_a_failing_thread_does_not_hang_the_others():
    sh = Sharding(thread_mesh(tp=2), RULES["tp"])

    def fail(here, x):
        if int(here.rank) == 1:
            raise ValueError("rank 1 fails")
        return apply(x, here.rank, Psum(sh.mesh["tp"]))

    with pytest.raises(ValueError, match="rank 1 fails"):
        spmd(sh, fail)(torch.ones(2, 1))
