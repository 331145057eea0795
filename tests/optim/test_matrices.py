"""Muon, Adafactor and groups: against torch.optim and optax, on any mesh as on one device, and through a checkpoint."""

from __future__ import annotations

from functools import partial

import jax
import optax
import pytest
import torch
from optax.contrib import _muon
from oracles import assert_close, in_optax, in_torch, problem, train
from pieces import batches, model

from fmegatron import optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.nn import param
from fmegatron.nn.param import Matrix, Param, zeros
from fmegatron.optim.muon import QUINTIC
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, spmd, virtual_mesh
from fmegatron.sharding.traffic import counted
from fmegatron.testing.invariance import whole_leaves
from fmegatron.train import saving
from fmegatron.train.leaves import to_optimizer
from fmegatron.train.planned import plan_step
from fmegatron.train.state import Over, init
from fmegatron.train.step import make_step

MODEL = gpt(Config(layers=3, embed=16, heads=4, kv=2, mlp=24, vocab=21, vocab_pad=8, tied=True, no_rope=2))


# -- which leaves are matrices --------------------------------------------------------------------------------------
@pytest.mark.parametrize("names, layers, expected", [
    ("layers embed heads hd", 3, Matrix(1, 1)), ("layers heads hd embed", 3, Matrix(1, 2)), ("embed mlp", None, Matrix(0, 1)),
    ("layers expert embed mlp", 3, Matrix(2, 1)), ("layers embed", 3, None), ("embed", None, None),
    ("vocab embed", None, Matrix(0, 1))])
def test_declarations_say_what_is_a_matrix(names, layers, expected):
    declared = Param(names, zeros, layers=layers)
    assert param.matrix(declared) == expected
    assert param.table(declared) == ("vocab" in names)
    assert param.matrix(param.bias("layers heads hd")) is None


def test_declarations_send_matrices_to_muon_and_the_rest_to_adamw():
    state = optim.muon(1e-2, declare=MODEL.declare).init(MODEL.init(0))
    ends = lambda label: {path.split(".")[-1] for path in tree.to_paths(state[label])} - {"count"}  # noqa: E731
    assert ends("muon") == {"q", "k", "v", "o", "gate", "up", "down"}
    assert ends("adamw") == {"token", "weight"}


# -- Muon -----------------------------------------------------------------------------------------------------------
def flat(matrices):
    return {name: m for name, m in zip("abc", matrices, strict=True)}


@pytest.mark.parametrize("scale, factor, adjust", [("shape_scaling", 1.0, "original"), ("spectral", 0.2, "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(scale, factor, adjust, nesterov):
    """torch's runs in bf16 and on [outputs, inputs]; on the smaller side both take the same products."""
    g = torch.Generator().manual_seed(0)
    shapes = [(7, 8), (6, 10), (12, 5)]
    params, *grads = [flat([torch.randn(s, generator=g) for s in shapes]) for _ in range(5)]
    ours = optim.muon(1e-2, scale=scale, scale_factor=factor, nesterov=nesterov, dtype=torch.bfloat16)
    flip = partial(tree.map, lambda x: x.mT.contiguous())
    theirs = in_torch(lambda w: torch.optim.Muon(w, lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=nesterov,
                                                 adjust_lr_fn=adjust), flip(params), [flip(x) for x in grads])
    moved = tree.map(lambda a, b: (a - b).abs().max(), flip(theirs), params)
    apart = tree.map(lambda a, b: (a - b).abs().max(), flip(theirs), train(ours, params, grads)[0])
    assert all(float(apart[name]) < 1e-4 * float(moved[name]) for name in moved)


def test_newton_schulz_is_optaxs_and_makes_orthogonal():
    x = torch.randn(3, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = optim.newton_schulz(x, eps=0.0)
    with jax.enable_x64(True):
        for one, other in zip(x, ours, strict=True):
            theirs = _muon.orthogonalize_via_newton_schulz(
                jax.numpy.asarray(one.numpy()), jax.numpy.asarray(QUINTIC), 5,
                eps=0.0, dimension_numbers=optax.contrib.MuonDimensionNumbers())
            torch.testing.assert_close(other, torch.tensor(jax.device_get(theirs)), rtol=1e-10, atol=1e-12)
    values = torch.linalg.svdvals(optim.newton_schulz(x, 12))
    assert ((values > 0.6) & (values < 1.3)).all()
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    exact = optim.newton_schulz(x, 60, coefficients=(1.5, -0.5, 0.0))
    torch.testing.assert_close(exact, u @ vt, rtol=1e-9, atol=1e-9)
    assert torch.equal(optim.newton_schulz(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))
    torch.testing.assert_close(optim.newton_schulz(x.mT), optim.newton_schulz(x).mT)


def test_qk_clip_brings_each_head_to_its_bound():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 8, generator=g, dtype=torch.float64)
    q, k = (torch.randn(8, n, 4, generator=g, dtype=torch.float64) for n in (4, 2))

    def largest(q, k):
        keys = torch.einsum("te,ehd->htd", x, k).repeat_interleave(2, 0)
        return (torch.einsum("te,ehd->htd", x, q) @ keys.mT).abs().amax((1, 2))

    before = largest(q, k)
    bound = float(before.median())
    after = largest(*optim.qk_clip(q, k, before, bound))
    torch.testing.assert_close(after, before.clamp(max=bound))
    same = optim.qk_clip(q, k, before, float(before.max()))
    assert torch.equal(same[0], q) and torch.equal(same[1], k)


# -- Adafactor ------------------------------------------------------------------------------------------------------
def test_adafactor_is_torchs_layer_by_layer():
    params, grads = problem()
    build = lambda w: torch.optim.Adafactor(w, lr=5e-1, weight_decay=0.1)  # noqa: E731
    cut = lambda t: tree.from_paths({f"{path}.{i}": x for path, leaf in tree.to_paths(t).items()  # noqa: E731
                                     for i, x in enumerate(leaf if "layers" in path else [leaf])})
    theirs = in_torch(build, cut(params), [cut(g) for g in grads])
    ours, state = train(optim.adafactor(5e-1, weight_decay=0.1, mask=lambda path, leaf: True), params, grads)
    assert_close(cut(ours), theirs)
    assert {path: tuple(x.shape) for path, x in tree.to_paths(state[0]).items()} == {
        "count": (), "rows.embed": (7, 1), "cols.embed": (1, 4), "rows.layers.0.up": (2, 4, 1), "cols.layers.0.up": (2, 1, 5),
        "nu.layers.0.norm": (2, 4), "nu.norm": (4,)}


# -- on a mesh ------------------------------------------------------------------------------------------------------
TXS = {
    "muon": optim.chain(optim.clip_by_global_norm(1.0), optim.muon(2e-2, declare=MODEL.declare)),
    "adafactor": optim.chain(optim.clip_by_global_norm(1.0), optim.adafactor(2e-2, weight_decay=0.1, declare=MODEL.declare)),
    "aggmo_adopt": optim.aggmo_adopt(2e-2, betas=(0.9, 0.99, 0.95), vs=(0.5, 0.3), weight_decay=0.1),
}
MESHES = [("fsdp", {"dp": 2, "fsdp": 2}), ("zero1_tp", {"dp": 2, "tp": 2}), ("ddp", {"dp": 3}),
          ("fsdp_tp_sp", {"dp": 4, "tp": 2})]


def steps(tx, sh, n=3):
    """n updates with gradients that any mesh draws alike; the state's own parameters at the optimizer's placement."""
    plan = plan_step(MODEL, sh)
    fused = optim.fuse(tx)
    start = init(MODEL, tx, sh, key=0, dtype=torch.float64)
    grads = [init(MODEL, optim.sgd(0.1), sh, key=i + 1, dtype=torch.float64).params for i in range(n)]

    def on_rank(here, params, state, grads):
        params = to_optimizer(plan.leaves, params, here)
        for i, g in enumerate(grads):
            g = tree.map(lambda x, by=10.0**i: x * by, to_optimizer(plan.leaves, g, here))
            params, state = fused(g, state, params, over=Over(here, plan.leaves), compile=False)
        return params, state

    params, state = spmd(plan.sh, on_rank)(start.params, start.opt_state, grads)
    return plan, params, start._replace(opt_state=state)


@pytest.fixture(scope="module", params=TXS)
def alone(request):
    plan, params, state = steps(TXS[request.param], SINGLE)
    return request.param, whole_leaves(plan, params, "optimizer"), state


@pytest.mark.parametrize("rules, sizes", MESHES)
def test_a_mesh_changes_nothing(alone, rules, sizes, tmp_path):
    name, expected, single = alone
    sh = Sharding(virtual_mesh(**sizes), RULES[rules])
    plan, params, state = steps(TXS[name], sh)
    for path, x in whole_leaves(plan, params, "optimizer").items():
        torch.testing.assert_close(x, expected[path], rtol=1e-9, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}")
    saving.save(tmp_path, MODEL, sh, state, {})
    loaded = saving.load(tmp_path, MODEL, SINGLE, init(MODEL, TXS[name], SINGLE, dtype=torch.float64))
    for path, x in tree.to_paths(loaded.opt_state).items():
        torch.testing.assert_close(x, tree.to_paths(single.opt_state)[path], rtol=1e-9, atol=1e-14, msg=path)


def test_matrices_move_by_all_to_all():
    """Under FSDP no rank gathers a stacked matrix."""
    mesh, traffic = counted(virtual_mesh(dp=4))
    sh = Sharding(mesh, RULES["fsdp"])
    tx = optim.orthogonalize(declare=MODEL.declare)
    matrices = {path for path, p in tree.to_paths(MODEL.declare).items() if param.matrix(p) and not param.table(p)}
    plan = plan_step(MODEL, sh)
    params = init(MODEL, optim.sgd(0.1), sh).params

    def on_rank(here, params):
        moved = tree.to_paths(to_optimizer(plan.leaves, params, here))
        mine = tree.from_paths({path: moved[path] for path in matrices})
        return tx.update(mine, {}, mine, over=Over(here, plan.leaves))[0]

    spmd(plan.sh, on_rank)(params)
    rows = traffic.rows()
    assert {row.collective for row in rows} == {"all_to_all"}
    assert sum(row.count for row in rows) <= 2 * len(matrices)


# -- groups ---------------------------------------------------------------------------------------------------------
def test_groups_are_optaxs():
    params, grads = problem()
    labels = {"embed": "slow", "layers": {"0": {"up": "fast", "norm": "slow"}}, "norm": "still"}
    theirs = optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.adam(1e-2, 0.9, 0.95), "still": optax.set_to_zero()},
                                   labels)
    txs = {"slow": optim.sgd(1e-3), "fast": optim.adam(1e-2), "still": optim.freeze()}
    by_pattern = [("*.up", "fast"), ("embed", "slow"), ("layers.*.norm", "slow"), ("*", "still")]
    of = tree.to_paths(labels)
    for given in (labels, by_pattern, lambda path, leaf: of[path]):
        assert_close(train(optim.multi(txs, given), params, grads)[0], in_optax(theirs, params, grads))


@pytest.mark.parametrize("sh", [SINGLE, Sharding(virtual_mesh(dp=2), RULES["fsdp"])], ids=["single", "mesh"])
def test_a_group_without_leaves_may_clip(sh):
    clipped = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(1.0))
    net = model(layers=1)
    batch = {name: shard(sh, x, "batch seq") for name, x in next(batches(1)).items()}
    norms = []
    for tx in (optim.sgd(1.0), optim.multi({"none": clipped, "all": optim.sgd(1.0)}, [("nothing", "none"), ("*", "all")])):
        state, metrics = make_step(net, tx, sh)(init(net, tx, sh), batch)
        norms.append(metrics["grad_norm"])
    assert torch.equal(*norms)


def test_masked_leaves_pass():
    params, grads = problem()
    mask = {"embed": True, "layers": {"0": {"up": False, "norm": False}}, "norm": True}
    for given in (mask, lambda path, leaf: path in ("embed", "norm")):
        tx = optim.masked(optim.sgd(0.5), given)
        updates, _ = tx.update(grads[0], tx.init(params), params)
        assert torch.equal(updates["embed"], grads[0]["embed"] * -0.5)
        assert torch.equal(updates["layers"]["0"]["up"], grads[0]["layers"]["0"]["up"])


@pytest.mark.parametrize("labels, word", [([("embed", "a")], "fits no pattern"), ([("*", "b")], "groups a only")])
def test_errors(labels, word):
    with pytest.raises(ValueError, match=word):
        optim.multi({"a": optim.sgd(0.1)}, labels).init(problem()[0])
    with pytest.raises(ValueError, match="spectral"):
        optim.muon(0.1, scale="cubic")
