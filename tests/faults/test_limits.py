"""A step that a limit refuses changes no bit of params and optimizer state, in memory of its own or in donated memory."""

from __future__ import annotations

import math

import pytest
import torch

from fmegatron import optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, thread_mesh, virtual_mesh
from fmegatron.testing.invariance import NAMES
from fmegatron.train.state import init
from fmegatron.train.step import make_step

torch.set_num_threads(1)
MODEL = gpt(Config(layers=1, embed=8, heads=2, kv=2, mlp=8, vocab=11, context=8))


def batch(sh, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, 11, (4, 8), generator=generator) for _ in range(2))
    given = {"tokens": tokens, "labels": labels, "weights": torch.ones(4, 8)}
    return {name: shard(sh, x, NAMES[name]) for name, x in given.items()}


def bits(state):
    return [x.clone() for part in (state.params, state.opt_state) for x in tree.leaves(part)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("make", [lambda: SINGLE, lambda: Sharding(virtual_mesh(dp=2), RULES["zero2"]),
                                  lambda: Sharding(thread_mesh(dp=2), RULES["fsdp"])], ids=["single", "virtual", "threads"])
def test_a_refused_step_changes_nothing_and_is_run_again(make, donate):
    sh = make()
    if donate and sh.mesh.kind == "virtual":
        pytest.skip("a virtual mesh donates nothing")
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(optim.constant(0.1)))
    step = make_step(MODEL, tx, sh, donate=donate)
    state, _ = step(init(MODEL, tx, sh), batch(sh, 0))
    before = bits(state)
    small = {name: getattr(state, name).clone() for name in ("step", "key", "consumed", "skipped")}
    values = []
    for limits in ({"loss": -1.0}, {"grad_norm": 1e-9, "loss": math.inf}, {"loss": 0.0}):
        state, numbers = step(state, batch(sh, 1), limits)
        assert same(bits(state), before)
        assert (state.skipped == small["skipped"] + 1).all() and (state.step == 1).all()
        values.append((numbers["loss"], numbers["grad_norm"]))
        state = state._replace(**{name: x.clone() for name, x in small.items()})
    for accepts in ({"loss": 1e9, "grad_norm": math.inf}, None):
        after, numbers = step(state._replace(params=tree.map(torch.clone, state.params),
                                             opt_state=tree.map(torch.clone, state.opt_state),
                                             **{name: x.clone() for name, x in small.items()}), batch(sh, 1), accepts)
        assert not same(bits(after), before) and (after.skipped == 0).all()
        values.append((numbers["loss"], numbers["grad_norm"]))
    assert all(same(value, values[0]) for value in values)  # the same bits, five times
