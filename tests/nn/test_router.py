"""The router against Megatron-LM's and transformers' own, its gradient against differences, ties, replay, losses on a mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from fmegatron import optim
from fmegatron.models import Config, gpt
from fmegatron.models.gpt import routes
from fmegatron.nn import router
from fmegatron.nn.moe import Moe
from fmegatron.nn.router import Router
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, spmd, virtual_mesh
from fmegatron.testing import assert_same, measure
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.state import init
from fmegatron.train.step import make_step

T, E = 64, 16


def logits(seed=0, t=T):
    return torch.randn(t, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(r, x, balance=None, train=False):
    index = router.choose(r, x, balance, train)
    return torch.zeros_like(x).scatter(1, index, router.weights_of(r, x, index)), router.hits(x, index).bool()


@pytest.mark.parametrize("r, theirs", [
    (Router(E, 4), {}),
    (Router(E, 4, normalize=False, scale=2.0), {"use_pre_softmax": True, "scaling_factor": 2.0}),
    (Router(E, 4, score="sigmoid", scale=2.5), {"score_function": "sigmoid", "scaling_factor": 2.5}),
    (Router(E, 1, score="sigmoid", normalize=False), {"score_function": "sigmoid"}),
    (Router(E, 4, score="sigmoid", groups=4, group_top_k=2), {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2}),
    (Router(E, 4, groups=8, group_top_k=4), {"num_groups": 8, "group_topk": 4}),
    (Router(E, 4, score="sigmoid", balance_bias=True), {"score_function": "sigmoid"}),
])  # fmt: skip
def test_choice_and_weights_are_megatrons(r, theirs):
    x, balance = logits(), torch.linspace(-0.5, 0.5, E, dtype=torch.float64) if r.balance_bias else None
    probs, chosen = moe_utils.topk_routing_with_score_function(x.float().double(), r.top_k, expert_bias=balance, **theirs)
    mine, hit = ours(r, x.float().double(), balance)
    assert torch.equal(hit, chosen)
    torch.testing.assert_close(mine, probs, rtol=1e-6, atol=1e-7)  # theirs computes scores in fp32


def test_sqrtsoftplus():
    r, x = Router(E, 3, score="sqrtsoftplus", scale=1.5), logits()
    s = (1 + x.exp()).log().sqrt()
    best, index = s.topk(3)
    mine, _ = ours(r, x)
    torch.testing.assert_close(mine.gather(1, index), 1.5 * best / best.sum(-1, keepdim=True))


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_is_megatrons(k):
    x = 3 * logits() + torch.linspace(0, 4, E)  # uneven
    r = Router(E, k, sinkhorn=True)
    wanted = moe_utils.sinkhorn(x.clone())
    torch.testing.assert_close(router.sinkhorn(x), wanted)
    _, hit = ours(r, x, train=True)
    assert torch.equal(hit, router.hits(x, wanted.topk(k).indices).bool())
    assert hit.sum(0).double().std() < 0.5 * ours(r, x)[1].sum(0).double().std()  # only in training
    stacked = torch.vmap(router.sinkhorn)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(stacked[1], router.sinkhorn(2 * x))


def test_deepseeks_router_is_transformers():
    from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

    c = configuration_deepseek_v3.DeepseekV3Config(
        hidden_size=E, n_routed_experts=E, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    gate = modeling_deepseek_v3.DeepseekV3TopkRouter(c)
    bias, x = torch.linspace(-0.3, 0.3, E), logits().float()
    with torch.no_grad():
        gate.weight.copy_(torch.eye(E))
        gate.e_score_correction_bias.copy_(bias)
        _, weight, index = gate(x)
    r = Router(E, 4, score="sigmoid", groups=4, group_top_k=2, group_best=2, scale=2.5, balance_bias=True)
    mine, _ = ours(r, x, bias)
    torch.testing.assert_close(mine, torch.zeros_like(x).scatter(1, index, weight))


def test_ties_go_to_the_lower_number_and_a_load_can_be_forced():
    assert router.top_k(torch.zeros(3, 9), 4).tolist() == [[0, 1, 2, 3]] * 3
    assert router.choose(Router(E, 4, score="sigmoid", groups=4, group_top_k=2), torch.zeros(1, E)).tolist() == [[0, 1, 2, 3]]
    _, hit = ours(Router(E, 2, forced=True), logits())
    assert (hit.sum(0) == T * 2 // E).all()


@pytest.mark.parametrize("r", [Router(E, 3), Router(E, 3, normalize=False), Router(E, 3, score="sigmoid", scale=2.5),
                               Router(E, 3, score="sqrtsoftplus")])  # fmt: skip
def test_the_gradient_is_that_of_differences(r):
    r = replace(r, switch_loss=0.3, sequence_loss=0.2, global_loss=0.1, z_loss=0.05)
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((2, 6, 5), (5, E)))
    sh = SINGLE.bind({"embed": 5, "router_expert": E})

    def value(x, w):
        out = router.apply(sh, r, {"weight": w}, x, {}, None)
        return (out.weight * torch.arange(1, 4)).sum() + sum(out.terms.values())

    x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(value, (x, w), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_losses_are_megatrons(score):
    r = Router(E, 4, score=score, switch_loss=0.3, sequence_loss=0.2, global_loss=0.1, z_loss=0.05)
    x = logits().unflatten(0, (4, 16))
    sh = SINGLE.bind({"embed": 5, "router_expert": E})
    terms = router.losses(sh, r, x, router.shares_of(r, x))
    counts = router.denominators(sh, r, x[..., 0])

    def switch(x, c):
        chosen, p = moe_utils.compute_routing_scores_for_aux_loss(x.flatten(0, -2), 4, score)
        return moe_utils.switch_load_balancing_loss_func(p, chosen.sum(0), len(p), 4, E, c)

    wanted = {"balance_switch": switch(x, 0.3), "balance_sequence": sum(switch(y, 0.2) for y in x) / 4}
    wanted |= {"balance_global": switch(x, 0.1), "router_z": moe_utils.z_loss_func(x, 0.05)}
    for term, value in wanted.items():
        torch.testing.assert_close(terms[term] / counts[term], value.to(x.dtype), rtol=1e-6, atol=0)


def test_the_switch_loss_is_of_a_ranks_rows_and_whole_sequences():
    r, x = Router(E, 4, switch_loss=0.3, global_loss=0.1), logits().unflatten(0, (4, 16))
    sizes = {"embed": 5, "router_expert": E}

    def on(**axes):
        sh = Sharding(virtual_mesh(**axes), RULES["tp_sp"]).bind(sizes)
        run = spmd(sh, lambda sh, x: (router.losses(sh, r, x, router.shares_of(r, x)), router.denominators(sh, r, x[..., 0])))
        sums, counts = run(shard(sh, x, "batch seq router_expert"))
        return {term: sums[term].sum() / counts[term].sum() for term in sums}

    def alone(x):
        sh = SINGLE.bind(sizes)
        return router.losses(sh, r, x, router.shares_of(r, x))

    halves = [alone(half)["balance_switch"] for half in x.chunk(2)]
    torch.testing.assert_close(on(dp=2, cp=2)["balance_switch"], sum(halves) / 2)
    for term, value in on(cp=2, tp=2).items():
        torch.testing.assert_close(value, alone(x)[term])
    torch.testing.assert_close(on(dp=2, cp=2)["balance_global"], alone(x)["balance_global"])


AVERAGED = Router(E, 4, global_loss=0.1, global_average=True)


def test_loads_averaged_over_microbatches_are_megatrons():
    """Its sum of loads so far over the number of microbatches, in its loss; here each is given what the one before has left."""
    sh, before, total = SINGLE.bind({"embed": 5, "router_expert": E}), None, 0.0
    for i in range(1, 4):
        x = logits(i).unflatten(0, (4, 16))
        terms = router.losses(sh, AVERAGED, x, router.shares_of(AVERAGED, x), before)
        chosen, p = moe_utils.compute_routing_scores_for_aux_loss(x.flatten(0, -2), 4, "softmax")
        before, total = terms.pop("load"), total + chosen.sum(0)
        wanted = moe_utils.switch_load_balancing_loss_func(p, total / i, T, 4, E, 0.1)
        torch.testing.assert_close(terms["balance_global"], wanted.to(x.dtype), rtol=1e-6, atol=0)


def averaged():
    """A model whose routers' loads are averaged, and a batch."""
    c = Config(layers=2, embed=16, heads=4, kv=2, mlp=24, vocab=32, mtp=1,
               moe=Moe(experts=8, top_k=2, mlp=8, global_loss=0.5, global_average=True))  # fmt: skip
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (4, 8), generator=g)
    weights = torch.rand(4, 8, generator=g, dtype=torch.float64)
    return gpt(c), {"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": weights}


def test_a_step_hands_loads_from_microbatch_to_microbatch(monkeypatch):
    """Against the definition, from all microbatches' shares; on a mesh and when layers run again the same."""
    (model, batch), right, seen = averaged(), router.losses, []

    def losses(sh, router, logits, shares, before):
        seen.append(shares.detach())
        return right(sh, router, logits, shares, before)

    with monkeypatch.context() as patch:
        patch.setattr(router, "losses", losses)
        one = measure(model, SINGLE, batch, microbatches=4)
    by_layer, wanted = [torch.stack(seen[-12 + i :: 3]) for i in range(3)], 0.0  # [4 microbatches, 1, 8, 8]
    for p in by_layer:
        load = torch.stack([torch.zeros(8).index_add(0, q.topk(2).indices.flatten(), torch.ones(16)) for q in p])
        mean = load.cumsum(0) / torch.arange(1, 5)[:, None]
        wanted += 0.5 * 8 / (2 * 8**2) * (mean * p.sum((1, 2))).sum() / 4
    torch.testing.assert_close(one.metrics["balance_global"], wanted)
    there = measure(model, Sharding(virtual_mesh(cp=2, tp=2), RULES["fsdp_tp_sp"]), batch, microbatches=4, remat="full")
    assert_same(there, one, 1e-10)


@pytest.mark.parametrize("name, ranks, sizes, remat", [
    ("1f1b", 2, {"cp": 2}, "none"),
    pytest.param("gpipe", 3, {"dp": 1}, "full", marks=pytest.mark.long),
    pytest.param("interleaved_1f1b", 2, {"tp": 2}, "full", marks=pytest.mark.long),
    pytest.param("zb_h1", 2, {}, "none", marks=pytest.mark.long),
])  # fmt: skip
def test_stages_hand_loads_on_too(name, ranks, sizes, remat):
    """Each to its own next microbatch, whatever others have under way."""
    model, batch = averaged()
    sh = Sharding(virtual_mesh(**sizes), RULES["fsdp_tp_sp"]) if sizes else SINGLE  # a vmap does not split a backward
    schedule = make_schedule(name, ranks, None, 4)
    model = gpt(replace(model.config, layers=schedule.stages))
    one = measure(model, SINGLE, batch, microbatches=4)
    assert_same(measure(model, sh, batch, remat=remat, pipeline=Pipeline(schedule)), one, 1e-10)


@pytest.mark.long
def test_a_compiled_step_hands_loads_on_too():
    model, batch = averaged()
    batch["weights"] = batch["weights"].float()
    state, found = init(model, optim.sgd(0.1), SINGLE), []
    for compile in (False, True):
        step = make_step(model, optim.sgd(0.1), SINGLE, microbatches=4, compile=compile)
        found.append(step(state, batch))
    (eager, a), (compiled, b) = found
    torch.testing.assert_close(b["balance_global"], a["balance_global"])
    torch.testing.assert_close(compiled.params, eager.params, rtol=1e-5, atol=1e-6)


def test_routing_is_recorded_and_replayed():
    c = Config(layers=2, embed=16, heads=4, kv=2, mlp=24, vocab=32, moe=Moe(experts=8, top_k=2, mlp=8))
    model = gpt(c)
    params, other = model.init(0), model.init(1)
    tokens = torch.randint(0, 32, (2, 8))
    batch = {"tokens": tokens}
    record = routes(model, params, batch)
    assert {name: x.shape for name, x in record.items()} == {"route.1": (2, 8, 2), "route.2": (2, 8, 2)}
    same, again = model.loss(params, batch)[0], model.loss(params, {**batch, **record})[0]
    assert torch.equal(same["ce"][0], again["ce"][0])
    assert not torch.equal(routes(model, other, batch)["route.2"], record["route.2"])
    replayed = model.loss(other, {**batch, **record})[1]["taps"]["experts/02.load"]
    assert torch.equal(replayed, torch.bincount(record["route.2"].flatten(), minlength=8).float())
    step = make_step(model, optim.sgd(0.1), SINGLE, microbatches=2)
    _, metrics = step(init(model, optim.sgd(0.1), SINGLE), {**batch, **record})
    assert torch.equal(metrics["tap.sum.experts/02.load"], replayed)


def test_jitter_and_sinkhorn_are_of_training_alone():
    c = Config(layers=1, embed=16, heads=4, kv=2, mlp=24, vocab=32, moe=Moe(experts=8, top_k=2, mlp=8, jitter=0.3))
    model = gpt(c)
    assert model.dropout
    params, batch = model.init(0), {"tokens": torch.randint(0, 32, (2, 8))}
    from fmegatron import random

    value = [model.loss(params, batch, key=key)[0]["ce"][0] for key in (None, None, random.key(0), random.key(1))]
    assert value[0] == value[1] != value[2] != value[3]


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_a_router_computes_in_its_own_dtype(dtype):
    """Of rows in bf16: scores, weights and losses are those of the same rows in that dtype."""
    wide = router.DTYPES[dtype]
    r, sh = Router(E, 3, router_dtype=dtype, z_loss=0.1, normalize=False), SINGLE.bind({"embed": 5, "router_expert": E})
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(2, 6, 5, generator=g).bfloat16(), torch.randn(5, E, generator=g).bfloat16()
    found = router.apply(sh, r, {"weight": w}, x, {}, None)
    wanted = (x.to(wide) @ w.to(wide)).softmax(-1)
    assert found.weight.dtype == found.terms["router_z"].dtype == wide
    torch.testing.assert_close(found.scores, wanted, rtol=1e-12 if wide is torch.float64 else 1e-6, atol=0)
    torch.testing.assert_close(found.weight, wanted.topk(3).values)
