"""Planted bugs: each must be seen by the property that is there to see it. A detector that stays silent fails here.

Every bug is one that real systems have had, and changes no shape. The detectors are those of tests/properties.
"""

from __future__ import annotations

import sys

import pytest
import torch
from pieces import batches

from fmegatron.models import model
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import (
    RULES,
    Sharding,
    collectives,
    einsum,
    named,
    relayout,
    shard,
    sharding,
    spmd,
    unshard,
    virtual_mesh,
)
from fmegatron.sharding.collectives import AllGather, Once, Psum, Take
from fmegatron.testing import assert_mesh_invariant
from fmegatron.train import leaves as train_leaves
from fmegatron.train import state, step
from fmegatron.train.state import over_ranks

torch.set_num_threads(1)


def batch():
    return next(batches(1, rows=4, vocab=24, seed=1))


def check(rules, mesh, microbatches=1, **more):
    """What the properties assert, on one sharding."""
    config = Config(**{"layers": 2, "embed": 16, "heads": 4, "kv": 2, "mlp": 16, "vocab": 24, "qk_norm": "norm", **more})
    assert_mesh_invariant(gpt(config), batch(), [Sharding(virtual_mesh(**mesh), RULES[rules])], microbatches=microbatches)


def identity_backward(patch):
    """psum whose backward is the identity, as in systems that call a replicated cotangent complete."""
    patch.setattr(Psum, "transpose", property(lambda self: Keep(self.axis)))


class Keep(collectives.Op):
    """The identity."""

    def issue(self, x, rank, via):
        return x.clone()

    def complete(self, issued, via):
        return issued


def slice_backward(patch):
    """all_gather whose backward takes the local slice, without the sum over ranks."""
    patch.setattr(AllGather, "transpose", property(lambda self: Take(self.axis, self.dim)))


def forgotten_once(patch):
    """A term that all ranks of an axis hold alike is counted by each of them."""
    patch.setitem(sharding.PLANS, "unplaced", lambda layout, names: ())


def wrong_order(patch):
    """Gathers from outer to inner: a silent permutation of what lies over two axes."""
    right = relayout.plan_relayout

    def planned(mesh, source, target):
        ops = right(mesh, source, target)
        return ops[::-1] if all(isinstance(op, AllGather) for op in ops) else ops

    for module in (relayout, sharding, named, sys.modules["fmegatron.sharding.shard_map"], train_leaves, einsum, model):
        patch.setattr(module, "plan_relayout", planned)


def replica_counted_twice(patch):
    """The norm sums the squares of a replicated leaf over its replicas."""
    patch.setattr(state, "apply", lambda x, rank, op: x if isinstance(op, Once) else collectives.apply(x, rank, op))


def tied_table_counted_twice(patch):
    """The norm counts a tied table at both of its ends."""
    right = state.Over.norm

    def norm(self, grads):
        twice = right(self, {**grads, "embed": {name: 2**0.5 * x for name, x in grads["embed"].items()}})
        return twice if len(self.sh.mesh.axes) else right(self, grads)

    patch.setattr(state.Over, "norm", norm)


def denominator_per_microbatch(patch):
    """Every microbatch divides by its own count of tokens, and the microbatches are averaged."""
    right = step.walk

    def walk(chain, here, part, *more):
        if not here.sh.mesh.axes:
            return right(chain, here, part, *more)
        own = over_ranks(here.sh, here.sh.total(part["weights"], "batch seq"), Psum)
        here.seeds = {name: 1 / own / 2 for name in here.seeds}
        return right(chain, here, part, *more)

    patch.setattr(step, "walk", walk)


def label_smoothing_over_the_local_vocabulary(patch):
    """Megatron-LM's bug: the mean of the log-probabilities is taken over this rank's part of the vocabulary."""
    right = sharding.Sharding.reduce

    def reduce(self, pattern, x, op):
        smooth = op == "sum" and pattern.endswith("-> batch loss_seq") and x.shape[-1] > 1
        return x.sum(-1) if smooth and self.rank is not None else right(self, pattern, x, op)

    patch.setattr(sharding.Sharding, "reduce", reduce)


MUTATIONS = [  # bug, the case that must see it, what the message must name
    (identity_backward, {"rules": "tp", "mesh": {"tp": 2}}, "leaves differ"),
    (slice_backward, {"rules": "tp_sp", "mesh": {"tp": 2}}, "leaves differ"),
    (forgotten_once, {"rules": "tp", "mesh": {"tp": 2}}, "loss.ce"),
    (wrong_order, {"rules": "fsdp", "mesh": {"dp": 2, "fsdp": 2}}, "node 1 #5"),
    (replica_counted_twice, {"rules": "ddp", "mesh": {"dp": 2}}, "gradient norm"),
    (tied_table_counted_twice, {"rules": "ddp", "mesh": {"dp": 2}, "tied": True}, "gradient norm"),
    (denominator_per_microbatch, {"rules": "ddp", "mesh": {"dp": 2}, "microbatches": 2}, "leaves differ"),
    (label_smoothing_over_the_local_vocabulary, {"rules": "tp", "mesh": {"tp": 2}, "label_smoothing": 0.1}, "node 4"),
]


@pytest.mark.parametrize("bug, case, message", MUTATIONS, ids=[m[0].__name__ for m in MUTATIONS])
def test_a_planted_bug_is_seen(bug, case, message, monkeypatch):
    check(**case)  # sound without it
    with monkeypatch.context() as patch:
        bug(patch)
        with pytest.raises(AssertionError, match=message):
            check(**case)


def squares(sh, w, x):
    """A loss with a psum over tp in it: w lies over mlp."""
    return sh.total(sh.einsum("batch embed, embed mlp -> batch mlp", x, w) ** 2, "batch mlp") + sh.total(
        sh.reduce("batch mlp -> batch", sh.einsum("batch embed, embed mlp -> batch mlp", x, w), "sum") ** 2, "batch"
    )


def per_example(examples):
    """Gradients of single examples inside the mesh equal those of one device."""
    sh = Sharding(virtual_mesh(tp=4), RULES["tp"])
    generator = torch.Generator().manual_seed(0)
    w, xs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 8), (examples, 4)))

    def on_rank(here, w, xs):
        return torch.vmap(lambda x: torch.func.grad(lambda w: squares(here, w, x[None]))(w))(xs)

    local = spmd(sh, on_rank)(shard(sh, w, "embed mlp"), xs.expand(4, examples, 4))
    y = xs @ w
    expected = torch.einsum("be,bm->bem", xs, 2 * y + 2 * y.sum(1, keepdim=True))
    torch.testing.assert_close(unshard(sh, local, "example embed mlp"), expected)


@pytest.mark.parametrize("examples", [3, 4])
def test_per_example_gradients_with_as_many_examples_as_ranks(examples):
    per_example(examples)


def test_a_vmap_rule_that_fires_at_a_users_level_is_seen(monkeypatch):
    right = collectives._Collective.vmap

    def rule(info, in_dims, x, rank, op):
        if in_dims[1] is None and info.batch_size == op.axis.size:  # takes the examples for the ranks
            ranks = torch.arange(op.axis.size)
            return op.under(1).run(x.movedim(in_dims[0], 0), ranks, op.axis.transport), 0
        return right(info, in_dims, x, rank, op)

    monkeypatch.setattr(collectives._Collective, "vmap", staticmethod(rule))
    per_example(3)
    with pytest.raises((AssertionError, RuntimeError)):
        per_example(4)
