"""Experts: every path against the loop over experts, values and gradients; capacity; the block's options on meshes; a step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from functorch.compile import aot_function, nop

from fmegatron import optim, tree
from fmegatron.models import Config, gpt
from fmegatron.nn import dispatch, experts, moe
from fmegatron.nn.mlp import Mlp
from fmegatron.nn.moe import Moe, experts_of
from fmegatron.nn.param import init, normal
from fmegatron.sharding import RULES, SINGLE, Sharding, virtual_mesh
from fmegatron.testing import assert_mesh_invariant
from fmegatron.train import balance
from fmegatron.train.state import init as init_state
from fmegatron.train.step import make_step

D, E, K = 12, 6, 2
PLAIN = Moe(experts=E, top_k=K, mlp=8)
BLOCKS = {
    "mixtral": (replace(PLAIN, switch_loss=0.1), Mlp()),
    "deepseek": (Moe(experts=8, top_k=2, mlp=8, score="sigmoid", scale=2.5, groups=4, group_top_k=2, group_best=2, shared=6,
                     balance_bias=True, sequence_loss=0.1, first_dense=1), Mlp()),
    "gpt_oss": (replace(PLAIN, logit_bias=True, global_loss=0.2, z_loss=0.1), Mlp(bias=True)),
    "others": (replace(PLAIN, latent=8, shared=4, shared_gate=True, score="sqrtsoftplus", layers=2, jitter=0.1), Mlp("relu2")),
}  # fmt: skip


def weights(block, kind, sh=SINGLE, seed=0):
    declared = moe.declare(block, kind, normal(0.3), normal(0.3))
    return init(declared, {"embed": D, **block.sizes(16)}, seed, torch.float64)


def choices(tokens=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, E - 1, generator=g).argsort(-1)[:, :K]  # nobody wants the last
    weight = torch.rand(tokens, K, generator=g, dtype=torch.float64)
    return torch.randn(tokens, D, generator=g, dtype=torch.float64), index, weight


@pytest.mark.parametrize("kind", [Mlp(), Mlp("gelu", bias=True)])
@pytest.mark.parametrize("static", [False, True])
def test_every_path_is_the_loop_over_experts(kind, static):
    x, index, weight = choices()
    index[:20] = torch.tensor([4, 1])  # uneven
    p = weights(PLAIN, kind)["experts"]
    sh = SINGLE.bind({"embed": D, **PLAIN.sizes(16)})

    def run(x, weight, p):
        y = moe.routed(sh, PLAIN, kind, p, x[None], index[None], weight[None])[0]
        return (y.sin()).sum(), y

    def loop(x, weight, p):
        y = experts.reference(kind, p, x, index, weight)
        return (y.sin()).sum(), y

    def grads(fn):
        given = [x.clone().requires_grad_(), weight.clone().requires_grad_(), tree.map(lambda w: w.clone().requires_grad_(), p)]
        total, y = fn(*given)
        return y, torch.autograd.grad(total, tree.leaves(given))

    wanted, right = grads(loop)
    if static:
        found, (_, got) = torch.func.grad(lambda *a: (run(*a)[0], run(*a)), argnums=(0, 1, 2), has_aux=True)(x, weight, p)
    else:
        got, found = grads(run)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(tree.leaves(found), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_shared_experts_with_a_gate_are_those_of_qwen2():
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

    block = replace(PLAIN, shared=4, shared_gate=True)
    theirs = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(
        hidden_size=D, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=8, shared_expert_intermediate_size=4,
        norm_topk_prob=True, experts_implementation="eager",
    )).double()  # fmt: skip
    p = weights(block, Mlp())
    given = {
        "gate.weight": p["router"]["weight"].t(), "shared_expert_gate.weight": p["shared_gate"][None],
        "experts.gate_up_proj": torch.cat([p["experts"]["gate"], p["experts"]["up"]], -1).mT,
        "experts.down_proj": p["experts"]["down"].mT,
        **{f"shared_expert.{name}_proj.weight": p["shared"][name].t() for name in ("gate", "up", "down")},
    }  # fmt: skip
    theirs.load_state_dict(given)
    x = choices()[0].unflatten(0, (4, 10))
    got, _ = moe.apply(SINGLE.bind({"embed": D, **block.sizes(16)}), block, Mlp(), p, x, {}, None)
    with torch.no_grad():
        torch.testing.assert_close(got, theirs(x), rtol=0, atol=1e-6)  # their softmax is of fp32


def test_a_graph_may_be_used_twice():
    x, index, weight = choices()
    p = {name: w.clone().requires_grad_() for name, w in weights(PLAIN, Mlp())["experts"].items()}
    y = moe.routed(SINGLE.bind({"embed": D, **PLAIN.sizes(16)}), PLAIN, Mlp(), p, x[None], index[None], weight[None])
    first = torch.autograd.grad(y.sum(), list(p.values()), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y.sum(), list(p.values())), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_traced_block_is_the_eager_one(dtype):
    block = replace(PLAIN, sequence_loss=0.1)
    sh = SINGLE.bind({"embed": D, **block.sizes(16)})
    p = tree.map(lambda w: w.to(dtype), weights(block, Mlp()))
    x = choices()[0].to(dtype).unflatten(0, (4, 10))

    def run(p, x):
        y, terms = moe.apply(sh, block, Mlp(), p, x, {}, None)
        return y.sin().sum() + sum(terms.values())

    traced = aot_function(run, fw_compiler=nop, bw_compiler=nop)  # the tracer of transforms.Compiled
    found = []
    for fn in (traced, run):
        given = [tree.map(lambda w: w.clone().requires_grad_(), p), x.clone().requires_grad_()]
        value = fn(*given)
        found.append([value.detach(), *torch.autograd.grad(value, tree.leaves(given))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_numbers_and_a_picture_of_the_load(tmp_path):
    taps = {"load": [3.0, 1.0, 0.0, 0.0], "tokens": 2.0, "entropy": 2.0, "dropped": 1.0}
    metrics = {f"tap.sum.experts/02.{name}": torch.tensor(x) for name, x in taps.items()} | {"loss": torch.tensor(1.0)}
    for given in (metrics, {name: torch.stack([x, x]) for name, x in metrics.items()}):  # one device, two ranks in one process
        found = {name: float(x.flatten()[0]) for name, x in balance.numbers(given).items()}
        wanted = {"loss": 1.0, "experts/02.max_violation": 2.0, "experts/02.entropy": 1.0, "experts/02.dropped": 0.25}
        assert found == wanted | {f"load/02/{e}": x for e, x in enumerate((3.0, 1.0, 0.0, 0.0))}
    records = [{"step": step, **found} for step in (1, 2)]
    assert balance.picture(records, tmp_path / "experts.png").stat().st_size > 5000
    assert balance.picture([{"step": 1, "loss": 1.0}], tmp_path / "none.png") is None


def test_the_way_back_is_the_transpose_of_the_way_in():
    x, index, weight = choices()
    slot = dispatch.slots_of(index, weight, E, 9, "probs")
    rows = torch.randn(E * 9, D, dtype=torch.float64)
    forth = (dispatch.permute(x, slot, E * 9) * rows).sum()
    torch.testing.assert_close(forth, (x * dispatch.unpermute(rows, slot, torch.ones_like(weight))).sum())


@pytest.mark.parametrize("drop", ["probs", "position"])
def test_what_is_over_capacity_is_what_megatron_drops(drop):
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    _, index, weight = choices()
    probs = torch.zeros(len(index), E, dtype=torch.float64).scatter(1, index, weight)
    slots = dispatch.capacity(len(index), K, E, 0.7)
    assert slots == math.ceil(40 * K / E * 0.7)
    kept = dispatch.slots_of(index, weight, E, slots, drop) < E * slots
    theirs, kept_there = apply_router_token_dropping(probs, probs > 0, K, 0.7, drop)
    if drop == "position":  # theirs takes any tokens of equal standing; ours the first
        first = (probs > 0).cumsum(0) <= slots
        assert torch.equal(kept_there.sum(0), (first & (probs > 0)).sum(0))
        kept_there = first & (probs > 0)
    assert torch.equal(torch.zeros_like(probs, dtype=torch.bool).scatter(1, index, kept), kept_there)
    assert not kept.all()


BASE = Config(layers=3, embed=16, heads=4, kv=2, mlp=24, vocab=32, context=32)


def batch(b=4, s=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (b, s), generator=g)
    weights = torch.rand(b, s, generator=g, dtype=torch.float64)
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": weights, "sample": torch.arange(b)}


def config(name):
    block, kind = BLOCKS[name]
    return replace(BASE, moe=block, activation=kind.kind, mlp_bias=kind.bias)


OVER = [
    Sharding(virtual_mesh(ep=2, cp=2), RULES["fsdp_tp_sp"]),
    Sharding(virtual_mesh(ep=2, tp=2), RULES["tp"]),
    Sharding(virtual_mesh(dp=2, ep=2), RULES["fsdp"]),
    Sharding(virtual_mesh(ep=2, tp=2), RULES["fsdp_tp_sp"]),
]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_decoder_with_experts_is_one_devices_on_every_mesh(name):
    chosen = OVER
    if name == "mixtral":  # the switch loss is of a data-parallel rank's tokens: equal where the batch is not cut
        chosen = [Sharding(virtual_mesh(cp=2, tp=2), RULES["tp_sp"])]
    assert_mesh_invariant(gpt(config(name)), batch(), chosen)


def test_the_bias_moves_once_a_step_against_the_load():
    c = replace(BASE, moe=replace(BLOCKS["deepseek"][0], bias_rate=0.5))
    model, tx = gpt(c), optim.sgd(0.0)
    local = {name: x.float() if name == "weights" else x for name, x in batch().items()}
    start = init_state(model, tx, SINGLE)
    moved = {}
    for name, settings in {"plain": {}, "again": {"remat": "full", "microbatches": 2}}.items():
        new, metrics = make_step(model, tx, SINGLE, **settings)(start, local)
        bias = new.params["layers"]["1"]["mlp"]["router"]["balance"]
        for layer in (0, 1):
            load = metrics[f"tap.sum.experts/{layer + 2:02d}.load"]
            assert load.sum() == 32 * 2
            torch.testing.assert_close(bias[layer], 0.5 * (load.mean() - load).sign())
        moved[name] = bias
    assert torch.equal(moved["plain"], moved["again"])
    bad = {**local, "weights": local["weights"] * float("nan")}
    kept, _ = make_step(model, tx, SINGLE)(start, bad)
    assert not kept.params["layers"]["1"]["mlp"]["router"]["balance"].any() and kept.skipped == 1


def test_settings_that_cannot_be():
    for change, message in (
        ({"top_k": 7}, "top_k = 7 of 6 experts"),
        ({"groups": 4}, r"groups = 4: use one of \[1, 2, 3, 6\]"),
        ({"groups": 3, "group_top_k": 1, "top_k": 3}, "group_top_k = 1 of 3 groups of 2 experts, for top_k = 3: it is 2 to 3"),
        ({"groups": 3, "group_top_k": 3, "top_k": 2}, "group_best = 0 of groups of 2 experts: it is 1 to 2"),
        ({"groups": 0}, "groups = 0: it is at least 1"),
        ({"score": "softmx"}, "'softmx': it is one of softmax, sigmoid"),
        ({"router_dtype": "bf16"}, "one of fp32, fp64"),
        ({"drop": "best"}, "one of probs, position"),
        ({"layers": 0}, "layers = 0: it is at least 1"),
        ({"jitter": 1.5}, "0 to below 1"),
        ({"z_loss": -1.0}, "0 or more"),
        ({"top_k": 1}, "set normalize = false"),
        ({"sinkhorn": True, "switch_loss": 0.1}, "takes no balance loss"),
        ({"shared_gate": True}, "give their width"),
        ({"bias_rate": 0.1}, "moe.bias_rate = 0.1 without balance_bias"),
        ({"group_top_k": 2}, "without groups"),
        ({"group_best": 1}, "without groups"),
        ({"drop": "position"}, "drop = position without capacity"),
        ({"layers": (True, True, False), "first_dense": 1}, "in moe.layers: drop one"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(PLAIN, **change)
    with pytest.raises(ValueError, match="moe.first_dense = 3 of layers = 3: it is 0 to 2"):
        replace(BASE, moe=replace(PLAIN, first_dense=3))
    with pytest.raises(ValueError, match="say how many"):
        experts_of({"top_k": 2})
    with pytest.raises(ValueError, match="moe.layers has 2 flags for layers = 3"):
        replace(BASE, moe=replace(PLAIN, layers=(True, False)))
