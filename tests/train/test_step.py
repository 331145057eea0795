"""A step is the same function on every mesh: parameters after k steps, counters, skipped steps, masks of dropout."""

from __future__ import annotations

import pytest
import torch
from pieces import batches, model

from fmegatron import optim, tree
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, thread_mesh, virtual_mesh
from fmegatron.testing import assert_max_traces, assert_trees_all_close, measure, variants
from fmegatron.testing.invariance import NAMES, whole_leaves
from fmegatron.train.evaluate import make_evaluate
from fmegatron.train.microbatches import split
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step

torch.set_num_threads(1)
MESHES = [
    ("ddp", {"dp": 2}, {}),
    ("zero1", {"dp": 4}, {"microbatches": 2}),
    ("zero2_tp", {"dp": 2, "tp": 2}, {"microbatches": 2}),
    ("fsdp", {"dp": 2, "fsdp": 2}, {"remat": "full"}),
    ("fsdp_tp_sp", {"dp": 2, "cp": 2, "tp": 2}, {}),
]


def train(net, tx, sh, steps=3, **settings):
    """(whole parameters, metrics of the last step, state) after some steps in fp64."""
    plan = plan_step(net, sh, **settings)
    state, step = init(net, tx, sh, key=0, dtype=torch.float64), make_step(net, tx, sh, **settings)
    for batch in batches(steps):
        state, metrics = step(state, {name: shard(plan.sh, x, NAMES[name]) for name, x in batch.items()})
    first = (lambda x: x[0]) if sh.mesh.stacked else (lambda x: x)
    return whole_leaves(plan, state.params, "storage"), tree.map(first, metrics), state


@pytest.mark.parametrize("rules, sizes, settings", MESHES)
def test_sgd_on_any_mesh(rules, sizes, settings):
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(optim.constant(0.3)))
    expected, metrics, _ = train(model(), tx, SINGLE)
    params, got, state = train(model(), tx, Sharding(virtual_mesh(**sizes), RULES[rules]), **settings)
    assert_trees_all_close(params, expected, 1e-10)
    assert_trees_all_close(got, metrics, 1e-10)
    assert state.step.unique().tolist() == [3] and state.consumed.unique().tolist() == [24]


@pytest.mark.parametrize("rules, sizes, settings", MESHES)
def test_adamw_on_any_mesh(rules, sizes, settings):
    rate = 1e-2
    tx = optim.adamw(optim.constant(rate))
    expected, _, _ = train(model(), tx, SINGLE)
    params, _, _ = train(model(), tx, Sharding(virtual_mesh(**sizes), RULES[rules]), **settings)
    worst = max(float((params[path] - expected[path]).abs().max()) for path in expected)
    assert worst <= 1e-4 * rate


@pytest.mark.parametrize("rules, sizes, settings", [
    ("single", {}, {}), ("fsdp_tp_sp", {"dp": 2, "tp": 2}, {"microbatches": 2, "remat": "full"})])  # fmt: skip
def test_a_derivative_goes_through_training(rules, sizes, settings):
    """Of the loss after two steps by the learning rate: reverse, forward, mapped, and by differences."""
    sh, net = Sharding(virtual_mesh(**sizes), RULES[rules]) if sizes else SINGLE, model(layers=1)
    given = [{name: shard(sh, x, "batch seq") for name, x in batch.items()} for batch in batches(3, rows=4)]

    def loss(rate):
        tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(rate, eps_root=1e-6))
        state, step = init(net, tx, sh, key=0, dtype=torch.float64), make_step(net, tx, sh, **settings)
        for batch in given[:2]:
            state, _ = step(state, batch)
        found = make_evaluate(net, sh)(state.params, given[2])
        return (found["ce.sum"] / found["ce.count"]).flatten()[0]

    rate, near = torch.tensor(0.03, dtype=torch.float64), 1e-6
    _, forward = torch.func.jvp(loss, (rate,), (torch.ones_like(rate),))
    assert abs(forward - (loss(rate + near) - loss(rate - near)) / (2 * near)) < 1e-6 * abs(forward)
    reverse = torch.vmap(torch.func.grad(loss))(torch.stack([rate, rate]))
    assert torch.allclose(reverse, forward, rtol=1e-10)


@pytest.mark.parametrize("variant", variants("eager", "virtual", "threads"))
def test_variants_agree(variant):
    tx = optim.sgd(optim.constant(0.1))
    expected, _, _ = train(model(), tx, SINGLE, steps=1)
    params, _, _ = train(model(), tx, variant.sharding("fsdp_tp_sp", dp=2, tp=2), steps=1, **variant.settings)
    assert_trees_all_close(params, expected, 1e-10)


@pytest.mark.parametrize("make", [virtual_mesh, thread_mesh])
def test_dropout_masks_do_not_depend_on_mesh_or_microbatches(make):
    net = model(embed_dropout=0.3, hidden_dropout=0.4, attention_dropout=0.2)
    batch = next(iter(batches(1))) | {"sample": torch.arange(8) * 3}
    expected = measure(net, SINGLE, batch)
    got = measure(net, Sharding(make(dp=2, tp=2), RULES["fsdp_tp_sp"]), batch, expected=expected, microbatches=2)
    dropped = [name for name, x in expected.activations.items() if name.endswith(" h")]
    assert len(dropped) == 3 and (expected.activations[dropped[0]] == 0).any()
    for name in dropped:
        zeros = expected.activations[name] == 0
        assert torch.equal(got.activations[name] == 0, zeros)
    assert_trees_all_close(got.grads, expected.grads, 1e-10)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    tx, sh = optim.adamw(optim.constant(0.1)), Sharding(virtual_mesh(dp=2), RULES["zero2"])
    state, step = init(model(), tx, sh, key=0), make_step(model(), tx, sh)
    batch = next(iter(batches(1)))
    local = {name: shard(sh, x, NAMES[name]) for name, x in batch.items()}
    bad = {**local, "weights": local["weights"].float() * float("inf")}
    after, metrics = step(state, bad)
    assert not torch.isfinite(metrics["grad_norm"]).any()
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after.params), tree.leaves(state.params), strict=True))
    assert after.step.tolist() == [0, 0] and after.skipped.tolist() == [1, 1] and after.consumed.tolist() == [8, 8]


def test_errors():
    with pytest.raises(ValueError, match=r"6 samples a rank do not divide into 4 microbatches: use one of \[1, 2, 3, 6\]"):
        split({"tokens": torch.zeros(6, 2)}, 4)
    with pytest.raises(ValueError, match="compile: a virtual mesh runs eager"):
        plan_step(model(), Sharding(virtual_mesh(dp=2), RULES["ddp"]), compile=True)


def test_max_traces_counts():
    once = assert_max_traces(lambda x: x + 1, 1)
    assert once(1) == 2 and once.count == 1
    with pytest.raises(AssertionError, match="was traced 2 times, at most 1"):
        once(1)


@pytest.mark.parametrize("settings, message", [
    ({"microbatches": 0}, "microbatches = 0: it is at least 1"), ({"prefetch": -1}, "prefetch = -1: it is at least 0"),
    ({"async_tp": 0}, "async_tp = 0: it is at least 1"), ({"kernels": "tritn"}, "'tritn': it is reference, triton or auto"),
    ({"term_weights": {"cee": 2.0}}, "name 'cee', but the terms of the loss are ce"),
])  # fmt: skip
def test_settings_that_cannot_be_honoured_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_step(model(), SINGLE, **settings)


@pytest.mark.parametrize("make", [virtual_mesh, thread_mesh])
def test_what_was_not_cut_for_the_mesh_is_refused(make):
    net, tx, batch = model(), optim.sgd(0.1), next(batches(1, rows=4))
    sh = Sharding(make(dp=2, tp=2), RULES["fsdp_tp_sp"])
    step, state = make_step(net, tx, sh), init(net, tx, sh)
    with pytest.raises(ValueError, match="has no leading dim of the mesh's 4 ranks: cut it by"):
        step(init(net, tx, SINGLE), batch)
    with pytest.raises(ValueError, match=r"tokens of shape \(8,\): they are \[batch, seq\]"):
        step(state, batch)  # as many rows as ranks
