"""Held-out sums are those of the model's own loss: what a node calls its own has the node's number outside of it."""

from __future__ import annotations

import pytest
import torch
from pieces import batches, model

from fmegatron.models.gpt import routes
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, virtual_mesh
from fmegatron.train import make_evaluate
from fmegatron.train.leaves import plan_leaves
from fmegatron.tree import map_with_path


@pytest.mark.parametrize("sh", [SINGLE, Sharding(virtual_mesh(dp=2, tp=2), RULES["fsdp_tp_sp"])], ids=["single", "mesh"])
def test_replayed_routes_are_replayed_in_evaluation(sh):
    experts = model(moe=Moe(experts=4, top_k=1, mlp=8, normalize=False))
    params = experts.init(0, torch.float64)
    batch = next(batches(1))
    replayed = batch | routes(experts, experts.init(1, torch.float64), batch)
    bound = sh.bind(experts.sizes)
    leaves = plan_leaves(experts, bound)
    local = map_with_path(lambda path, x: shard(bound, x, leaves[path].param.names, "storage"), params)
    evaluate, sums = make_evaluate(experts, sh), []
    for given in (batch, replayed):
        names = {key: "batch seq top" if key.startswith("route") else "batch seq" for key in given}
        found = evaluate(local, {key: shard(bound, x, names[key]) for key, x in given.items()})
        total, count = experts.loss(params, given)[0]["ce"]
        assert torch.allclose(found["ce.sum"], total, rtol=1e-12) and torch.allclose(found["ce.count"], count)
        sums.append(total)
    assert abs(sums[0] - sums[1]) > 1e-6
