"""One formula, three executions; and the fused step equals update, apply and where, for any chain."""

from __future__ import annotations

import pytest
import torch

from fmegatron import optim, tree
from fmegatron.optim import elementwise, multi_tensor
from fmegatron.optim.base import Transform


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    shapes = {"a": (130, 7), "b": (128,), "c.one": (1,), "c.scalar": (), "c.many": (33, 64), "layers.w": (2, 8, 40)}

    def draw():
        return tree.from_paths({path: torch.randn(s, generator=g, dtype=dtype) for path, s in shapes.items()})

    return draw(), [draw() for _ in range(3)]


def orthogonal_enough(rate):
    """A closed box, as Muon is one: whole leaves, not elementwise, with a state of its own."""
    def update(grads, state, params, *, over=optim.LOCAL):
        return tree.map(lambda u: u / (1 + u.abs().sum()), grads), {"n": state["n"] + 1}

    return optim.chain(Transform(lambda params: {"n": elementwise.zero(params)}, update),
                       optim.add_decayed_weights(0.1), optim.scale_by_learning_rate(rate))


CHAINS = {
    "adamw": lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(optim.cosine(1e-2, warmup=1, steps=9))),
    "clip last": lambda: optim.chain(optim.sgd(0.1, momentum=0.9), optim.clip_by_global_norm(0.01)),
    "nesterov": lambda: optim.chain(optim.clip_by_value(0.3), optim.sgd(0.1, 0.9, True, 0.01)),
    "closed box": lambda: orthogonal_enough(0.1),
    "groups": lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.multi(
        {"x": optim.adamw(1e-2), "y": optim.sgd(0.1, 0.9), "z": optim.chain(orthogonal_enough(0.1), optim.clip_by_value(0.01))},
        [("a", "x"), ("c.*", "y"), ("*", "z")])),
    "one link": lambda: optim.scale_by_adam(),
    "decay by leaf": lambda: optim.adamw(1e-2, mask=lambda path, leaf: {"a": 1.0, "b": 0.5}.get(path, 0.0)),
}


def plain_step(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optim.apply_updates(params, updates), state


def close(a, b, exact=False):
    for path, x in tree.to_paths(a).items():
        y = tree.to_paths(b)[path]
        tolerance = (0.0, 0.0) if exact or not x.is_floating_point() else ({torch.float64: 1e-12}.get(x.dtype, 2e-6), 1e-7)
        torch.testing.assert_close(x, y, rtol=tolerance[0], atol=tolerance[1], msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_foreach_is_the_leaves_bit_for_bit(name, dtype, monkeypatch):
    params, grads = problem(dtype)
    tx = CHAINS[name]()
    lists = plain_step(tx, grads[0], tx.init(params), params)
    monkeypatch.setattr(elementwise, "plain", lambda: False)
    close(lists, plain_step(tx, grads[0], tx.init(params), params), exact=True)


def test_foreach_is_used(monkeypatch):
    params, grads = problem()
    calls = []
    lerp = torch._foreach_lerp
    monkeypatch.setattr(torch, "_foreach_lerp", lambda *a: calls.append(len(a[0])) or lerp(*a))
    tx = optim.adam(1e-2)
    tx.update(grads[0], tx.init(params), params)
    assert calls == [6, 6]
    torch.vmap(tx.update, (0, None, None))(tree.map(lambda g: g[None], grads[0]), tx.init(params), params)
    assert calls == [6, 6]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_the_eager_step_equals_its_parts(name, donate):
    run(name, torch.float64, donate, compile=False)


@pytest.mark.parametrize("name, dtype, donate", [("adamw", torch.float32, True), ("closed box", torch.float32, False)])
def test_the_compiled_step_equals_its_parts(name, dtype, donate):
    run(name, dtype, donate, compile=True)


def run(name, dtype, donate, compile):
    params, grads = problem(dtype)
    tx = CHAINS[name]()
    step = optim.fuse(tx)
    ours, state = tree.map(torch.clone, params), tx.init(params)
    theirs, expected = params, tx.init(params)
    for i, g in enumerate([*grads, grads[0]]):
        broken = tree.map(lambda x: x / 0, g)
        before = tree.map(torch.clone, (ours, state))
        skipped = step(broken, state, ours, ok=torch.tensor(False), donate=donate, compile=compile)
        close(skipped, before, exact=True)
        ours, state = skipped
        old = {path: p.data_ptr() for path, p in tree.to_paths(ours).items()}
        ours, state = step(g, state, ours, ok=torch.tensor(True) if i % 2 else None, donate=donate, compile=compile)
        assert all((p.data_ptr() == old[path]) == donate for path, p in tree.to_paths(ours).items())
        theirs, expected = plain_step(tx, g, expected, theirs)
        close((ours, state), (theirs, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name, narrow", [("plain", False), ("clipped", False), ("adam", True), ("groups", False)])
def test_torchs_operator_is_the_pass(name, narrow, dtype, monkeypatch):
    """The same numbers by torch._fused_adamw_: factors, masks, groups, skipped steps; gradients stay as they are."""
    monkeypatch.setattr(multi_tensor, "PIECE", 100)
    rate, mask = optim.cosine(1e-2, warmup=1, steps=9), lambda path, leaf: {"a": 1.0, "c.many": 0.5}.get(path, 0.0)
    tx = {"plain": optim.adamw(rate, mask=mask), "adam": optim.adam(rate, (0.8, 0.99), 1e-3),
          "clipped": optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=optim.linear(0.3, steps=5))),
          "groups": optim.multi({"x": optim.adamw(rate, eps=1e-2), "y": optim.sgd(0.1)}, [("c.*", "x"), ("*", "y")])}[name]
    seen, real = [], torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **b: seen.append(len(a[0])) or real(*a, **b))
    params, grads = problem(dtype)
    grads = [tree.map(lambda g: g.to(torch.bfloat16 if narrow else dtype), one) for one in grads]
    ours, theirs, before = (tree.map(torch.clone, x) for x in ((params, tx.init(params)), (params, tx.init(params)), grads))
    for i, g in enumerate(grads):
        ok = torch.tensor(i != 1)
        ours = optim.fuse(tx)(g, ours[1], ours[0], ok=ok, donate=True, compile=False)
        theirs = optim.fuse(tx)(g, theirs[1], theirs[0], ok=ok, donate=False, compile=False)
    close(ours, theirs)
    close(grads, before, exact=True)
    whole = {"plain": [1, 1, 4], "groups": [1, 2]}  # leaves with the same numbers at once
    pieces = name == "clipped" or narrow
    assert (set(seen), len(seen) > 12) == ({1}, True) if pieces else sorted(seen) == sorted(whole[name] * 2), seen


def test_lengths_and_rates_do_not_recompile():
    tx = optim.sgd(optim.linear(0.1, steps=5))
    step = optim.fuse(tx)
    for rows in (2, 3, 50, 129):
        params = {"w": torch.ones(rows, 64), "v": torch.ones(rows * 64 + 5)}
        for donate in (True,):
            new, state = step(tree.map(torch.ones_like, params), tx.init(params), params, donate=donate)
            close(new, tree.map(lambda p: torch.full_like(p, 0.9), params))
    assert len(step.compiled.graphs) == 1


def test_under_vmap():
    params, grads = problem(torch.float64)
    ranks = lambda t: tree.map(lambda x: torch.stack([x, -x]), t)  # noqa: E731
    tx = CHAINS["adamw"]()
    step = optim.fuse(tx)
    ok = torch.tensor([True, False])

    def one(g, s, p, ok):
        return step(g, s, p, ok=ok, compile=False)

    new, state = torch.vmap(one)(ranks(grads[0]), torch.vmap(tx.init)(ranks(params)), ranks(params), ok)
    close(tree.map(lambda x: x[0], (new, state)), plain_step(tx, grads[0], tx.init(params), params))
    close(tree.map(lambda x: x[1], new), tree.map(torch.neg, params), exact=True)
    assert state[1]["count"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="compile=False"):
        torch.vmap(lambda g: step(g, tx.init(params), params))(ranks(grads[0]))


def test_what_does_not_lie_flat_is_right_too():
    params = {"w": torch.randn(70, 96, dtype=torch.float64).T}
    grads = {"w": torch.randn(96, 70, dtype=torch.float64)}
    tx = optim.adamw(1e-2)
    expected = plain_step(tx, grads, tx.init(params), params)
    close(optim.fuse(tx)(grads, tx.init(params), params, donate=True), expected)


def test_the_plain_step_is_differentiable():
    """Through an optimizer step with torch.func, as meta-learning does."""
    params, grads = problem(torch.float64)
    step, state = optim.fuse(optim.sgd(0.1)), optim.sgd(0.1).init(params)
    slope = torch.func.grad(lambda g: sum(p.sum() for p in tree.leaves(step(g, state, params, compile=False)[0])))(grads[0])
    assert all(torch.allclose(s, torch.full_like(s, -0.1)) for s in tree.leaves(slope))


def test_empty_trees():
    for compile in (True, False):
        assert optim.fuse(optim.adamw(1e-3))({}, optim.adamw(1e-3).init({}), {}, compile=compile)[0] == {}
