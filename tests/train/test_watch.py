"""What a step is asked to watch: equal on every mesh, by others' formulas too, with nothing else changed, and free when off."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from pieces import batches, model
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron import optim, tree
from fmegatron.models.model import run_chain
from fmegatron.nn import core, watch
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, thread_mesh, virtual_mesh
from fmegatron.sharding.moments import described, merge, moments
from fmegatron.testing import assert_trees_all_equal, variants
from fmegatron.testing.invariance import NAMES
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step

ALL = frozenset({"activations", "attention", "norms", "optimizer", "parameters"})
MESHES = [
    ("zero1", {"dp": 4}, {"microbatches": 2}),
    ("zero2_tp", {"dp": 2, "tp": 2}, {"microbatches": 2}),
    ("fsdp", {"dp": 2, "fsdp": 2}, {"remat": "full"}),
    ("fsdp_tp_sp", {"dp": 2, "cp": 2, "tp": 2}, {}),
]


TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))


def run(sh, steps=2, watching=ALL, net=None, tx=TX, dtype=torch.float64, donate=False, **settings):
    """(metrics of the last step, state before it, state after)."""
    net = net or model()
    plan = plan_step(net, sh, **settings)
    state, step = init(net, tx, sh, key=0, dtype=dtype), make_step(net, tx, sh, donate=donate, **settings)
    for batch in batches(steps):
        before = tree.map(torch.clone, state)
        state, metrics = step(state, {k: shard(plan.sh, x, NAMES[k]) for k, x in batch.items()}, watch=watching)
    first = (lambda x: x[0]) if sh.mesh.stacked else (lambda x: x)
    return {name: first(x) for name, x in metrics.items()}, before, state


@pytest.fixture(scope="module")
def alone():
    return run(SINGLE)


def watched(metrics):
    kinds = ("activations", "attention", "optimizer", "param", "zeros", "tap.max.a")
    return {name: float(x) for name, x in metrics.items() if name.startswith(kinds)}


WAYS = [
    *((Sharding(virtual_mesh(**sizes), RULES[rules]), settings) for rules, sizes, settings in MESHES),
    (Sharding(virtual_mesh(cp=2, tp=2), RULES["cp_ring"]), {}),
    (Sharding(virtual_mesh(cp=2), RULES["cp_ulysses"]), {}),
    (Sharding(thread_mesh(cp=2), RULES["cp_ring"]), {}),
    (SINGLE, {"microbatches": 4, "remat": "full", "donate": True}),
    (SINGLE, {"pipeline": Pipeline(make_schedule("1f1b", 2, None, 4))}),
]


@pytest.mark.parametrize("sh, settings", WAYS)
def test_the_mesh_changes_no_statistic(sh, settings, alone):
    there, here = watched(run(sh, **settings)[0]), watched(alone[0])
    assert there.keys() == here.keys() and len(here) > 100
    for name, x in here.items():
        if "update" in name or "nu" in name:  # Adam divides by what is nearly 0
            assert there[name] == pytest.approx(x, rel=1e-6, abs=1e-9), name
        else:
            assert there[name] == pytest.approx(x, rel=1e-10, abs=1e-13), name


def test_activations_are_those_of_scipy():
    seen = {}
    net, params = model(), model().init(0, torch.float64)
    batch = next(iter(batches(1)))
    values = net.inputs(SINGLE, batch)
    for node in net.chain[:-1]:
        values = run_chain(net, (node,), params, values, sh=SINGLE.bind(net.sizes))
        seen[f"{node.index:02d}." + ("out" if "out" in values else "h")] = values["out" if "out" in values else "h"]
    taps = net.loss(params, batch, sh=SINGLE.watching(ALL))[1]["taps"]
    for name, x in seen.items():
        flat, rows = x.numpy().ravel(), x.numpy().reshape(-1, x.shape[-1])
        expected = {
            "mean": flat.mean(), "l2": np.linalg.norm(flat), "skewness": scipy.stats.skew(flat),
            "kurtosis": scipy.stats.kurtosis(flat, fisher=False), "row_max": rows.max(-1).mean(),
            "row_skewness": scipy.stats.skew(rows, axis=-1).mean(),
            "row_kurtosis": scipy.stats.kurtosis(rows, axis=-1, fisher=False).mean(),
        }
        found = described(taps[f"activations/{name}"])
        assert {key: float(value) for key, value in found.items()} == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert float(taps[f"activations/{name}/max"]) == np.abs(flat).max()


def test_moments_merge_in_any_grouping_far_from_zero():
    x = torch.randn(60, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp() + 1e4
    parts = [moments(piece) for piece in x.split([1, 20, 9, 30])]
    whole, pairs = moments(x), merge(torch.stack((merge(torch.stack(parts[:2])), merge(torch.stack(parts[2:])))))
    nothing = torch.zeros(9, dtype=torch.float64)
    for merged in (merge(torch.stack(parts)), pairs, merge(torch.stack([*parts, nothing]))):
        torch.testing.assert_close(merged, whole, rtol=1e-11, atol=0)
    flat = x.numpy().ravel()
    found = {name: float(value) for name, value in described(pairs).items()}
    assert found["skewness"] == pytest.approx(scipy.stats.skew(flat), rel=1e-9)
    assert found["kurtosis"] == pytest.approx(scipy.stats.kurtosis(flat, fisher=False), rel=1e-9)


@pytest.mark.parametrize("more", [{}, {"window": 3}, {"attention_softcap": 2.0}, {"sink": "one"}], ids=str)
def test_the_largest_logit_is_that_of_scores_written_out(more, monkeypatch):
    monkeypatch.setattr(core, "PIECE", 3)  # of queries, so that there are several
    net = model(layers=1, positions="none", **more)
    params, batch = net.init(1, torch.float64), {"tokens": torch.randperm(21, generator=torch.Generator().manual_seed(19))[:16]}
    batch["tokens"] = batch["tokens"].view(2, 8)  # each token once, so that each pair is seen once, or not at all
    batch["documents"] = torch.arange(8).div(3, rounding_mode="floor").expand(2, 8).clone()
    params["layers"]["0"]["attn"]["q"] *= 30
    taps = net.loss(params, batch, sh=SINGLE.watching(frozenset({"attention"})))[1]["taps"]
    p, h = tree.map(lambda x: x[0], params["layers"]["0"]), params["embed"]["token"][batch["tokens"]]
    x = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + net.config.norm_eps) * p["attn_norm"]["weight"]
    q, k = torch.einsum("bse,ehd->bhsd", x, p["attn"]["q"]), torch.einsum("bse,ehd->bhsd", x, p["attn"]["k"])
    s = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) / 2
    if "attention_softcap" in more:
        s = 2.0 * torch.tanh(s / 2.0)
    back = torch.arange(8)[:, None] - torch.arange(8)[None]
    seen = (back >= 0) & (back < more.get("window", 99)) & (batch["documents"][0][:, None] == batch["documents"][0][None])
    assert s.max() > s[:, :, seen].max() + 1e-6  # what is not seen would be larger
    assert float(taps["attention/01.max_logit"]) == pytest.approx(float(s[:, :, seen].max()), rel=1e-12)


def test_norms_are_those_of_the_trees(alone):
    metrics, before, after = alone
    rows = {path: x if p.layers is not None else x[None] for (path, p), x in zip(
        tree.to_paths(model().declare).items(), tree.leaves(after.params), strict=True)}
    old, mu, nu = tree.leaves(before.params), tree.leaves(after.opt_state[1]["mu"]), tree.leaves(after.opt_state[1]["nu"])
    new = tree.leaves(after.params)

    def norm(xs):
        return pytest.approx(float(torch.cat([x.flatten() for x in xs]).norm()), rel=1e-12)

    assert metrics["param_norm"] == metrics["optimizer/l2_norm/param/global"] == norm(new)
    assert metrics["optimizer/l2_norm/update/global"] == norm([a - b for a, b in zip(old, new, strict=True)])
    assert metrics["optimizer/l2_norm/mu/global"] == norm(mu) and metrics["optimizer/l2_norm/nu/global"] == norm(nu)
    assert metrics["optimizer/l2_norm/grad/global"] == pytest.approx(float(metrics["grad_norm"]), rel=1e-12)
    assert metrics["optimizer/max/nu/global"] == max(x.max() for x in nu)
    assert metrics["optimizer/min/nu/global"] == min(x.min() for x in nu)
    layer = rows["layers.0.attn.q"][1]
    assert metrics["optimizer/l2_norm/param/layers.1.attn.q"] == norm([layer])


def test_zeros_are_those_of_a_table_that_few_tokens_read():
    few = {"tokens": torch.arange(64).view(8, 8) % 5, "weights": torch.ones(8, 8)}
    for sh in (SINGLE, Sharding(virtual_mesh(dp=2, tp=2), RULES["fsdp_tp_sp"])):
        net = model(tied=False)
        state, step = init(net, TX, sh, key=0), make_step(net, TX, sh)
        given = {**few, "labels": few["tokens"]}
        local = {k: shard(plan_step(net, sh).sh, x, NAMES[k]) for k, x in given.items()}
        metrics = step(state, local, watch=frozenset({"norms"}))[1]
        assert set(metrics["zeros"].flatten().tolist()) == {16 * (21 - 5)}


@pytest.mark.parametrize("tx", [
    optim.aggmo_adamw(1e-2, betas=(0.9, 0.99, 0.95), vs=(0.3, 0.4)),
    optim.muon(1e-2, declare=model().declare),
    optim.sgd(1e-2, momentum=0.9),
    optim.adopt(1e-2),
])
def test_every_slot_of_an_optimizer_has_a_norm(tx):
    metrics, _, after = run(SINGLE, tx=tx)
    size = sum(float(x.double().square().sum()) for path, x in tree.to_paths(after.opt_state).items() if x.dim() > 0)
    names = [n for n in metrics if n.startswith("optimizer/l2_norm") and n.endswith("/global")]
    slots = [n for n in names if n.split("/")[2] not in ("param", "grad", "update")]
    assert slots and sum(float(metrics[n]) ** 2 for n in slots) == pytest.approx(size, rel=1e-9)


class Ops(TorchDispatchMode):
    """Names of all ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


WAITS = tuple(f"aten.{op}" for op in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique"))


def ops(watching, **settings):
    net, sh = model(), SINGLE
    state, step = init(net, TX, sh, key=0), make_step(net, TX, sh, **settings)
    batch = {k: x.float() if x.is_floating_point() else x for k, x in next(iter(batches(1))).items()}
    with Ops() as seen:
        step(state, batch, watch=watching)
    return seen.names


def test_blocks_know_only_of_statistics_of_their_own():
    """A compiled block is one graph a set of kinds: norms each tenth step are none of its business."""
    net, seen = model(), set()

    def spied(fn):
        return lambda sh, *rest: (seen.add(sh.watch), fn(sh, *rest))[1]

    net = replace(net, chain=tuple(replace(node, fn=spied(node.fn)) for node in net.chain))
    step, state = make_step(net, TX, SINGLE), init(net, TX, SINGLE, key=0)
    for kinds in (frozenset(), frozenset({"norms", "optimizer", "parameters"}), frozenset({"norms", "attention"})):
        state, _ = step(state, next(iter(batches(1))), watch=kinds)
    assert seen == {frozenset(), frozenset({"attention"})}


@pytest.mark.parametrize("settings", [{}, {"remat": "full", "microbatches": 2}], ids=str)
def test_off_is_free_and_on_waits_for_nothing(settings, monkeypatch):
    off, on = ops(frozenset(), **settings), ops(ALL, **settings)
    assert [name for name in on if name.startswith(WAITS)] == [name for name in off if name.startswith(WAITS)] == []
    assert len(on) > len(off)
    once = len(ops(ALL, microbatches=2)) - len(ops(frozenset(), microbatches=2))
    assert len(on) - len(off) == once or not settings  # what is computed again is not watched again
    for name in ("activation", "max_logit"):
        monkeypatch.setattr(watch, name, lambda *args: None)
    assert ops(frozenset(), **settings) == off  # as if no block had a word on statistics


@pytest.mark.parametrize("variant", variants("eager", "virtual", "threads"))
def test_watching_changes_no_bit_of_training(variant):
    sh = variant.sharding("fsdp_tp_sp", dp=2, tp=2)
    assert_trees_all_equal(run(sh)[2], run(sh, watching=frozenset())[2])


@pytest.mark.long
@pytest.mark.parametrize("variant", variants("compiled"))
def test_a_compiled_step_watches_too(variant, alone):
    metrics, _, _ = run(SINGLE, steps=1, dtype=torch.float32, compile=True, net=model(layers=1))
    eager, _, _ = run(SINGLE, steps=1, dtype=torch.float32, net=model(layers=1))
    for name, x in watched(eager).items():
        if "nu" not in name and name != "zeros":
            assert float(metrics[name]) == pytest.approx(x, rel=1e-3, abs=1e-4), name
