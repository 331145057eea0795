"""A node's parameters in use: what is freed comes back as it was, also where leaves share the memory of a bucket."""

from __future__ import annotations

import torch

from fmegatron import random, tree
from fmegatron.models import Config, gpt
from fmegatron.sharding import RULES, Sharding, spmd, thread_mesh
from fmegatron.train.leaves import plan_leaves
from fmegatron.train.state import init_params
from fmegatron.train.weights import Weights


def test_freed_parameters_come_back():
    # query and key norms of 4 features lie one by one on 4 ranks: gathered, both are views of their bucket
    model = gpt(Config(layers=1, embed=16, heads=4, kv=2, mlp=24, vocab=32, qk_norm="norm", norm="layer", init_std=1.0))
    sh = Sharding(thread_mesh(dp=4), RULES["fsdp"]).bind(model.sizes)
    leaves, node = plan_leaves(model, sh), model.chain[1]

    def on_rank(here, like):
        params = init_params(model, here, leaves, random.key(0), torch.float64)
        params = tree.map(lambda x: x + torch.arange(x.numel()).reshape(x.shape) + here.rank, params)  # no two alike
        weights = Weights(here, leaves, tree.to_paths(params), None, 1, free=True)
        weights.plan([node, node])
        own = weights.take(node)
        before = tree.map(torch.clone, own)
        tree.map(lambda x: x.fill_(float("nan")), own)  # what is not filled again stays wrong, whatever malloc returns
        weights.leave(node, own)
        assert all(x.untyped_storage().size() == 0 for x in tree.leaves(own))
        weights.restore(node, own)
        return tree.map(lambda x, y: (x == y).all(), own, before)

    same = tree.to_paths(spmd(sh, on_rank)(torch.zeros(4)))
    wrong = [path for path, ranks in same.items() if not ranks.all()]
    assert not wrong, f"not restored: {', '.join(wrong)}"
