"""A step's graphs are compiled before it runs: nothing is computed or waited for meanwhile, and the numbers are the same."""

from __future__ import annotations

import pytest
import torch

from fmegatron import inductor, optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.programs import Programs
from fmegatron.sharding import SINGLE
from fmegatron.testing import assert_trees_all_close
from fmegatron.train import ahead
from fmegatron.train.state import init
from fmegatron.train.step import make_step
from fmegatron.transforms import why_not_compile


@pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))
def test_all_graphs_are_under_way_before_the_first_is_waited_for(monkeypatch, tmp_path):
    model, programs = gpt(Config(layers=2, embed=16, heads=2, mlp=24, vocab=40)), Programs(tmp_path, "a test")
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.lion(1e-2))
    batch = {"tokens": torch.arange(32).reshape(2, 16) % 40}
    events = []

    def noted(what, method):
        return lambda self, *args: (events.append(what) if self.sources else None, method(self, *args))[1]

    monkeypatch.setattr(inductor.Kernels, "build", noted("build", inductor.Kernels.build))
    monkeypatch.setattr(inductor.Kernels, "_first", noted("wait", inductor.Kernels._first))

    def two_steps(**settings):
        step, state = make_step(model, tx, SINGLE, **settings), init(model, tx, SINGLE)
        for _ in range(2):
            state, metrics = step(state, batch)
        return state.params, metrics["loss"], metrics["grad_norm"]

    compiled = two_steps(compile=True, remat="full", programs=programs)
    builds = events.count("build")
    assert builds == 5  # the layer's and the loss's forward and backward, the optimizer
    assert events[:builds] == ["build"] * builds
    assert_trees_all_close(compiled, two_steps(), 1e-5)

    monkeypatch.setattr(ahead, "paused", None)  # a second start compiles nothing ahead
    assert_trees_all_close(two_steps(compile=True, remat="full", programs=programs), compiled, 0.0)


@pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))
@pytest.mark.parametrize("kind", [pytest.param("operator", marks=pytest.mark.long), "reads a value"])
def test_optimizers_that_read_values_run(kind):
    model, adam = gpt(Config(layers=1, embed=8, heads=1, mlp=8, vocab=12)), optim.adamw(1e-2)

    def reading(grads, state, params, **options):
        assert isinstance(sum(float(g.sum()) for g in tree.leaves(grads)), float)
        return adam.update(grads, state, params, **options)

    tx = adam if kind == "operator" else optim.Transform(adam.init, reading)
    batch = {"tokens": torch.arange(16).reshape(2, 8) % 12}
    made = []
    for compile in (True, False):
        step = make_step(model, tx, SINGLE, compile=compile, donate=True)
        state = init(model, tx, SINGLE, 0, dtype=torch.float64)
        for _ in range(2):
            state, _ = step(state, batch)
        made.append(state.params)
    assert_trees_all_close(made[0], made[1], 1e-10)
