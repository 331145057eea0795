"""muP: the scales of the table, the identity at the base, and activations that stay where they are as the model grows."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fmegatron import optim, tree
from fmegatron.models import Config
from fmegatron.models.gpt import gpt
from fmegatron.nn import param
from fmegatron.train.mup import mup, mup_adamw, scales

BASE = Config(layers=2, embed=8, heads=2, mlp=12, vocab=11, init_scaled=False, attention_bias=True, norm="layer")
WIDE = replace(BASE, embed=32, heads=8, mlp=48, layers=4)


def experiment():
    path = Path(__file__).resolve().parents[2] / "experiments/mup_transfer/transfer.py"
    spec = importlib.util.spec_from_file_location("transfer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_table(alpha):
    """B9, with its fourth trap: tables and end norms have eps / m_N only."""
    model, found = mup(WIDE, BASE, alpha=alpha)
    n, deep = 4.0, 2.0
    for path, declared in tree.to_paths(model.declare).items():
        got = found[path]
        values = (got.init, got.rate, got.decay, got.eps)
        if not path.startswith("layers"):
            expected = (1, 1, 1 if "norm" not in path else 0, 1 / n)
        elif param.matrix(declared):
            expected = (n**-0.5, deep ** (alpha - 1) / n, n, deep**-alpha / n)
            assert declared.init.std == pytest.approx(0.02 * n**-0.5)
        else:
            expected = (1, deep ** (alpha - 1), 0, deep**-alpha / n)
        assert values == pytest.approx(expected), path
    assert model.config.logit_multiplier == 1 / n and model.config.residual_multiplier == deep**-alpha
    halved = mup(replace(WIDE, hd=16, heads=4), BASE, attention=True)[0].config
    assert halved.attention_scale == pytest.approx(math.sqrt(4) / 16)


def test_a_fan_in_that_does_not_grow_is_not_scaled():
    """Read off the leaf's own inputs: the mlp alone is four times as wide."""
    own = replace(BASE, mlp=48)
    found = scales(gpt(own).declare, own.sizes, BASE.sizes)
    assert found["layers.0.mlp.down"].rate == 0.25 and found["layers.0.mlp.up"].rate == 1.0


def test_the_base_is_plain():
    model, found = mup(BASE, BASE)
    plain = gpt(BASE)
    batch = {"tokens": torch.arange(12).reshape(2, 6) % 11, "labels": torch.arange(12).reshape(2, 6) % 7}
    params = model.init(0, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(params), tree.leaves(plain.init(0, torch.float64)), strict=True))
    assert torch.equal(model.loss(params, batch)[0]["ce"][0], plain.loss(params, batch)[0]["ce"][0])
    for decouple in (False, True):
        ours = mup_adamw(found, 1e-2, decouple=decouple)
        theirs = optim.adamw(1e-2, mask=param.decay_mask(plain.declare)) if not decouple else optim.decoupled_adamw(
            1e-2, weight_decay=0.1, mask=param.decay_mask(plain.declare))
        grads = plain.init(1, torch.float64)
        for a, b in zip(*(tree.leaves(tx.update(grads, tx.init(params), params)[0]) for tx in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("decouple", [False, True])
def test_trap_5_decay_is_the_same_for_all_widths(decouple):
    model, found = mup(WIDE, BASE)
    params = model.init(0, torch.float64)
    tx = mup_adamw(found, 1e-2, weight_decay=0.1, decouple=decouple)
    still = tree.map(torch.zeros_like, params)
    updates, _ = tx.update(still, tx.init(params), params)
    by = -0.1 if decouple else -0.1 * 1e-2
    for path, u in tree.to_paths(updates).items():
        p = tree.to_paths(params)[path]
        torch.testing.assert_close(u, p * (by if found[path].decay else 0), rtol=1e-12, atol=0, msg=path)


def test_trap_6_eps_by_leaf():
    """A gradient far below eps moves a leaf by rate * g / (eps k)."""
    _, found = mup(WIDE, BASE)
    tx = mup_adamw(found, 1.0, eps=1.0, weight_decay=0.0)
    params = mup(WIDE, BASE)[0].init(0, torch.float64)
    g = tree.map(lambda p: torch.full_like(p, 1e-9), params)
    updates, _ = tx.update(g, tx.init(params), params)
    for path, u in tree.to_paths(updates).items():
        expected = -found[path].rate * 1e-9 / found[path].eps
        torch.testing.assert_close(u, torch.full_like(u, expected), rtol=1e-6, atol=0, msg=path)


def test_coordinates_stay_with_muP_and_grow_without():
    run = experiment()
    flat, growing = (run.coordinates([1, 4], scaled, steps=3) for scaled in (True, False))
    for i in (0, 1):
        assert 0.4 < flat[4][i] / flat[1][i] < 1.6
        assert growing[4][i] / growing[1][i] > 4


def test_coordinates_stay_in_depth_with_CompleteP_and_grow_without():
    """What steps change is a sum of m_L like terms, each times 1 / m_L; what a draw adds falls: the table's size is left."""
    run = experiment()
    flat, growing = (run.coordinates([1, 8], scaled, steps=3, depth=True) for scaled in (True, False))
    assert 0.4 < flat[8][1] / flat[1][1] < 1.6, flat
    assert 0.9 * run.BASE.init_std < flat[8][0] < flat[1][0]
    assert all(growing[8][i] / growing[1][i] > 2.5 for i in (0, 1)), growing


def test_the_experiment_runs(tmp_path):
    experiment().main(["--steps", "4", "--widths", "1,2", "--depths", "1", "--rates=-7,-6", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "transfer.json").read_text())
    assert set(results) == {"standard", "muP"} and (tmp_path / "transfer.png").stat().st_size > 10_000


def test_errors():
    with pytest.raises(ValueError, match="layers = 4"):
        mup(replace(WIDE, init_scaled=True), BASE)
