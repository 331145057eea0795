"""What the tests of optimizers share: a small problem, and how torch.optim and optax solve it."""

from __future__ import annotations

import jax
import optax
import torch

from fmegatron import optim, tree

STEPS = 6


def problem(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    params = {"embed": torch.randn(7, 4, generator=g, dtype=dtype),
              "layers": {"0": {"up": torch.randn(2, 4, 5, generator=g, dtype=dtype),
                               "norm": torch.randn(2, 4, generator=g, dtype=dtype)}},
              "norm": torch.randn(4, generator=g, dtype=dtype)}
    grads = [tree.map(lambda p: torch.randn(p.shape, generator=g, dtype=dtype), params) for _ in range(STEPS)]
    return params, grads


def train(tx, params, grads):
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def assert_close(a, b, tolerance=1e-12):
    assert tree.to_paths(a).keys() == tree.to_paths(b).keys()
    for path, x in tree.to_paths(a).items():
        torch.testing.assert_close(x, tree.to_paths(b)[path], rtol=tolerance, atol=tolerance, msg=lambda m, p=path: f"{p}: {m}")


def in_torch(build, params, grads):
    leaves, spec = tree.flatten(params)
    weights = [torch.nn.Parameter(p.clone()) for p in leaves]
    optimizer = build(weights)
    for g in grads:
        for w, leaf in zip(weights, tree.leaves(g), strict=True):
            w.grad = leaf.clone()
        optimizer.step()
    return spec.unflatten([w.detach() for w in weights])


def in_optax(tx, params, grads):
    with jax.enable_x64(True):
        there = jax.tree.map(lambda t: jax.numpy.asarray(t.numpy()), params)
        state = tx.init(there)
        for g in grads:
            updates, state = tx.update(jax.tree.map(lambda t: jax.numpy.asarray(t.numpy()), g), state, there)
            there = optax.apply_updates(there, updates)
        return jax.tree.map(lambda a: torch.tensor(jax.device_get(a)), there)


def everywhere(path, leaf):
    return True
