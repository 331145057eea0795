"""Every form of dispatch on meshes that lay experts over any axes: all of a decoder's values and gradients are one device's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from fmegatron import optim
from fmegatron.models import Config, gpt
from fmegatron.nn import moe
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Rules, Sharding, shard, spmd, thread_mesh, virtual_mesh
from fmegatron.sharding.traffic import counted
from fmegatron.testing import assert_same, measure
from fmegatron.testing.formula_moe import Exchange, difference, expert_traffic
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step

BLOCK = Moe(experts=8, top_k=3, mlp=8, shared=12, shared_gate=True, score="sigmoid", sequence_loss=0.1, z_loss=0.01,
            global_loss=0.3, balance_bias=True, first_dense=1)  # fmt: skip
CONFIG = Config(layers=2, embed=16, heads=4, kv=2, mlp=24, vocab=32, mlp_bias=True, moe=BLOCK)
FOLDED = Rules(  # experts over ep and cp, or over a part of tp that attention has whole; their width over the other part
    compute=(
        ("heads", ("tp", "tpa")), ("kv", ("tp?", "tpa?")), ("mlp", ("tp", "tpa")), ("vocab", ("tp", "tpa")),
        ("expert", ("ep", "cp", "tpa")), ("expert_mlp", "tp"), ("shared_mlp", "tp"),
        ("batch", ("dp", "ep")), ("seq", ("cp", "tp", "tpa")), ("loss_seq", "cp"),
    ), name="folded")  # fmt: skip
WAYS = {
    "fsdp_tp_sp ep tp": (RULES["fsdp_tp_sp"], {"ep": 2, "tp": 2}),
    "fsdp_tp_sp dp ep cp": (RULES["fsdp_tp_sp"], {"dp": 2, "ep": 2, "cp": 2}),
    "tp ep tp": (RULES["tp"], {"ep": 2, "tp": 2}),
    "folded ep cp tp": (FOLDED, {"ep": 2, "cp": 2, "tp": 2}),
    "folded dp tpa tp": (FOLDED, {"dp": 2, "tpa": 2, "tp": 2}),
}


@cache
def batch():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (8, 8), generator=g)
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": torch.rand(8, 8, generator=g, dtype=torch.float64)}


@cache
def alone(c):
    return measure(gpt(c), SINGLE, batch())


FORMS = {
    "ragged threads": ("ragged", thread_mesh, [way for way in WAYS if "cp tp" in way or "dp ep" not in way]),
    "gather threads": ("gather", thread_mesh, ["folded dp tpa tp"]),
    "gather": ("gather", virtual_mesh, list(WAYS)),
    "padded": ("padded", virtual_mesh, list(WAYS)),
}


@pytest.mark.parametrize("form, way", [(form, way) for form, (_, _, ways) in FORMS.items() for way in ways])
def test_every_form_is_one_devices(form, way):
    (rules, sizes), (form, mesh, _) = WAYS[way], FORMS[form]
    sh = Sharding(mesh(**sizes), replace(rules, dispatch=form))
    assert_same(measure(gpt(CONFIG), sh, batch(), expected=alone(CONFIG)), alone(CONFIG), 1e-10)


@pytest.mark.parametrize("form", ["ragged", "gather", "padded"])
def test_choices_over_capacity_are_dropped_alike(form):
    c = replace(CONFIG, moe=replace(BLOCK, capacity=0.6, drop="position", global_loss=0.0))
    found = []
    for dispatch in ("padded", form):
        sh = Sharding(thread_mesh(ep=2), replace(RULES["ddp"], dispatch=dispatch))
        found.append(measure(gpt(c), sh, batch()))
    assert_same(found[1], found[0], 1e-10)
    name = "tap.sum.experts/02.dropped"
    assert 0 < found[0].metrics[name] == found[1].metrics[name]


def test_what_a_virtual_mesh_cannot_is_said():
    sh = Sharding(virtual_mesh(ep=2), replace(RULES["ddp"], dispatch="ragged"))
    with pytest.raises(ValueError, match="looks at values, which a vmap"):
        measure(gpt(CONFIG), sh, batch())
    with pytest.raises(ValueError, match="dispatch is 'auto', 'gather'"):
        Rules(dispatch="rag")
    wide = Rules(compute=(("expert", "ep"), ("embed", "tp"), ("batch", "ep")))
    with pytest.raises(ValueError, match="embed lies over mesh axes tp"):
        moe.dispatch.ways_of(Sharding(virtual_mesh(ep=2, tp=2), wide).bind(gpt(CONFIG).sizes))


def sent(form, mesh, **sizes):
    """{(collective, axis): (count, bytes)} of one rank for the routed experts alone, forward."""
    mesh, traffic = counted(mesh(**sizes))
    sh = plan_step(gpt(replace(CONFIG, mlp_bias=False)), Sharding(mesh, replace(RULES["fsdp_tp_sp"], dispatch=form))).sh
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 8, 16, generator=g, dtype=torch.float64)
    index = torch.rand(8, 8, 8, generator=g).argsort(-1)[..., :3]
    weight = torch.rand(8, 8, 3, generator=g, dtype=torch.float64)
    w = {name: torch.randn(8, 16, 8, generator=g, dtype=torch.float64) for name in ("gate", "up")}
    w["down"] = torch.randn(8, 8, 16, generator=g, dtype=torch.float64)
    names = {name: "expert embed expert_mlp" for name in ("gate", "up")} | {"down": "expert expert_mlp embed"}
    tokens = [shard(sh, y, f"batch seq {last}") for y, last in ((x, "embed"), (index, "top"), (weight, "top"))]
    p = {name: shard(sh, y, names[name]) for name, y in w.items()}
    spmd(sh, lambda sh, p, *xs: moe.routed(sh, replace(BLOCK, shared=0, shared_gate=False), CONFIG_KIND, p, *xs))(p, *tokens)
    return traffic.counts(), index


CONFIG_KIND = replace(CONFIG, mlp_bias=False).block_mlp


@pytest.mark.parametrize("ep, tp", [(2, 1), (4, 1), (2, 2)])
def test_counts_and_bytes_of_the_exchanges_are_the_formulas(ep, tp):
    t, e, k, d, byte = 64 // (ep * tp), 8, 3, 16, 8
    counts, _ = sent("padded", virtual_mesh, ep=ep, tp=tp)
    there = {("all_to_all", "ep"): (2, 2 * e * t * d * byte)}
    if tp > 1:
        there |= {("all_gather", "tp"): (1, e * t * tp * d * byte), ("reduce_scatter", "tp"): (1, e * t * tp * d * byte)}
    assert counts == there
    counts, index = sent("ragged", thread_mesh, ep=ep, tp=tp)
    back = sum(int((index.flatten() // (e // ep) == 0).sum()) for _ in range(1)) if tp == 1 else None
    n, total = counts["all_to_all", "ep"]
    assert n == 3  # counts, rows, rows back
    if back is not None:  # rank 0 sends all its rows, and sends back those of its experts
        assert total == e * 8 + (t * k + back) * d * byte
    counts, _ = sent("gather", virtual_mesh, ep=ep, tp=tp)
    ranks = ep * tp
    gathered = sum(n for (kind, _), (n, _) in counts.items() if kind == "all_gather")
    assert gathered == 3 * (1 + (tp > 1)) and counts["reduce_scatter", "ep"][1] == t * ranks // (tp if tp > 1 else 1) * d * byte


EVEN = replace(CONFIG, mlp_bias=False, moe=replace(BLOCK, top_k=2, forced=True, balance_bias=False))
STEPS = {  # form and mesh, rules, sizes, axes that carry tokens and experts, and tokens and an expert's width
    "ep tp": ("fsdp_tp_sp", {"ep": 2, "tp": 2}, ["ep"], ["tp"]),
    "dp ep, twice": ("fsdp", {"dp": 2, "ep": 2}, ["ep"], []),
    "ep of tp whole": ("tp", {"ep": 2, "tp": 2}, ["ep"], []),
    "folded": (FOLDED, {"ep": 2, "cp": 2, "tp": 2}, ["ep", "cp"], ["tp"]),
    "folded tpa": (FOLDED, {"tpa": 2, "tp": 2}, ["tpa"], ["tp"]),
}


def stepped(form, mesh, rules, sizes, **settings):
    """{(collective, axis): (count, bytes)} of a train step of fp32."""
    rules = RULES[rules] if isinstance(rules, str) else rules
    mesh, traffic = mesh if isinstance(mesh, tuple) else counted(mesh(**sizes))
    sh, model, tx = Sharding(mesh, replace(rules, dispatch=form)), gpt(EVEN), optim.sgd(0.1)
    local = {name: shard(sh, x.float() if name == "weights" else x, "batch seq") for name, x in batch().items()}
    make_step(model, tx, sh, **settings)(init(model, tx, sh), local)
    return traffic.counts()


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in ("ep tp", "folded tpa") else pytest.mark.long)
                                  for name in STEPS])  # fmt: skip
def test_what_a_steps_experts_send_is_the_closed_form(case):
    """Between forms of dispatch only the experts' part differs; exchanges over ep are theirs alone."""
    rules, sizes, moved, wide = STEPS[case]
    again = {"remat": "full", "microbatches": 2} if case == "dp ep, twice" else {}
    m = again.get("microbatches", 1)
    tokens = 64 // m
    for axis in sizes:
        tokens //= sizes[axis] if axis != "tp" or wide else 1
    partial = ("tp",) if "tp" in sizes and not wide else ()
    forward, backward = m * (2 if again else 1), m

    def said(form):
        layer = Exchange(form, 8, 2, tokens, 16, {a: sizes[a] for a in moved}, {a: sizes[a] for a in wide}, partial)
        return expert_traffic(layer, forward, backward)

    padded, gather = (stepped(form, virtual_mesh, rules, sizes, **again) for form in ("padded", "gather"))
    assert difference(padded, gather) == difference(said("padded"), said("gather"))
    assert {key: x for key, x in padded.items() if key[0] == "all_to_all"} == {
        key: x for key, x in said("padded").items() if key[0] == "all_to_all"
    }
    here, ragged = (stepped(form, thread_mesh, rules, sizes, **again) for form in ("padded", "ragged"))
    assert difference(ragged, here) == difference(said("ragged"), said("padded"))


def test_shared_experts_run_while_rows_travel(monkeypatch):
    """Forward and backward: the exchange of rows was issued before, and is waited for after."""
    mesh, traffic = counted(thread_mesh(ep=2))
    right, under_way = moe.shared, []

    def shared(sh, *given):
        def note(*_):
            kinds = [event.kind for event in traffic.events[int(sh.rank)] if event[1:3] == ("all_to_all", "ep")]
            under_way.append(kinds.count("issue") - kinds.count("wait"))

        note()
        y = right(sh, *given)
        y.register_hook(note)
        return y

    monkeypatch.setattr(moe, "shared", shared)
    stepped("ragged", (mesh, traffic), "ddp", {})
    assert under_way == [1] * 4  # two ranks, forth and back
