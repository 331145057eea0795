"""Second derivatives of the whole model, sharded, are one device's: every way to nest forward and reverse."""

from __future__ import annotations

import pytest
import torch

from fmegatron import tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, shard_map, virtual_mesh
from fmegatron.testing import assert_trees_all_close

MODEL = gpt(Config(layers=2, embed=8, heads=4, kv=2, mlp=12, vocab=21, vocab_pad=8, qk_norm="norm", z_loss=1e-3))
MESHES = {"tp_sp": {"cp": 2, "tp": 2}, "fsdp_tp_sp": {"dp": 2, "tp": 2}, "tp": {"tp": 4}}


def loss_on(sh):
    """The summed loss as a function of global parameters."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 21, (2, 8), generator=generator) for _ in range(2))

    def on_rank(here, params, tokens, labels):
        terms, _ = MODEL.loss(params, {"tokens": tokens, "labels": labels}, sh=here)
        return sum(total for total, _ in terms.values())

    names = tree.map(lambda p: p.names, MODEL.declare)
    mapped = shard_map(on_rank, sh.bind(MODEL.sizes), [names, "batch seq", "batch seq"], "", ["storage", "compute", "compute"])
    return lambda params: mapped(params, tokens, labels)


def without_pads(params):
    return tree.map(lambda p, x: x[:21] if p.names.startswith("vocab") else x, MODEL.declare, params)


def reverse_over_reverse(f, x, v):
    def along(x):
        return sum((g * t).sum() for g, t in zip(tree.leaves(torch.func.grad(f)(x)), tree.leaves(v), strict=True))

    return torch.func.grad(along)(x)


def forward_over_reverse(f, x, v):
    return torch.func.jvp(torch.func.grad(f), (x,), (v,))[1]


def reverse_over_forward(f, x, v):
    return torch.func.grad(lambda x: torch.func.jvp(f, (x,), (v,))[1])(x)


@pytest.mark.parametrize("product", [reverse_over_reverse, forward_over_reverse, reverse_over_forward])
@pytest.mark.parametrize("rules", MESHES)
def test_hessian_vector_products_are_one_devices(rules, product):
    params, direction = without_pads(MODEL.init(0, torch.float64)), without_pads(MODEL.init(1, torch.float64))
    sh = Sharding(virtual_mesh(**MESHES[rules]), RULES[rules])
    expected = reverse_over_reverse(loss_on(SINGLE), params, direction)
    assert_trees_all_close(product(loss_on(sh), params, direction), expected, 1e-10)
