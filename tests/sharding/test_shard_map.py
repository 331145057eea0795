"""Derivatives of a whole mesh: inside = outside = one device's, forward, reverse, twice, and under a vmap of one's own."""

from __future__ import annotations

import pytest
import torch

from fmegatron.sharding import RULES, Sharding, shard, shard_map, spmd, thread_mesh, unshard, virtual_mesh
from fmegatron.testing import assert_trees_all_close

torch.set_num_threads(1)
MESHES = [
    ("ddp", {"dp": 4}),
    ("tp", {"tp": 4}),
    ("tp_sp", {"dp": 2, "tp": 2}),
    ("tp_sp", {"cp": 2, "tp": 2}),
    ("fsdp_tp_sp", {"dp": 2, "cp": 2, "tp": 2}),
]
NAMES = {"x": "batch seq embed", "table": "vocab embed", "up": "embed mlp", "down": "mlp embed", "scale": "embed"}


def program(sh, x, table, up, down, scale):
    """A residual block, a loss over a sharded vocabulary, a penalty on weights: all collectives of a model."""
    u = sh.einsum("batch seq embed, embed mlp -> batch seq mlp", x * scale, up).tanh()
    h = x + sh.einsum("batch seq mlp, mlp embed -> batch seq embed", u, down)
    h = sh.relayout(h, "batch seq embed -> batch loss_seq embed")
    logits = sh.einsum("batch loss_seq embed, vocab embed -> batch loss_seq vocab", h, table)
    loss = sh.total(sh.reduce("batch loss_seq vocab -> batch loss_seq", logits, "logsumexp"), "batch loss_seq")
    return loss + sh.total(table**2, "vocab embed") + sh.total(scale**3, "embed")


def plain(x, table, up, down, scale):
    """The same on one device, written without names."""
    h = x + ((x * scale) @ up).tanh() @ down
    return (h @ table.t()).logsumexp(-1).sum() + (table**2).sum() + (scale**3).sum()


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (4, 8, 6), "table": (8, 6), "up": (6, 8), "down": (8, 6), "scale": (6,)}
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes.values()]


def mapped(rules, sizes, make=virtual_mesh):
    return shard_map(program, Sharding(make(**sizes), RULES[rules]), list(NAMES.values()), "")


EVERY = tuple(range(len(NAMES)))


@pytest.mark.parametrize("rules, sizes", MESHES)
def test_derivatives_outside(rules, sizes):
    fn, given, along = mapped(rules, sizes), tensors(), tensors(1)

    def derivatives(f):
        grad = torch.func.grad(f, EVERY)
        return {
            "value": f(*given),
            "grad": grad(*given),
            "jvp": torch.func.jvp(f, tuple(given), tuple(along))[1],
            "forward over reverse": torch.func.jvp(grad, tuple(given), tuple(along))[1],
            "reverse over reverse": torch.func.vjp(grad, *given)[1](tuple(along)),
        }

    assert_trees_all_close(derivatives(fn), derivatives(plain), 1e-12)


@pytest.mark.parametrize("rules, sizes", MESHES)
def test_derivatives_inside(rules, sizes):
    sh, given = Sharding(virtual_mesh(**sizes), RULES[rules]), tensors()
    local = [shard(sh, x, names) for x, names in zip(given, NAMES.values(), strict=True)]
    expected = torch.func.grad(plain, EVERY)(*given)
    every = frozenset(sizes)

    def complete(here, grads):
        """The law: summed over every axis on which the tensor is not placed."""
        from dataclasses import replace

        from fmegatron.sharding.relayout import plan_relayout, run

        places = [here.placement(names) for names in NAMES.values()]
        ways = [plan_relayout(here.mesh, replace(p, partial=every - p.placed), p) for p in places]
        return tuple(run(g, here.rank, way) for g, way in zip(grads, ways, strict=True))

    def reverse(here, *xs):
        return complete(here, torch.func.grad(lambda *xs: program(here, *xs), EVERY)(*xs))

    grads = spmd(sh, reverse)(*local)
    whole = [unshard(sh, g, names) for g, names in zip(grads, NAMES.values(), strict=True)]
    assert_trees_all_close(whole, list(expected), 1e-12)

    def forward(here, *xs):
        return torch.func.jvp(lambda *xs: program(here, *xs), xs, xs)[1]

    tangent = torch.func.jvp(plain, tuple(given), tuple(given))[1]
    assert_trees_all_close({"jvp": spmd(sh, forward)(*local).sum()}, {"jvp": tangent}, 1e-12)


@pytest.mark.parametrize("rules, sizes", MESHES[1:3])
def test_threads_compute_the_same(rules, sizes):
    given = tensors()
    assert_trees_all_close({"loss": mapped(rules, sizes, thread_mesh)(*given)}, {"loss": plain(*given)}, 1e-13)


@pytest.mark.parametrize("rules, sizes", MESHES[1:])
def test_a_vmap_around_the_mesh(rules, sizes):
    """As many values as ranks, around a gradient through the mesh."""
    fn, given = mapped(rules, sizes), tensors()
    factors = torch.linspace(0.5, 2, 4, dtype=torch.float64)

    def sensitivity(f):
        return torch.vmap(lambda a: torch.func.grad(lambda up: f(given[0], given[1], a * up, *given[3:]))(given[2]))(factors)

    assert_trees_all_close({"vmap": sensitivity(fn)}, {"vmap": sensitivity(plain)}, 1e-12)
