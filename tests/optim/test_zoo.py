"""Every optimizer against ten lines of scalars, against others' implementations, its identities, and the nine known traps."""

from __future__ import annotations

import inspect
import math
from functools import partial

import optax
import pytest
import pytorch_optimizer as others
import torch
from oracles import assert_close, everywhere, in_optax, in_torch, problem, train

from fmegatron import optim, tree
from fmegatron.optim import Switch, elementwise

LR = optim.linear(2e-2, warmup=2, steps=9)
RATES = [float(LR(torch.tensor(t))) for t in range(12)]


def adam_family(theta, gs, b, b2, vs, eps, wd, decouple, amsgrad=False):
    """B1, B2, B5: one element, plain floats."""
    ms, v, top = [0.0] * len(vs), 0.0, 0.0
    for t, g in enumerate(gs, 1):
        d = RATES[t - 1] / 2e-2
        g = g if decouple is not False else g + wd * theta
        theta = theta * (1 - d * wd) if decouple is True else theta
        theta = theta * (1 - RATES[t - 1] * wd) if decouple == "rate" else theta
        ms, v = [bi * m + (1 - bi) * g for bi, m in zip(b, ms, strict=True)], b2 * v + (1 - b2) * g * g
        top = max(top, v)
        num = (1 - sum(vs)) * g + sum(w * m / (1 - bi**t) for w, m, bi in zip(vs, ms, b, strict=True))
        theta -= RATES[t - 1] * num / (math.sqrt(top if amsgrad else v) / math.sqrt(1 - b2**t) + eps)
    return theta


def adopt_family(theta, gs, b, b2, vs, eps, wd, decouple, clip=True):
    """B3, B4, B5."""
    ms, v = [0.0] * len(vs), 0.0
    for t, g in enumerate(gs):
        g = g if decouple else g + wd * theta
        if t == 0:
            v = g * g
            continue
        theta = theta * (1 - RATES[t] / 2e-2 * wd) if decouple else theta
        x = g / max(math.sqrt(v), eps)
        x = max(min(x, t**0.25), -(t**0.25)) if clip else x
        ms = [bi * m + (1 - bi) * x for bi, m in zip(b, ms, strict=True)]
        theta -= RATES[t] * ((1 - sum(vs)) * x + sum(w * m for w, m in zip(vs, ms, strict=True)))
        v = b2 * v + (1 - b2) * g * g
    return theta


def lion_scalar(theta, gs, wd):
    m = 0.0
    for t, g in enumerate(gs):
        u = math.copysign(1.0, 0.95 * m + 0.05 * g)
        theta, m = theta - RATES[t] * (u + wd * theta), 0.98 * m + 0.02 * g
    return theta


TWO, THREE = (0.9, 0.99, 0.95), (0.5, 0.3)
SCALARS = {
    "decoupled_adamw": (partial(optim.decoupled_adamw, weight_decay=0.1),
                        lambda p, g: adam_family(p, g, [0.9], 0.95, [1.0], 1e-8, 0.1, True)),
    "decoupled_adamw coupled to the rate": (partial(optim.decoupled_adamw, weight_decay=0.1, decouple=False),
                                            lambda p, g: adam_family(p, g, [0.9], 0.95, [1.0], 1e-8, 0.1, "rate")),
    "amsgrad": (partial(optim.decoupled_adamw, amsgrad=True, weight_decay=0),
                lambda p, g: adam_family(p, g, [0.9], 0.95, [1.0], 1e-8, 0, True, True)),
    "adopt": (optim.adopt, lambda p, g: adopt_family(p, g, [0.9], 0.9999, [1.0], 1e-6, 0, False)),
    "lion": (partial(optim.lion, weight_decay=0.1), lambda p, g: lion_scalar(p, g, 0.1)),
}
for _d in (True, False):
    SCALARS |= {
        f"qhadamw {_d}": (partial(optim.qhadamw, weight_decay=0.1, decouple=_d),
                          lambda p, g, d=_d: adam_family(p, g, [0.9], 0.95, [0.7], 1e-8, 0.1, d)),
        f"aggmo_adamw {_d}": (partial(optim.aggmo_adamw, betas=TWO, vs=THREE, weight_decay=0.1, decouple=_d),
                              lambda p, g, d=_d: adam_family(p, g, [0.9, 0.99], 0.95, [0.5, 0.3], 1e-8, 0.1, d)),
        f"adopt {_d}": (partial(optim.adopt, weight_decay=0.1, decouple=_d, clip=None),
                        lambda p, g, d=_d: adopt_family(p, g, [0.9], 0.9999, [1.0], 1e-6, 0.1, d, False)),
        f"qhadopt {_d}": (partial(optim.qhadopt, weight_decay=0.1, decouple=_d),
                          lambda p, g, d=_d: adopt_family(p, g, [0.999], 0.9999, [0.9], 1e-6, 0.1, d)),
        f"aggmo_adopt {_d}": (partial(optim.aggmo_adopt, betas=TWO, vs=THREE, weight_decay=0.1, decouple=_d),
                              lambda p, g, d=_d: adopt_family(p, g, [0.9, 0.99], 0.95, [0.5, 0.3], 1e-6, 0.1, d)),
    }
ALL = {name: build for name, (build, _) in SCALARS.items()} | {"adam": optim.adam, "adamw": optim.adamw}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars(name):
    build, scalar = SCALARS[name]
    params, grads = problem()
    ours = train(build(LR, mask=everywhere), params, grads)[0]
    for path, p in tree.to_paths(params).items():
        gs = [tree.to_paths(g)[path].flatten().tolist() for g in grads]
        expected = [scalar(theta, [g[i] for g in gs]) for i, theta in enumerate(p.flatten().tolist())]
        torch.testing.assert_close(tree.to_paths(ours)[path].flatten(), torch.tensor(expected, dtype=p.dtype),
                                   rtol=1e-11, atol=1e-13, msg=lambda m, at=path: f"{at}: {m}")


ADAMS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-5, "decouple": True, "amsgrad": False}
ADOPTS = {"betas": (0.999, 0.9999), "eps": 1e-6, "weight_decay": 0.0, "decouple": False, "clip": optim.fourth_root}


@pytest.mark.parametrize("name, expected", [
    ("decoupled_adamw", ADAMS), ("qhadamw", ADAMS | {"vs": (0.7,)}), ("aggmo_adamw", ADAMS | {"vs": (0.7,)}),
    ("adopt", ADOPTS | {"betas": (0.9, 0.9999)}), ("qhadopt", ADOPTS | {"vs": (0.9,)}),
    ("aggmo_adopt", ADOPTS | {"vs": (0.9,)})])
def test_defaults_are_the_references(name, expected):
    """B0's table; the clip is on (trap 1)."""
    takes = inspect.signature(getattr(optim, name)).parameters
    found = {key: p.default for key, p in takes.items() if key != "mask"}
    assert found == {"learning_rate": 1e-3} | expected


# -- implementations that nobody here wrote -------------------------------------------------------------------------
@pytest.mark.parametrize("ours, theirs", [
    (optim.decoupled_adamw(1e-2, weight_decay=0.1, decouple=False, amsgrad=True, mask=everywhere),
     lambda w: torch.optim.AdamW(w, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, amsgrad=True)),
    (optim.decoupled_adamw(1e-2, weight_decay=1e-3, mask=everywhere),
     lambda w: torch.optim.AdamW(w, lr=1e-2, betas=(0.9, 0.95), weight_decay=1e-3 / 1e-2)),
    (optim.adopt(1e-2), lambda w: others.ADOPT(w, lr=1e-2, betas=(0.9, 0.9999), clip_lambda=lambda t: (t - 1) ** 0.25)),
    (optim.adopt(1e-2, weight_decay=0.1, mask=everywhere),
     lambda w: others.ADOPT(w, lr=1e-2, betas=(0.9, 0.9999), clip_lambda=lambda t: (t - 1) ** 0.25, weight_decay=0.1,
                            weight_decouple=False, foreach=False)),
    (optim.adopt(1e-2, clip=None), lambda w: others.ADOPT(w, lr=1e-2, betas=(0.9, 0.9999), clip_lambda=None)),
    (optim.lion(1e-2, betas=(0.9, 0.99), weight_decay=0.1, mask=everywhere),
     lambda w: others.Lion(w, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)),
], ids=["amsgrad", "decoupled at a constant rate", "adopt", "adopt coupled", "adopt unclipped", "lion"])
def test_in_torch(ours, theirs):
    params, grads = problem()
    assert_close(train(ours, params, grads)[0], in_torch(theirs, params, grads))


@pytest.mark.parametrize("ours, theirs", [
    (optim.lion(LR, weight_decay=0.1, mask=everywhere),
     optax.lion(optax.warmup_cosine_decay_schedule(0, 1e-2, 2, 9), 0.95, 0.98, weight_decay=0.1)),
], ids=["lion"])
def test_in_optax(ours, theirs):
    params, grads = problem()
    rate = optim.cosine(1e-2, warmup=2, steps=9)
    assert_close(train(optim.lion(rate, weight_decay=0.1, mask=everywhere), params, grads)[0],
                 in_optax(theirs, params, grads), 1e-9)


def test_qhadam_is_theirs_without_eps():
    """pytorch_optimizer's running averages are bias corrections written otherwise, with weights kept in fp32."""
    params, grads = problem()
    ours = optim.qhadamw(1e-2, betas=(0.9, 0.95), vs=(0.7,), eps=0.0, weight_decay=0)
    theirs = in_torch(lambda w: others.QHAdam(w, lr=1e-2, betas=(0.9, 0.95), nus=(0.7, 1.0), eps=0.0), params, grads)
    assert_close(train(ours, params, grads)[0], theirs, 1e-6)


# -- identities -----------------------------------------------------------------------------------------------------
IDENTITIES = {
    "v=1 is adamw": (optim.qhadamw(LR, vs=(1,), weight_decay=0.1), optim.decoupled_adamw(LR, weight_decay=0.1)),
    "v=0 is rmsprop": (optim.qhadamw(LR, vs=(0,), weight_decay=0.1),
                       optim.decoupled_adamw(LR, betas=(0.0, 0.95), weight_decay=0.1)),
    "K=1 adamw": (optim.aggmo_adamw(LR, weight_decay=0.1), optim.qhadamw(LR, weight_decay=0.1)),
    "K=1 adopt": (optim.aggmo_adopt(LR, weight_decay=0.1), optim.qhadopt(LR, weight_decay=0.1)),
    "v=1 is adopt": (optim.qhadopt(LR, betas=(0.9, 0.9999), vs=(1,)), optim.adopt(LR)),
    "a weight of 0": (optim.aggmo_adamw(LR, betas=(0.9, 0.5, 0.95), vs=(0.7, 0)), optim.qhadamw(LR)),
    "two halves": (optim.aggmo_adopt(LR, betas=(0.9, 0.9, 0.99), vs=(0.4, 0.3)),
                   optim.qhadopt(LR, betas=(0.9, 0.99), vs=(0.7,))),
    "adamw": (optim.decoupled_adamw(LR, weight_decay=0.1, decouple=False), optim.adamw(LR)),
    "a switch to the same": (optim.qhadamw(LR, betas=(Switch(0.9, 0.9, 3), Switch(0.95, 0.95, 2)), vs=(Switch(0.7, 0.7, 1),)),
                             optim.qhadamw(LR)),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    params, grads = problem()
    one, other = IDENTITIES[name]
    assert_close(train(one, params, grads)[0], train(other, params, grads)[0], 1e-13)


# -- the traps of the reference, B7 ---------------------------------------------------------------------------------
def test_trap_1_the_clip_is_on_unless_it_is_none():
    params, grads = problem()
    grads = [tree.map(lambda g: g * 1e-3, grads[0]), *grads[1:]]
    clipped, free = (train(optim.adopt(1.0, betas=(0.0, 0.9), clip=c), params, grads[:2])[0] for c in (optim.fourth_root, None))
    assert_close(train(optim.adopt(1.0, betas=(0.0, 0.9)), params, grads[:2])[0], clipped)
    moved = [(a - b).abs().max() for a, b in zip(tree.leaves(clipped), tree.leaves(params), strict=True)]
    assert max(moved) <= 1 + 1e-12  # 1 ** 0.25
    assert (free["embed"] - params["embed"]).abs().max() > 100


@pytest.mark.parametrize("name", ["decoupled_adamw", "qhadamw", "adopt", "qhadopt", "aggmo_adamw", "aggmo_adopt"])
def test_trap_2_decouple_is_heard_by_all(name):
    params, grads = problem()
    still = [tree.map(torch.zeros_like, g) for g in grads[:2]]
    build = partial(getattr(optim, name), 1e-2, weight_decay=0.1, mask=everywhere)
    shrunk = train(build(decouple=True), params, still)[0]
    assert_close(shrunk, tree.map(lambda p: p * 0.9 ** (1 if "adopt" in name else 2), params))
    assert (train(build(decouple=False), params, grads)[0]["embed"] - train(build(decouple=True), params, grads)[0]["embed"]
            ).abs().max() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_traps_3_and_9_one_formula_leaf_by_leaf_foreach_and_fused(name, monkeypatch):
    params, grads = problem()
    tx = ALL[name](LR)
    lists, state = train(tx, params, grads)
    fused = optim.fuse(tx)
    assert not fused.parts[0]  # nothing stays outside of the one pass
    p, s = tree.map(torch.clone, params), tx.init(params)
    for g in grads:
        p, s = fused(g, s, p, donate=True, compile=False)
    assert_close((p, s), (lists, state))
    monkeypatch.setattr(elementwise, "plain", lambda: False)
    alone, theirs = train(tx, params, grads)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves((lists, state)), tree.leaves((alone, theirs)), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_trap_4_init_takes_no_step(name):
    params, grads = problem()
    tx = ALL[name](LR)
    assert all(float(x.abs().sum()) == 0 for x in tree.leaves(tx.init(params)))
    tiny = [tree.map(lambda g: g * 1e-9, g) for g in grads]
    tx = ALL[name](LR, weight_decay=0) if name != "adam" else tx
    after = train(tx, params, tiny)[0]
    assert max(float((a - b).abs().max()) for a, b in zip(tree.leaves(after), tree.leaves(params), strict=True)) < 0.5


@pytest.mark.parametrize("name", ALL)
def test_trap_7_updates_are_what_is_added(name):
    params, grads = problem()
    tx = ALL[name](LR)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        after = tree.map(torch.add, params, updates)
        assert_close(optim.apply_updates(params, updates), after, 0)
        params = after


@pytest.mark.parametrize("name", ALL)
def test_trap_8_nothing_is_read_on_the_host(name):
    """`.item()` and every other look at a value fail on the meta device and under vmap."""
    params, grads = problem()
    tx = ALL[name](LR)
    meta = tree.map(lambda x: x.to("meta"), params)
    tx.update(meta, tx.init(meta), meta)
    stack = lambda t: tree.map(lambda x: torch.stack([x, 2 * x]), t)  # noqa: E731
    both, _ = torch.vmap(tx.update)(stack(grads[0]), torch.vmap(tx.init)(stack(params)), stack(params))
    assert_close(tree.map(lambda x: x[0], both), tx.update(grads[0], tx.init(params), params)[0], 1e-13)


@pytest.mark.parametrize("name", ALL)
def test_a_state_that_was_stored_goes_on_bit_for_bit(name):
    params, grads = problem(torch.float32)
    tx = ALL[name](LR)
    through, end = train(tx, params, grads)
    half, state = train(tx, params, grads[:3])
    again = tx.init(half)
    for path, x in tree.to_paths(state).items():  # by path, as a checkpoint has it
        tree.to_paths(again)[path].copy_(x)
    for g in grads[3:]:
        updates, again = ALL[name](LR).update(g, again, half)
        half = optim.apply_updates(half, updates)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves((through, end)), tree.leaves((half, again)), strict=True))


# -- the switch -----------------------------------------------------------------------------------------------------
def test_a_switch_changes_betas_weights_and_moments_at_its_update():
    """By hand: means of the gradients seen, with the weights that the betas of their time give them."""
    params, grads = problem()
    at, w = 3, (0.7, 0.98)
    tx = optim.aggmo_adamw(1.0, betas=(Switch(0.9, 0.99, at, reset=True), Switch(0.95, 0.999, at)),
                           vs=(Switch(*w, at),), eps=0.0, weight_decay=0)
    m, v, theta, mass_m, mass_v = 0.0, 0.0, params["norm"], 0.0, 0.0
    for t, g in enumerate(x["norm"] for x in grads):
        b, b2, weight = (0.9, 0.95, w[0]) if t < at else (0.99, 0.999, w[1])
        m, mass_m = (0.0, 0.0) if t == at else (m, mass_m)
        m, v = b * m + (1 - b) * g, b2 * v + (1 - b2) * g * g
        mass_m, mass_v = b * mass_m + (1 - b), b2 * mass_v + (1 - b2)
        theta = theta - ((1 - weight) * g + weight * m / mass_m) / (v / mass_v).sqrt()
    ours, _ = train(tx, params, grads)
    torch.testing.assert_close(ours["norm"], theta, rtol=1e-11, atol=1e-12)
    fused, p, s = optim.fuse(tx), tree.map(torch.clone, params), tx.init(params)
    for g in grads:
        p, s = fused(g, s, p, compile=False, donate=True)
    assert_close(p, ours)


def test_a_scaled_schedule():
    rate = optim.scaled(LR, at=4, by=4.0)
    assert [float(rate(torch.tensor(t))) for t in range(9)] == pytest.approx([r * (4 if t >= 4 else 1)
                                                                              for t, r in enumerate(RATES[:9])])
    assert rate.peak == 2e-2


@pytest.mark.parametrize("build, word", [
    (lambda: optim.qhadamw(1e-3, vs=(0.5, 0.2)), "one momentum"),
    (lambda: optim.aggmo_adamw(1e-3, vs=(0.5, 0.2)), "3 are needed, one for each momentum"),
    (lambda: optim.aggmo_adopt(1e-3, betas=TWO, vs=(0.9, 0.2)), "at most 1"),
    (lambda: optim.lion(1.0, betas=(1.0, 0.9)), "1.0"),
    (lambda: optim.qhadamw(lambda count: count, weight_decay=0.1), "optim.Rate"),
    (lambda: optim.adopt(1e-3, betas=(0.9, Switch(0.9, 1.5, 3))), "0.9, 0.9 then 1.5: each must be"),
    (lambda: optim.adopt(1e-3, betas=(0.9, Switch(0.9, 0.9, 3, reset=True))), "cannot be reset"),
    (lambda: optim.adopt(1e-3, clip=0.0), "above 0"), (lambda: optim.adopt(1e-3, clip=math.nan), "above 0"),
    (lambda: optim.sgd(1e-3, momentum=1.5), "below 1"), (lambda: optim.muon(1e-3, steps=0), "at least 1")])
def test_errors(build, word):
    with pytest.raises(ValueError, match=word):
        build()
