"""Replicas that go apart: DES-LOC, Local SGD and Adam, DiLoCo against loops written from the papers, and their identities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fmegatron import optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, thread_mesh, virtual_mesh
from fmegatron.sharding.traffic import counted
from fmegatron.testing import assert_trees_all_close, assert_trees_all_equal
from fmegatron.testing.invariance import NAMES, whole_leaves
from fmegatron.train.planned import plan_step
from fmegatron.train.semisync import SemiSync, desloc_sync, moment_periods, pieces_of
from fmegatron.train.state import init
from fmegatron.train.step import make_step, value_and_grad

torch.set_num_threads(1)
RATE, B1, B2, EPS = 0.02, 0.9, 0.95, 1e-8
NESTEROV = {"momentum": 0.9, "nesterov": True}


def model(layers=1):
    return gpt(Config(layers=layers, embed=8, heads=2, kv=1, mlp=8, vocab=12))


def batch(i, rows=4, same=0):
    """Step i's batch; same: replicas whose rows are all alike."""
    generator = torch.Generator().manual_seed(i)
    tokens = torch.randint(0, 12, (rows // (same or 1), 7), generator=generator)
    tokens = tokens.repeat(same, 1) if same else tokens
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": torch.ones(rows, 6, dtype=torch.float64)}


def sharding(rules="ddp", apart=True, make=virtual_mesh, **sizes):
    rules = RULES[rules]
    return Sharding(make(**(sizes or {"replica": 2})), replace(rules, apart="replica") if apart else rules)


def train(sh, tx, rule, steps, layers=1, same=0, **settings):
    """(state, metrics of the last step)."""
    net = model(layers)
    state = init(net, tx, sh, key=0, dtype=torch.float64, semisync=rule)
    step = make_step(net, tx, sh, semisync=rule, **settings)
    for i in range(steps):
        state, metrics = step(state, {k: shard(sh, x, NAMES[k]) for k, x in batch(i, same=same).items()})
    return state, metrics


def of_rank(x, rank=0):
    return tree.map(lambda leaf: leaf[rank], x)


# -- oracles: loops over replicas, each on one device -----------------------------------------------------------------
def replicas_by_hand(steps, meet, count=2, same=0, layers=1):
    """The parameters of each replica; meet(t, params, grads) -> new params by path, all replicas at once."""
    net = model(layers)
    plan = plan_step(net, SINGLE)
    start = init(net, optim.sgd(0.1), SINGLE, key=0, dtype=torch.float64).params
    params = [tree.to_paths(start) for _ in range(count)]
    for t in range(steps):
        grads = []
        for m in range(count):
            rows = 4 // count
            own = {k: x[m * rows : (m + 1) * rows] for k, x in batch(t, same=same).items()}
            with torch.no_grad():
                grads.append(tree.to_paths(value_and_grad(plan, plan.sh, tree.from_paths(params[m]), own)[0]))
        params = meet(t, params, grads)
    return params


def mean(trees):
    out = {path: sum(t[path] for t in trees) / len(trees) for path in trees[0]}
    return [out] * len(trees)


def algorithm_1(kx, ku, kv):
    """DES-LOC as arXiv 2505.22549 has it, with the bias correction of this Adam; t counts from 0."""
    state = {"u": None, "v": None}

    def meet(t, x, g):
        zero = [{path: torch.zeros_like(p) for path, p in x[0].items()}] * len(x)
        u, v = state["u"] or zero, state["v"] or zero
        x = mean(x) if t % kx == 0 else x
        u = mean(u) if t % ku == 0 else u
        v = mean(v) if t % kv == 0 else v
        u = [{p: B1 * a[p] + (1 - B1) * b[p] for p in a} for a, b in zip(u, g, strict=True)]
        v = [{p: B2 * a[p] + (1 - B2) * b[p] ** 2 for p in a} for a, b in zip(v, g, strict=True)]
        state.update(u=u, v=v)
        c1, c2 = 1 - B1 ** (t + 1), 1 - B2 ** (t + 1)
        return [{p: x[m][p] - RATE * (u[m][p] / c1) / ((v[m][p] / c2).sqrt() + EPS) for p in x[m]} for m in range(len(x))]

    return meet


@pytest.mark.parametrize("periods", [(2, 3, 4), (3, 3, 3), (1, 1, 1)], ids=str)
def test_desloc_is_algorithm_1(periods):
    kx, ku, kv = periods
    expected = replicas_by_hand(7, algorithm_1(kx, ku, kv))
    state, _ = train(sharding(), optim.adam(RATE, (B1, B2), EPS), SemiSync(kx, {"mu": ku, "nu": kv}), 7)
    for m in range(2):
        assert_trees_all_close(tree.to_paths(of_rank(state.params, m)), expected[m], 1e-9)


def test_diloco_is_torch_sgd_on_the_mean_pseudo_gradient():
    """Three replicas would not divide 4 rows: 4 of them; a period of 2, the outer optimizer is torch's own."""
    start = tree.to_paths(init(model(), optim.sgd(0.1), SINGLE, key=0, dtype=torch.float64).params)
    anchor = {p: torch.nn.Parameter(x.clone()) for p, x in start.items()}
    outer = torch.optim.SGD(anchor.values(), lr=0.7, momentum=0.9, nesterov=True)

    def meet(t, x, g):
        x = [{p: x[m][p] - 0.1 * g[m][p] for p in x[m]} for m in range(4)]
        if (t + 1) % 2:
            return x
        for p, a in anchor.items():
            a.grad = a.detach() - mean(x)[0][p]
        outer.step()
        return [{p: a.detach().clone() for p, a in anchor.items()}] * 4

    expected = replicas_by_hand(6, meet, count=4)
    rule = SemiSync(2, outer=optim.sgd(0.7, **NESTEROV))
    state, _ = train(sharding(replica=4), optim.sgd(0.1), rule, 6)
    for m in range(4):
        assert_trees_all_close(tree.to_paths(of_rank(state.params, m)), expected[m], 1e-10)


@pytest.mark.parametrize("delay, share", [(0, 0.0), (1, 0.0), (2, 0.5)])
def test_with_a_delay_it_is_streaming_diloco(delay, share):
    """Algorithm 2 of arXiv 2501.18512 as a loop: sent at t, awaited and applied at t + delay; a delay of 0 is DiLoCo."""
    start = tree.to_paths(init(model(), optim.sgd(0.1), SINGLE, key=0, dtype=torch.float64).params)
    anchor = {p: torch.nn.Parameter(x.clone()) for p, x in start.items()}
    outer, on_the_way = torch.optim.SGD(anchor.values(), lr=0.7, momentum=0.9, nesterov=True), {}

    def meet(t, x, g):
        x = [{p: x[m][p] - 0.1 * g[m][p] for p in x[m]} for m in range(2)]
        if (t + 1) % 3 == 0:
            on_the_way[t + delay] = {p: a.detach() - mean(x)[0][p] for p, a in anchor.items()}
        if t not in on_the_way:
            return x
        for p, a in anchor.items():
            a.grad = on_the_way[t][p]
        outer.step()
        return [{p: share * one[p] + (1 - share) * a.detach() for p, a in anchor.items()} for one in x]

    expected = replicas_by_hand(8, meet)
    rule = SemiSync(3, outer=optim.sgd(0.7, **NESTEROV), delay=delay, keep=share)
    state, _ = train(sharding(), optim.sgd(0.1), rule, 8)
    for m in range(2):
        assert_trees_all_close(tree.to_paths(of_rank(state.params, m)), expected[m], 1e-10)
    assert ("sent" in state.outer) == bool(delay)


def test_what_a_refused_step_did_not_send_does_not_arrive():
    sh, tx, net, rule = sharding(), optim.sgd(0.1), model(), SemiSync(2, outer=optim.sgd(0.7, **NESTEROV), delay=1)
    state, step = init(net, tx, sh, key=0, dtype=torch.float64, semisync=rule), make_step(net, tx, sh, semisync=rule)
    for i in range(4):
        given = batch(i)
        given["weights"][2:] *= float("nan") if i == 1 else 1  # the step that would send
        before = state
        state, _ = step(state, {k: shard(sh, x, NAMES[k]) for k, x in given.items()}, {"loss": float("inf")})
        if i in (1, 2):
            assert_trees_all_equal(state.outer, before.outer)
    assert state.outer["waits"]["0"].tolist() == [1, 1] and state.skipped.tolist() == [1, 1]


# -- identities -------------------------------------------------------------------------------------------------------
def test_sgd_that_meets_after_every_step_is_ddp_and_adam_is_not():
    ddp = sharding(apart=False)
    for tx, same in ((optim.sgd(0.1), True), (optim.sgd(0.1, **NESTEROV), True), (optim.adam(RATE), False)):
        expected, _ = train(ddp, tx, None, 4)
        state, _ = train(sharding(), tx, SemiSync(1, 1, order="after"), 4)
        worst = max(float((a - b).abs().max()) for a, b in
                    zip(tree.leaves(state.params), tree.leaves(expected.params), strict=True))  # fmt: skip
        assert worst < 1e-12 if same else worst > 1e-5
    early, _ = train(sharding(), optim.sgd(0.1), SemiSync(1, 1), 4)  # gradients at each replica's own parameters
    assert not torch.equal(early.params["norm"]["weight"][0], early.params["norm"]["weight"][1])


RULES_OF_MEETING = [
    SemiSync(2, {"mu": 3, "nu": 4}),
    SemiSync(3, 2, order="after"),
    SemiSync(3, outer=optim.sgd(1.0), fragments=2, keep=0.5),
    SemiSync(2, fragments=2, order="after"),
]


@pytest.mark.parametrize("rule", RULES_OF_MEETING, ids=lambda r: f"{r.params}-{r.moments}-{r.fragments}")
def test_equal_data_and_one_replica_are_plain_adam(rule):
    tx = optim.adam(RATE)
    half = {k: x[:2] for k, x in batch(0, same=2).items()}
    assert torch.equal(half["tokens"], batch(0, same=2)["tokens"][2:])
    plain, _ = train(SINGLE, tx, None, 5, same=2)
    one, _ = train(sharding(replica=1), tx, rule, 5, same=2)
    two, _ = train(sharding(), tx, rule, 5, same=2)
    for got in (of_rank(one.params), of_rank(two.params), of_rank(two.params, 1)):
        assert_trees_all_close(tree.to_paths(got), tree.to_paths(plain.params), 1e-9)
    if rule.outer is None and not rule.keep:
        bare, _ = train(sharding(apart=False, replica=1), tx, None, 5, same=2)
        assert_trees_all_equal(one.params, bare.params)  # bit for bit: there is nobody to meet


def test_between_meetings_replicas_are_independent_runs():
    state, _ = train(sharding(), optim.adam(RATE, (B1, B2), EPS), SemiSync(100, 100), 3)
    expected = replicas_by_hand(3, algorithm_1(100, 100, 100))
    for m in range(2):
        assert_trees_all_close(tree.to_paths(of_rank(state.params, m)), expected[m], 1e-9)


@pytest.mark.parametrize("outer", [None, optim.sgd(0.7, **NESTEROV), optim.adam(0.01)], ids=["mean", "nesterov", "adam"])
def test_after_a_meeting_replicas_are_equal_and_moments_are_not(outer):
    state, _ = train(sharding(), optim.adam(RATE), SemiSync(3, outer=outer, order="after"), 6)
    for x in tree.leaves(state.params):
        assert torch.equal(x[0], x[1])
    assert not torch.equal(state.opt_state[0]["mu"]["norm"]["weight"][0], state.opt_state[0]["mu"]["norm"]["weight"][1])
    later, _ = train(sharding(), optim.adam(RATE), SemiSync(3, outer=outer, order="after"), 7)
    assert not torch.equal(later.params["norm"]["weight"][0], later.params["norm"]["weight"][1])


@pytest.mark.parametrize("fragments", [1, 3])
def test_an_outer_rate_of_one_is_the_mean(fragments):
    rule = SemiSync(3, 6, order="after", fragments=fragments)
    expected, _ = train(sharding(), optim.adam(RATE), rule, 7, layers=3)
    state, _ = train(sharding(), optim.adam(RATE), replace(rule, outer=optim.sgd(1.0)), 7, layers=3)
    assert_trees_all_close(state.params, expected.params, 1e-10)


# -- fragments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["strided", "sequential"])
def test_fragments_take_turns_and_hold_everything_once(pattern):
    rule = SemiSync(6, fragments=3, pattern=pattern, order="after")
    pieces = pieces_of(model(6), rule)
    assert len({piece.name for piece in pieces}) == len(pieces) == len({(piece.path, piece.row) for piece in pieces})
    layer = {int(p.name.split(".")[1]): p.fragment for p in pieces if p.row is not None}
    assert layer == {i: i % 3 if pattern == "strided" else i // 2 for i in range(6)}
    assert {piece.fragment for piece in pieces} == {0, 1, 2}
    assert [rule.fragment_at(t) for t in range(9)] == [None, None, 1, None, 2, None, 0, None, 1]
    for steps in (4, 6) if pattern == "strided" else ():
        state, _ = train(sharding(), optim.adam(RATE), rule, steps, layers=6)
        flat = tree.to_paths(state.params)
        for piece in pieces:
            x = flat[piece.path] if piece.row is None else flat[piece.path][:, piece.row]
            assert torch.equal(x[0], x[1]) == (piece.fragment == rule.fragment_at(steps)), piece


def test_a_replica_keeps_a_share_of_its_own():
    apart, _ = train(sharding(), optim.sgd(0.1), SemiSync(100), 2)
    state, _ = train(sharding(), optim.sgd(0.1), SemiSync(2, order="after", keep=0.25), 2)
    for x, y in zip(tree.leaves(state.params), tree.leaves(apart.params), strict=True):
        assert torch.allclose(x, 0.75 * y.mean(0) + 0.25 * y, rtol=0, atol=1e-14)


# -- on meshes --------------------------------------------------------------------------------------------------------
DESLOC, DILOCO = SemiSync(2, {"mu": 3, "nu": 4}), SemiSync(3, outer=optim.sgd(0.7, **NESTEROV), fragments=3)
MESHES = [
    ("fsdp_tp_sp", virtual_mesh, {"replica": 2, "dp": 2, "tp": 2}, {}, DESLOC),
    ("zero2_tp", virtual_mesh, {"replica": 2, "dp": 2, "tp": 2}, {"remat": "full"}, DILOCO),
    ("hsdp", thread_mesh, {"replica": 2, "fsdp": 2}, {}, DILOCO),
]


@pytest.mark.parametrize("rules, make, sizes, settings, rule", MESHES)
def test_a_replica_computes_the_same_however_it_is_sharded(rules, make, sizes, settings, rule):
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adam(RATE))
    sh = sharding(rules, make=make, **sizes)
    state, metrics = train(sh, tx, rule, 4, layers=2, **settings)
    expected, wanted = train(sharding(), tx, rule, 4, layers=2)
    assert_trees_all_close(of_rank(metrics), of_rank(wanted), 1e-9)
    inner = replace(sh, rules=replace(sh.rules, apart=None), mesh=make(**{k: n for k, n in sizes.items() if k != "replica"}))
    plan, size = plan_step(model(2), inner), sh.mesh.size // 2
    for r in range(2):
        own = tree.map(lambda x, r=r: x[r * size : (r + 1) * size], state.params)
        assert_trees_all_close(whole_leaves(plan, own, "storage"), tree.to_paths(of_rank(expected.params, r)), 1e-8)


def test_metrics_are_of_all_replicas():
    sh, tx, net = sharding(), optim.sgd(0.1), model()
    rule = SemiSync(8)
    state, step = init(net, tx, sh, key=0, dtype=torch.float64, semisync=rule), make_step(net, tx, sh, semisync=rule)
    given = batch(0)
    given["weights"][2:, 2:] = 0  # the second replica has fewer tokens that count
    _, metrics = step(state, {k: shard(sh, x, NAMES[k]) for k, x in given.items()})
    single = make_step(net, tx, SINGLE)(init(net, tx, SINGLE, key=0, dtype=torch.float64), given)[1]
    for name in ("loss", "ce", "count.ce"):
        assert torch.allclose(metrics[name], single[name].expand(2), rtol=1e-12), name


def test_a_replica_that_skips_a_step_keeps_in_time_with_the_others():
    sh, tx, net, rule = sharding(), optim.adam(RATE), model(), SemiSync(2, order="after")
    state, step = init(net, tx, sh, key=0, dtype=torch.float64, semisync=rule), make_step(net, tx, sh, semisync=rule)
    for i in range(2):
        given = batch(i)
        given["weights"][2:] *= float("inf") if i == 0 else 1
        state, metrics = step(state, {k: shard(sh, x, NAMES[k]) for k, x in given.items()})
    assert state.step.tolist() == [2, 1] and state.skipped.tolist() == [0, 1] and state.consumed.tolist() == [8, 8]
    assert metrics["skipped"].tolist() == [0, 1]
    assert torch.equal(state.params["norm"]["weight"][0], state.params["norm"]["weight"][1])


@pytest.mark.parametrize("order", ["before", "after"])
def test_what_one_replica_refuses_all_refuse_and_nobody_has_met(order):
    sh, tx, net, rule = sharding(), optim.adam(RATE), model(), SemiSync(2, 2, order=order)
    state, step = init(net, tx, sh, key=0, dtype=torch.float64, semisync=rule), make_step(net, tx, sh, semisync=rule)
    clocks = 2 if order == "before" else 1
    for i in range(clocks):
        state, _ = step(state, {k: shard(sh, x, NAMES[k]) for k, x in batch(i).items()})
    given = batch(9)
    given["weights"][2:] *= float("nan")
    after, _ = step(state, {k: shard(sh, x, NAMES[k]) for k, x in given.items()}, {"loss": float("inf")})
    assert_trees_all_equal((after.params, after.opt_state), (state.params, state.opt_state))
    assert after.step.tolist() == state.step.tolist() and after.skipped.tolist() == [1, 1]


# -- traffic ----------------------------------------------------------------------------------------------------------
def sent(rule, tx, steps, rules="ddp", **sizes):
    """Bytes that a rank hands in along the axis of replicas, step by step, metrics left out."""
    mesh, traffic = counted(virtual_mesh(**sizes))
    sh, net = Sharding(mesh, replace(RULES[rules], apart="replica")), model(2)
    state, step = init(net, tx, sh, key=0, semisync=rule), make_step(net, tx, sh, semisync=rule)
    out = []
    for i in range(steps):
        traffic.clear()
        state, metrics = step(state, {k: shard(sh, x, NAMES[k]) for k, x in batch(i).items()})
        out.append(traffic.counts().get(("all_reduce", "replica"), (0, 0))[1] - 8 * (len(metrics) - 1))  # all but "skipped"
    return out, sum(x[0].numel() for x in tree.leaves(state.params))


@pytest.mark.parametrize("rules, sizes", [("ddp", {"replica": 2}), ("zero2", {"replica": 2, "dp": 2})])
def test_traffic_is_the_sum_over_what_is_due(rules, sizes):
    kx, ku, kv = 2, 3, 4
    got, _ = sent(SemiSync(kx, {"mu": ku, "nu": kv}), optim.adam(RATE), 13, rules, **sizes)
    state = init(model(2), optim.adam(RATE), sharding(rules, **sizes), key=0, semisync=SemiSync(2))
    held = 4 * sum(x[0].numel() for x in tree.leaves(state.opt_state[0]["mu"]))  # ZeRO: a rank's part of all there is
    assert got == [held * sum(t > 0 and t % k == 0 for k in (kx, ku, kv)) for t in range(13)]
    assert sum(got[1:]) / 12 == held * (1 / kx + 1 / ku + 1 / kv)


def test_traffic_of_diloco_and_of_fragments():
    got, held = sent(SemiSync(4, outer=optim.sgd(0.7, **NESTEROV)), optim.adam(RATE), 8, replica=2)
    assert got == [4 * held * ((t + 1) % 4 == 0) for t in range(8)]
    half, _ = sent(SemiSync(4, outer=optim.sgd(0.7), dtype=torch.bfloat16), optim.adam(RATE), 4, replica=2)
    assert half == [0, 0, 0, 2 * held]
    later, _ = sent(SemiSync(4, outer=optim.sgd(0.7), delay=2), optim.adam(RATE), 8, replica=2)
    assert later == got  # it is sent when it is due, and costs nothing when it arrives
    parts, _ = sent(SemiSync(4, outer=optim.sgd(0.7), fragments=2), optim.adam(RATE), 8, replica=2)
    assert parts[1] and parts[3] and sum(parts[:4]) == 4 * held and parts[:4] == parts[4:] and parts[0] == parts[2] == 0


# -- the pure function, and mistakes ----------------------------------------------------------------------------------
def test_desloc_sync_takes_prefixes_and_leaves_counts_alone():
    params = {"w": torch.ones(2)}
    state = ({"count": torch.tensor(7), "mu": {"w": torch.ones(2)}, "nu": {"w": torch.ones(2)}}, {})
    double = [lambda xs: [2 * x for x in xs]]
    got, new = desloc_sync(6, params, state, (4, ({"count": 1, "mu": 3, "nu": 0}, 1)), double[0])
    assert got["w"].tolist() == [1, 1] and new[0]["mu"]["w"].tolist() == [2, 2] and new[0]["nu"]["w"].tolist() == [1, 1]
    assert new[0]["count"] == 7
    assert desloc_sync(0, params, state, (1, 1), double[0])[0]["w"].tolist() == [1, 1]


def test_slots_are_named_one_by_one():
    params = {"a": torch.zeros(2), "b": {"a": torch.zeros(3)}}
    state = optim.aggmo_adamw(1e-3, betas=(0.9, 0.99, 0.95), vs=(0.5, 0.3)).init(params)
    periods = moment_periods({"mu": 2, "mu_2": 4, "nu": 8}, params, state)
    assert periods[0] == {"count": 0, **{k: {"a": n, "b": {"a": n}} for k, n in (("mu", 2), ("mu_2", 4), ("nu", 8))}}
    with pytest.raises(ValueError, match="this optimizer's are mu, mu_2, nu; give each its period"):
        moment_periods({"mu": 2, "nu": 8}, params, state)


def test_mistakes_are_one_line():
    for wrong, text in ((lambda: SemiSync(0), "at least 1 step"), (lambda: SemiSync(2, fragments=3), "fragments = 3"),
                        (lambda: SemiSync(2, keep=1.0), "keep = 1.0"), (lambda: SemiSync(2, delay=1), "delay = 1 is of"),
                        (lambda: SemiSync(2, outer=optim.sgd(1.0), delay=2), "less than the 2 steps"),
                        (lambda: SemiSync(2, dtype=torch.bfloat16), "name one")):
        with pytest.raises(ValueError, match=text):
            wrong()
    with pytest.raises(ValueError, match="no SemiSync says when they meet"):
        plan_step(model(), sharding())
    with pytest.raises(ValueError, match="name no axis for them"):
        plan_step(model(), SINGLE, semisync=SemiSync(2))
    with pytest.raises(ValueError, match="must be the first, before 'dp'"):
        plan_step(model(), sharding(dp=2, replica=2), semisync=SemiSync(2))
    both = replace(RULES["fsdp"], storage=(("*", ("dp", "replica")),), apart="replica")
    with pytest.raises(ValueError, match="only the batch may"):
        plan_step(model(), Sharding(virtual_mesh(replica=2), both), semisync=SemiSync(2))
