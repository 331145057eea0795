"""A model with experts made of a dense one computes what the dense one does, whole experts or pieces, and then can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fmegatron import tree
from fmegatron.models import Config, gpt, upcycle
from fmegatron.nn.moe import Moe

DENSE = Config(layers=3, embed=16, heads=4, kv=2, mlp=24, vocab=29, init_std=0.3)


@pytest.mark.parametrize("moe, change", [
    (Moe(4, 2), {}),
    (Moe(8, 3, score="sigmoid", balance_bias=True, first_dense=1), {"mlp_bias": True}),
    (Moe(6, 4, mlp=12, scale=2.0), {"mlp_bias": True, "activation": "gelu"}),
    (Moe(12, 3, mlp=8, scale=3.0, layers=(True, False, True)), {}),
])  # fmt: skip
def test_it_starts_where_the_dense_one_stopped(moe, change):
    dense = gpt(replace(DENSE, **change))
    params = tree.map(lambda x: x + 0.1 * torch.randn_like(x), dense.init(0, torch.float64))
    model, grown = upcycle(dense, params, moe, key=1)
    tokens = torch.randint(0, 29, (2, 9))
    torch.testing.assert_close(model.logits(grown, tokens), dense.logits(params, tokens), rtol=1e-12, atol=1e-12)
    assert tree.to_paths(grown).keys() == tree.to_paths(model.init(0)).keys()
    assert [x.shape for x in tree.leaves(grown)] == [x.shape for x in tree.leaves(model.init(0))]
    router = next(x for path, x in tree.to_paths(grown).items() if path.endswith("router.weight"))
    assert router.std() > 0.1


@pytest.mark.parametrize("moe, said", [
    (Moe(4, 2, normalize=False), "moe.normalize = False: to start from a dense block it is True"),
    (Moe(4, 2, shared=8), "moe.shared = 8"),
    (Moe(8, 4, mlp=12), "moe.scale = 1.0: to start from a dense block it is 2.0"),
    (Moe(8, 3, mlp=12, scale=2.0), "experts = 8 and top_k = 3 must be multiples"),
])  # fmt: skip
def test_what_could_not_be_the_same(moe, said):
    dense = gpt(DENSE)
    with pytest.raises(ValueError, match=said):
        upcycle(dense, dense.init(0), moe)
