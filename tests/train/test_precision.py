"""The loss scale against megatron-core's, fp16 on any mesh, what is skipped and counted."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.optim import Split
from fmegatron.optim.packed import joined
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, spmd, thread_mesh, virtual_mesh
from fmegatron.testing.invariance import NAMES, whole_leaves
from fmegatron.train.leaves import to_optimizer
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.planned import plan_step
from fmegatron.train.precision import LossScale, Precision, constant_scale
from fmegatron.train.state import init
from fmegatron.train.step import make_step, value_and_grad

torch.set_num_threads(1)


# -- the loss scale --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def oracle():
    """megatron-core's DynamicGradScaler, on the CPU; its file alone: the package takes ten seconds to import."""
    package = find_spec("megatron.core") if find_spec("megatron") else None
    if package is None:
        pytest.skip("megatron-core is not installed")
    spec = spec_from_file_location("grad_scaler", Path(package.submodule_search_locations[0]) / "optimizer/grad_scaler.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch = SimpleNamespace(
        tensor=lambda x, dtype, device: torch.tensor(x, dtype=dtype), float=torch.float, max=torch.max
    )
    return module.DynamicGradScaler


@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=60),
    initial=st.sampled_from([2.0**32, 65536.0, 3.0, 1.0]),
    minimum=st.sampled_from([1.0, 0.75]),
    growth=st.sampled_from([2.0, 1.7]),
    backoff=st.sampled_from([0.5, 0.3]),
    window=st.integers(1, 6),
    hysteresis=st.integers(1, 4),
)
def test_the_loss_scale_is_megatrons(oracle, bad, initial, minimum, growth, backoff, window, hysteresis):
    theirs = oracle(initial, minimum, growth, backoff, window, hysteresis)
    ours = LossScale(initial, window, hysteresis, minimum, growth, backoff)
    state = ours.init(torch.zeros((), dtype=torch.int64))
    for found in bad:
        theirs.update(found)
        state = ours.update(state, torch.tensor(not found))
        assert torch.equal(state["scale"], theirs.scale[0])
        assert (int(state["clean"]), int(state["patience"])) == (theirs._growth_tracker, theirs._hysteresis_tracker)


def test_patience_comes_back_with_growth_only():
    ours = LossScale(initial=64.0, window=3, hysteresis=2)
    state, scales = ours.init(torch.zeros((), dtype=torch.int64)), []
    for finite in (False, True, True, False, True, True, True, False, True, False):
        state = ours.update(state, torch.tensor(finite))
        scales.append(float(state["scale"]))
    assert scales == [64, 64, 64, 32, 32, 32, 64, 64, 64, 32]


@pytest.mark.parametrize("wrong", [{"initial": 0.0}, {"backoff": 1.0}, {"growth": 1.0}, {"minimum": 8.0, "initial": 4.0}])
def test_a_wrong_scale_is_an_error(wrong):
    with pytest.raises(ValueError, match="loss scale: (initial|backoff|growth|minimum) = "):
        LossScale(**wrong)


# -- steps -----------------------------------------------------------------------------------------------------------
def model(**more):
    return gpt(Config(**{"layers": 2, "embed": 16, "heads": 4, "kv": 2, "mlp": 16, "vocab": 21, "vocab_pad": 8, **more}))


def batch(bad=False):
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, 21, (8, 8), generator=generator) for _ in range(2))
    weights = torch.rand(8, 8, generator=generator, dtype=torch.float64)
    return {"tokens": tokens, "labels": labels, "weights": weights * float("inf") if bad else weights}


def train(net, tx, sh, steps=4, dtype=torch.float32, key=0, **settings):
    """(whole parameters, metrics of each step, last state)."""
    plan, precision = plan_step(net, sh, **settings), settings.get("precision", Precision())
    state, step = init(net, tx, sh, key, dtype=dtype, precision=precision), make_step(net, tx, sh, **settings)
    records = []
    for n in range(steps):
        state, metrics = step(state, {name: shard(plan.sh, x, NAMES[name]) for name, x in batch(bad=n == 2).items()})
        records.append({name: float(x.flatten()[0]) for name, x in metrics.items()})
        assert all((x.flatten()[:1] == x.flatten()).all() or x.isnan().all() for x in metrics.values()), "ranks disagree"
    return whole_leaves(plan, state.params, "storage"), records, state


def adamw():
    return optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))


def test_a_constant_scale_of_a_power_of_two_changes_no_bit():
    plain, _, _ = train(model(), adamw(), SINGLE)
    scaled, records, state = train(model(), adamw(), SINGLE, precision=Precision(constant_scale(2.0**20)))
    assert all(torch.equal(scaled[path], x) for path, x in plain.items())
    assert [r["loss_scale"] for r in records] == [2.0**20] * 4 and [r["skipped"] for r in records] == [0, 0, 1, 1]
    assert float(state.precision["loss_scale"]["scale"]) == 2.0**20


DYNAMIC = Precision(LossScale(initial=2.0**40, window=2, hysteresis=1))
WAYS = [
    ("virtual", lambda: Sharding(virtual_mesh(dp=2, tp=2), RULES["fsdp_tp_sp"]), {"microbatches": 2}),
    ("threads", lambda: Sharding(thread_mesh(dp=2, cp=2), RULES["zero2"]), {"microbatches": 2, "remat": "full"}),
    ("pipeline", lambda: SINGLE, {"pipeline": Pipeline(make_schedule("1f1b", 2, 1, 2))}),
]


@pytest.mark.parametrize("name, sharding, settings", WAYS, ids=[way[0] for way in WAYS])
def test_scales_and_skips_do_not_depend_on_the_mesh(name, sharding, settings):
    """In fp64 parameters scaled by 2**40 no gradient overflows: a bad batch alone is skipped, and halves the scale."""
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.3, momentum=0.9))
    same = {"steps": 6, "dtype": torch.float64, "precision": DYNAMIC, "count_zeros": True}
    expected, first, _ = train(model(), tx, SINGLE, **same)
    got, then, _ = train(model(), tx, sharding(), **same, **settings)
    assert [r["loss_scale"] for r in then] == [r["loss_scale"] for r in first] == [2.0**n for n in (40, 40, 41, 40, 40, 41)]
    assert [r["skipped"] for r in then] == [r["skipped"] for r in first] == [0, 0, 1, 1, 1, 1]
    assert [r["zeros"] for r in then] == [r["zeros"] for r in first]
    for path, x in expected.items():
        torch.testing.assert_close(got[path], x, rtol=1e-8, atol=1e-10, msg=path)


def test_fp16_finds_its_scale_and_learns():
    precision = Precision(LossScale(initial=2.0**32, window=1000, hysteresis=2))
    net, tx = model(), adamw()
    state = init(net, tx, SINGLE, precision=precision)
    step = make_step(net, tx, SINGLE, dtype=torch.float16, precision=precision)
    losses, scales = [], []
    for _ in range(40):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
        scales.append(float(metrics["loss_scale"]))
    assert 4 <= int(state.skipped) <= 30 and int(state.step) == 40 - int(state.skipped)
    assert scales[0] == 2.0**32 and scales[-1] <= 2.0**26 and losses[-1] < 0.8 * losses[0]


def test_fp16_without_a_scale_is_refused():
    with pytest.raises(ValueError, match="float16 without a loss scale"):
        plan_step(model(), SINGLE, dtype=torch.float16)


def test_a_step_above_the_norm_is_skipped_and_the_scale_stays():
    precision = Precision(LossScale(initial=8.0, window=2, hysteresis=1))
    _, records, state = train(model(), adamw(), SINGLE, steps=2, precision=precision, skip_norm=1e-3)
    assert [r["skipped"] for r in records] == [1, 2] and int(state.step) == 0 and int(state.consumed) == 16
    assert [r["loss_scale"] for r in records] == [8, 8] and float(state.precision["loss_scale"]["scale"]) == 16


def test_zeros_are_those_of_the_gradient():
    net = model(vocab=300)
    _, records, _ = train(net, optim.sgd(0.0), SINGLE, steps=1, count_zeros=True)
    unused = 300 - len(batch()["tokens"].unique())
    assert records[0]["zeros"] == unused * 16 and unused > 250


# -- parameters in halves --------------------------------------------------------------------------------------------
HALVES = Precision(remainder=True)


@pytest.mark.parametrize("rules, sizes", [("zero1", {"dp": 2}), ("fsdp_tp_sp", {"dp": 2, "tp": 2})])
def test_bf16_and_remainders_are_a_master_in_fp32(rules, sizes):
    """The same gradients give the same fp32 parameters, to the bit, as when these are kept whole."""
    sh, tx, net = Sharding(virtual_mesh(**sizes), RULES[rules]), adamw(), model()
    plan, state, plain = plan_step(net, sh), init(net, tx, sh, precision=HALVES), init(net, tx, sh)
    assert all(x.dtype == torch.bfloat16 for x in tree.leaves(state.params))
    steps = make_step(net, tx, sh, dtype=torch.bfloat16, precision=HALVES), make_step(net, tx, sh, dtype=torch.bfloat16)
    local = {name: shard(plan.sh, x, NAMES[name]) for name, x in batch().items()}
    for _ in range(2):  # in use both are the nearest bf16 of the same fp32
        state, metrics = steps[0](state, local)
        plain, expected = steps[1](plain, local)
        assert torch.equal(metrics["loss"], expected["loss"])

    def whole(here, params, low=None):
        master = to_optimizer(plan.leaves, params, here)
        return master if low is None else joined(Split(master, low))

    got = spmd(plan.sh, whole)(state.params, state.precision["remainder"])
    for a, b in zip(tree.leaves(got), tree.leaves(spmd(plan.sh, whole)(plain.params)), strict=True):
        assert torch.equal(a, b)


def test_halves_are_computed_with_in_bf16_only():
    with pytest.raises(ValueError, match="float32 with remainders"):
        plan_step(model(), SINGLE, dtype=torch.float32, precision=HALVES)


def test_gradients_sum_in_the_chosen_dtype():
    for precision, dtype in ((Precision(accumulate=torch.bfloat16), torch.bfloat16), (HALVES, torch.float32)):
        plan = plan_step(model(), SINGLE, microbatches=2, precision=precision)
        state = init(model(), adamw(), SINGLE, precision=precision)
        data = {name: x.float() if x.is_floating_point() else x for name, x in batch().items()}
        grads, _ = value_and_grad(plan, plan.sh, state.params, data)
        assert {x.dtype for x in tree.leaves(grads)} == {dtype}
