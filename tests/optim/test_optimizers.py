"""Optimizers against torch.optim and optax, under vmap, with masks and clips."""

from __future__ import annotations

import optax
import pytest
import torch
from oracles import assert_close, everywhere, in_optax, in_torch, problem, train

from fmegatron import optim, tree


@pytest.mark.parametrize("ours, theirs", [
    (optim.adamw(1e-2, mask=everywhere),
     lambda w: torch.optim.AdamW(w, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)),
    (optim.adamw(1e-2, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.0),
     lambda w: torch.optim.AdamW(w, lr=1e-2, betas=(0.8, 0.99), eps=1e-3, weight_decay=0)),
    (optim.adam(1e-2), lambda w: torch.optim.Adam(w, lr=1e-2, betas=(0.9, 0.95))),
    (optim.sgd(0.1), lambda w: torch.optim.SGD(w, lr=0.1)),
    (optim.sgd(0.1, momentum=0.9), lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9)),
    (optim.sgd(0.1, momentum=0.9, nesterov=True), lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, nesterov=True)),
    (optim.sgd(0.1, momentum=0.9, weight_decay=0.3, mask=everywhere),
     lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, weight_decay=0.3)),
], ids=["adamw", "adamw-eps", "adam", "sgd", "momentum", "nesterov", "coupled"])
def test_torch(ours, theirs):
    params, grads = problem()
    assert_close(train(ours, params, grads)[0], in_torch(theirs, params, grads))


MASK = {"embed": True, "layers": {"0": {"up": True, "norm": False}}, "norm": False}


@pytest.mark.parametrize("ours, theirs", [
    (optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(optim.cosine(1e-2, warmup=2, steps=5, min=1e-3))),
     optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
         optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 5, 1e-3), 0.9, 0.95, 1e-8, weight_decay=0.1, mask=MASK))),
    (optim.chain(optim.clip_by_value(0.5), optim.sgd(0.1, momentum=0.9, nesterov=True)),
     optax.chain(optax.clip(0.5), optax.sgd(0.1, 0.9, nesterov=True))),
    (optim.adam(1e-2, eps_root=0.1), optax.adam(1e-2, 0.9, 0.95, eps_root=0.1)),
], ids=["adamw", "sgd", "adam"])
def test_optax(ours, theirs):
    """With the default mask: matrices decay; norms, stacked or not, do not."""
    params, grads = problem()
    tolerance = 2e-5 if isinstance(ours.form[0].form, optim.base.Scaling) else 1e-12  # optax has no 1e-6 beside the norm
    assert_close(train(ours, params, grads)[0], in_optax(theirs, params, grads), tolerance)


def test_clip_is_torchs():
    params, grads = problem()
    for scale in (1e-3, 1.0, 1e3):
        g = tree.map(lambda x, by=scale: x * by, grads[0])
        clipped, _ = optim.clip_by_global_norm(1.5).update(g, {}, params)
        weights = [torch.nn.Parameter(p.clone()) for p in tree.leaves(params)]
        for w, leaf in zip(weights, tree.leaves(g), strict=True):
            w.grad = leaf.clone()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.5)
        assert float(norm) == pytest.approx(float(optim.LOCAL.norm(g)), rel=1e-12)
        for a, w in zip(tree.leaves(clipped), weights, strict=True):
            torch.testing.assert_close(a, w.grad, rtol=1e-12, atol=0)
    small = tree.map(lambda x: x * 1e-3, grads[0])
    assert all(torch.equal(a, b) for a, b in zip(
        tree.leaves(optim.clip_by_global_norm(1.5).update(small, {}, params)[0]), tree.leaves(small), strict=True))


def test_a_known_norm_is_not_taken_again():
    params, grads = problem()
    over = optim.Known(optim.LOCAL, grads[0], torch.tensor(100.0))
    clip = optim.clip_by_global_norm(1.0)
    clipped, _ = clip.update(grads[0], {}, params, over=over)
    torch.testing.assert_close(clipped["norm"], grads[0]["norm"] / 100, rtol=1e-6, atol=0)
    other = dict(grads[0])
    assert_close(clip.update(other, {}, params, over=over)[0], clip.update(other, {}, params)[0])


@pytest.mark.parametrize("mask", [MASK, lambda path, leaf: path in ("embed", "layers.0.up"), None])
def test_masks(mask):
    """With no gradient the masked leaves stay and the others shrink by rate * decay."""
    params, grads = problem()
    still = tree.map(torch.zeros_like, grads[0])
    after, _ = train(optim.adamw(0.5, weight_decay=0.2, mask=mask), params, [still])
    for path, p in tree.to_paths(params).items():
        expected = p * 0.9 if tree.to_paths(MASK)[path] else p
        torch.testing.assert_close(tree.to_paths(after)[path], expected, rtol=1e-12, atol=0, msg=path)


def test_a_multiplier_and_a_schedule_for_decay():
    params, grads = problem()
    still = [tree.map(torch.zeros_like, grads[0])] * 2
    tx = optim.adamw(0.5, weight_decay=optim.linear(0.4, steps=2), mask=lambda path, leaf: 0.5)
    after, _ = train(tx, params, still)
    assert_close(after, tree.map(lambda p: p * 0.9 * 0.95, params))


@pytest.mark.parametrize("build", [
    lambda lr: optim.adamw(lr), lambda lr: optim.sgd(lr, momentum=0.9),
    lambda lr: optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(optim.cosine(lr, warmup=1, steps=9)))])
def test_vmap_over_learning_rates(build):
    params, grads = problem()
    rates = torch.tensor([1e-1, 1e-2, 1e-3], dtype=torch.float64)
    mapped = torch.vmap(lambda lr: train(build(lr), params, grads)[0])(rates)
    loop = [train(build(float(lr)), params, grads)[0] for lr in rates]
    assert_close(mapped, tree.map(lambda *xs: torch.stack(xs), *loop), 1e-13)


def test_vmap_over_ranks():
    """State made under vmap has the leading dim of its ranks, counts too."""
    params, grads = problem()
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    stack = lambda t: tree.map(lambda x: torch.stack([x, 2 * x]), t)  # noqa: E731
    state = torch.vmap(tx.init)(stack(params))
    assert state[1]["count"].shape == (2,) and state[1]["count"].dtype == torch.int64
    updates, state = torch.vmap(tx.update)(stack(grads[0]), state, stack(params))
    for rank in range(2):
        one = tree.map(lambda x, r=rank: x * (1 + r), params), tree.map(lambda x, r=rank: x * (1 + r), grads[0])
        alone, _ = tx.update(one[1], tx.init(one[0]), one[0])
        assert_close(tree.map(lambda u, r=rank: u[r], updates), alone, 1e-13)
    assert state[1]["count"].tolist() == [1, 1]


def test_structures_and_dtypes():
    params, grads = problem(torch.float32)
    holes, _ = tree.partition(params, lambda path, leaf: path != "norm")
    g, _ = tree.partition(grads[0], lambda path, leaf: path != "norm")
    g = tree.map(lambda x: x.bfloat16(), g)  # gradients of low precision, state and parameters in fp32
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    state = tx.init(holes)
    updates, new = tx.update(g, state, holes)
    assert updates["norm"] is None and tree.to_paths(updates).keys() == tree.to_paths(holes).keys()
    assert all(u.dtype == torch.float32 for u in tree.leaves(updates))
    assert {p: (s.shape, s.dtype) for p, s in tree.to_paths(state).items()} == {
        p: (s.shape, s.dtype) for p, s in tree.to_paths(new).items()}
    assert set(tree.to_paths(state)) >= {"1.count", "1.mu.embed", "1.nu.layers.0.up", "2.count", "3.count"}


@pytest.mark.parametrize("build, word", [
    (lambda: optim.adamw(1e-3, betas=(0.9, 1.0)), "0.9, 1: each"), (lambda: optim.clip_by_global_norm(0.0), "0.0"),
    (lambda: optim.clip_by_value(-1.0), "-1.0")])
def test_errors_name_the_numbers(build, word):
    with pytest.raises(ValueError, match=word):
        build()
