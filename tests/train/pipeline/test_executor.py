"""A pipelined step computes what the plain step computes, for every schedule; and holds what its schedule says."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron import optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, thread_mesh, virtual_mesh
from fmegatron.testing import assert_trees_all_close, measure
from fmegatron.train.pipeline.layout import parse_layout
from fmegatron.train.pipeline.measure import replay
from fmegatron.train.pipeline.schedules import SCHEDULES, make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.pipeline.timeline import measured
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step, value_and_grad

torch.set_num_threads(1)


def model(layers=4, **more):
    return gpt(Config(**{"layers": layers, "embed": 8, "heads": 2, "mlp": 12, "vocab": 13, "tied": True, **more}))


def batch(rows=8, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, 13, (rows, length), generator=generator) for _ in range(2))
    weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return {"tokens": tokens, "labels": labels, "weights": weights}


def same(got, expected):
    assert_trees_all_close(got.grads, expected.grads, 1e-12)
    assert_trees_all_close(got.metrics, expected.metrics, 1e-12)
    assert_trees_all_close({"norm": got.norm}, {"norm": expected.norm}, 1e-12)


@pytest.fixture(scope="module")
def expected():
    return measure(model(), SINGLE, batch())


@pytest.mark.parametrize("name, ranks, microbatches", [*((name, 2, 4) for name in SCHEDULES), ("zbv", 2, 8), ("1f1b", 4, 8),
                                                       ("zb_h1", 4, 2), ("zbv", 1, 4), ("gpipe", 1, 1)])  # fmt: skip
def test_loss_and_gradients(name, ranks, microbatches, expected):
    pipeline = Pipeline(make_schedule(name, ranks, None, microbatches))
    same(measure(model(), SINGLE, batch(), expected=expected, pipeline=pipeline), expected)


@pytest.mark.parametrize("remat", ["full", "every-2", "selective"])
@pytest.mark.parametrize("name", ["1f1b", "zbv"])
@pytest.mark.parametrize("some", [None, 2])
def test_recompute_inside_stages(name, remat, some, expected):
    pipeline = Pipeline(make_schedule(name, 2, None, 4), remat_microbatches=some)
    same(measure(model(), SINGLE, batch(), expected=expected, pipeline=pipeline, remat=remat), expected)


@pytest.mark.parametrize("layout", ["E|tttt|L|", "Etttt||L", "E|ttt|tL", "Ett|tt|L"])
def test_any_layout(layout, expected):
    if layout.endswith("|"):
        layout = layout[:-1]
    pipeline = Pipeline(make_schedule("zb_h1", 3, None, 4), parse_layout(layout))
    same(measure(model(), SINGLE, batch(), expected=expected, pipeline=pipeline), expected)


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_microbatches_that_do_not_divide(name):
    given = batch(rows=11)
    pipeline = Pipeline(make_schedule(name, 2, None, 4))
    same(measure(model(), SINGLE, given, pipeline=pipeline), measure(model(), SINGLE, given))


def test_sequences_of_their_own_lengths():
    """Each microbatch has its length: the same as one step over all of them, padded with weight 0."""
    net, lengths = model(), (3, 6, 5, 4)
    batches = [batch(rows=2, length=n, seed=n) for n in lengths]
    whole = {key: torch.cat([torch.nn.functional.pad(one[key], (0, 6 - n)) for one, n in zip(batches, lengths, strict=True)])
             for key in batches[0]}  # fmt: skip
    params = net.init(0, torch.float64)
    with torch.no_grad():
        plain = plan_step(net, SINGLE)
        expected = value_and_grad(plain, plain.sh, params, whole)
        for name in ("interleaved_1f1b", "zbv"):
            plan = plan_step(net, SINGLE, pipeline=Pipeline(make_schedule(name, 2, None, 4)))
            grads, metrics = value_and_grad(plan, plan.sh, params, batches)
            assert_trees_all_close(tree.to_paths(grads), tree.to_paths(expected[0]), 1e-12)
            assert_trees_all_close(metrics, expected[1], 1e-12)
            with pytest.raises(ValueError, match="3 batches in a step of 4 microbatches"):
                value_and_grad(plan, plan.sh, params, batches[:3])


def test_dropout_is_the_same(expected):
    net = model(hidden_dropout=0.3, attention_dropout=0.2, embed_dropout=0.1)
    given = batch() | {"sample": torch.arange(8)}
    pipeline = Pipeline(make_schedule("zbv", 2, None, 4))
    same(measure(net, SINGLE, given, pipeline=pipeline, remat="full"), measure(net, SINGLE, given))


@pytest.mark.parametrize("name", SCHEDULES)
def test_five_steps_of_sgd(name):
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(optim.constant(0.3)))
    states = []
    for settings in ({}, {"pipeline": Pipeline(make_schedule(name, 2, None, 4))}):
        state, step = init(model(), tx, SINGLE, key=0, dtype=torch.float64), make_step(model(), tx, SINGLE, **settings)
        for i in range(5):
            state, metrics = step(state, batch(seed=i))
        states.append((tree.to_paths(state.params), metrics))
    assert_trees_all_close(states[1][0], states[0][0], 1e-12)
    assert_trees_all_close(states[1][1], states[0][1], 1e-12)


@pytest.mark.parametrize("rules, sizes, name, make, remat", [
    ("fsdp_tp_sp", {"dp": 2, "tp": 2}, "1f1b", virtual_mesh, "full"),
    ("zero1", {"dp": 2}, "looped_bfs", virtual_mesh, "none"),
    ("tp_sp", {"cp": 2, "tp": 2}, "interleaved_1f1b", virtual_mesh, "none"),
    ("fsdp_tp_sp", {"dp": 2, "tp": 2}, "zbv", thread_mesh, "none"),
    ("tp_sp", {"cp": 2, "tp": 2}, "zb_h1", thread_mesh, "selective"),
    ("hsdp", {"dp": 2, "fsdp": 2}, "dualpipev", thread_mesh, "every-2"),
])  # fmt: skip
def test_composed_with_the_other_axes(rules, sizes, name, make, remat):
    net, given = model(heads=4, embed=16, vocab_pad=4), batch(rows=16, length=8)
    expected = measure(net, SINGLE, given)
    pipeline, sh = Pipeline(make_schedule(name, 2, None, 4)), Sharding(make(**sizes), RULES[rules])
    same(measure(net, sh, given, expected=expected, pipeline=pipeline, remat=remat), expected)


@pytest.mark.parametrize("reshard", ["never", "first-2"])
def test_gathered_once_for_all_microbatches(reshard, expected):
    pipeline = Pipeline(make_schedule("zb_h1", 2, None, 4))
    sh = Sharding(thread_mesh(dp=2), RULES["fsdp"])
    same(measure(model(), sh, batch(), expected=expected, pipeline=pipeline, reshard=reshard), expected)


class Alive:
    """Counts graphs that are alive, by a tensor that each saves for its backward."""

    def __init__(self):
        self.now, self.most = {}, {}

    def enter(self, rank, x):
        self.now[rank] = self.now.get(rank, 0) + 1
        self.most[rank] = max(self.most.get(rank, 0), self.now[rank])
        weakref.finalize(x, self.leave, rank)

    def leave(self, rank):
        self.now[rank] -= 1


class Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alive, rank):
        ctx.kept = object.__new__(type("Kept", (), {}))
        alive.enter(rank, ctx.kept)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None, None


@pytest.mark.parametrize("ranks, microbatches", [(2, 6), (4, 8)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_alive_are_the_schedules(name, ranks, microbatches):
    schedule = make_schedule(name, ranks, None, microbatches)
    net, alive = model(layers=schedule.stages), Alive()

    def watched(node, rank):
        def fn(sh, p, v, key):
            return node.fn(sh, p, {**v, "h": Saved.apply(v["h"], alive, rank)}, key)
        return replace(node, fn=fn)

    chain = tuple(node if node.layer is None else watched(node, schedule.rank_of[node.index - 1]) for node in net.chain)
    net = replace(net, chain=chain)
    plan = plan_step(net, SINGLE, pipeline=Pipeline(schedule))
    gc.disable()
    with torch.no_grad():
        value_and_grad(plan, plan.sh, net.init(0), batch(rows=microbatches))
    gc.enable()
    assert [alive.most[rank] for rank in range(ranks)] == schedule.peaks()
    assert set(alive.now.values()) == {0}


def test_marks_are_a_timeline_of_the_run():
    schedule = make_schedule("zb_h1", 2, None, 4)
    marks = []
    plan = plan_step(model(), SINGLE, pipeline=Pipeline(schedule, marks=marks))
    with torch.no_grad():
        value_and_grad(plan, plan.sh, model().init(0), batch())
    timeline = measured("a run", marks)
    side_by_side = replay(schedule, marks)
    busy = sum(end - start for _, _, start, end in marks) * 1e3
    assert sum(map(side_by_side.busy, range(2))) == pytest.approx(busy) and side_by_side.span <= timeline.span
    assert side_by_side.peaks() == schedule.peaks() and side_by_side.unit == " ms"
    assert tuple(tuple(bar.action for bar in timeline.row(rank)) for rank in range(2)) == schedule.actions
    assert timeline.peaks() == schedule.peaks() and timeline.unit == " ms" and timeline.bubble > 0


class Products(TorchDispatchMode):
    """Counts matrix products by the computation that they belong to."""

    def __init__(self, marks):
        super().__init__()
        self.marks, self.seen = marks, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.seen.append(len(self.marks))
        return func(*args, **(kwargs or {}))


def test_each_half_of_a_backward_has_its_own_products():
    """Seven weights a layer, and attention's fused kernel, which has no weight: F 7, I 7, W 7, B 14."""
    found = {}
    for name in ("zb_h1", "1f1b"):
        marks = []
        net, schedule = model(mlp=12, loss_chunks=0), make_schedule(name, 4, None, 4)
        plan = plan_step(net, SINGLE, pipeline=Pipeline(schedule, marks=marks))
        with torch.no_grad(), Products(marks) as products:
            value_and_grad(plan, plan.sh, net.init(0), batch())
        for i, (rank, action, _, _) in enumerate(marks):
            if rank == 1:  # one layer, no embedding, no loss
                found.setdefault((name, action.kind), set()).add(products.seen.count(i))
            if rank == 3:
                found.setdefault((name, action.kind, "loss"), set()).add(products.seen.count(i))
    weights = found["1f1b", "F"].pop()
    assert found["1f1b", "B"] == {2 * weights} and weights == 7
    assert [found["zb_h1", kind] for kind in "FIW"] == [{weights}] * 3
    assert [found["zb_h1", kind, "loss"] for kind in "FIW"] == [{weights + 1}] * 3


def test_only_some_microbatches_are_computed_again():
    marks, net = [], model(loss_chunks=0)
    pipeline = Pipeline(make_schedule("1f1b", 4, None, 4), remat_microbatches=1, marks=marks)
    plan = plan_step(net, SINGLE, pipeline=pipeline, remat="full")
    with torch.no_grad(), Products(marks) as products:
        value_and_grad(plan, plan.sh, net.init(0), batch())
    count = {action.microbatch: products.seen.count(i) for i, (rank, action, _, _) in enumerate(marks)
             if rank == 1 and action.kind == "B"}  # fmt: skip
    assert count == {0: 21, 1: 14, 2: 14, 3: 14}


def test_refused_in_one_line():
    net, split = model(), Pipeline(make_schedule("zbv", 2, None, 4))
    with pytest.raises(ValueError, match="schedule zbv splits backwards, a vmap cannot: use threads"):
        measure(net, Sharding(virtual_mesh(dp=2), RULES["ddp"]), batch(), pipeline=split)
    with pytest.raises(ValueError, match="schedule zbv splits backwards, compiled blocks cannot: use 1f1b or compile=False"):
        plan_step(net, SINGLE, pipeline=split, compile=True)
    with pytest.raises(ValueError, match="microbatches = 8, but schedule zbv has 4"):
        plan_step(net, SINGLE, pipeline=split, microbatches=8)
    with pytest.raises(ValueError, match="4 layers: 4 do not divide over 6 of 6 stages"):
        plan_step(net, SINGLE, pipeline=Pipeline(make_schedule("zbv", 3, None, 4)))
    with pytest.raises(ValueError, match="3 samples a rank do not divide into 4 microbatches"):
        measure(net, SINGLE, batch(rows=3), pipeline=split)

