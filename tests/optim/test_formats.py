"""Formats of optimizer state: parameters in halves are exact, rounding is unbiased, and all ways to run a step agree."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import optim, random, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.optim.formats import format_of, join, split
from fmegatron.optim.low_bit import decoded
from fmegatron.optim.packed import halved, joined
from fmegatron.sharding import RULES, SINGLE, Sharding, spmd, virtual_mesh
from fmegatron.train import saving
from fmegatron.train.leaves import to_optimizer
from fmegatron.train.planned import plan_step
from fmegatron.train.state import Over, init

torch.set_num_threads(1)


# -- halves ----------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_halves_hold_every_bit(words):
    x = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    high, low = split(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(high, low).view(torch.int32), x.view(torch.int32))
    fine = x.isfinite() & (x.abs() < 3.3e38) & (low != -(2**15))  # a tie goes away from zero here, to even in torch
    assert torch.equal(high[fine], x.bfloat16()[fine])


# -- rounding --------------------------------------------------------------------------------------------------------
def values(n=192):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, n // 2, generator=g) * 10.0 ** torch.randint(-2, 2, (2, n // 2), generator=g)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("second", [False, True])
def test_rounding_is_to_a_neighbour_and_right_on_average(name, second):
    """Of 2000 draws the mean is within five standard errors of the value (of its root, where that is what is stored)."""
    kind, x = format_of(name, second), values()
    x, rooted = (x.square() if second else x), second and name == "fp8"
    bits = random.bits(random.fold_in(random.key(3), torch.arange(2000)[:, None, None]), torch.arange(x.numel()).view(x.shape))
    y = kind.load(*kind.store(x.expand(2000, *x.shape), bits)).double()
    y, wanted = (y.sqrt(), x.sqrt().double()) if rooted else (y, x.double())
    low, high = y.amin(0), y.amax(0)
    assert (low <= wanted * (1 + 1e-6)).logical_or(wanted < 0).all() and (low < high).float().mean() > 0.8
    p = ((wanted - low) / (high - low)).nan_to_num(0.0)  # how often it must go up
    error = (y.mean(0) - wanted).abs() / ((high - low) * (p * (1 - p) / 2000).sqrt() + 1e-6 * wanted.abs() + 1e-12)
    often = (p > 0.02) & (p < 0.98)
    assert error[often].max() < 5 and often.float().mean() > 0.8
    large = wanted.abs() > wanted.abs().amax(-1, keepdim=True) * 2.0**-5
    mantissa = {"bf16": 7, "fp16": 10, "fp8": 3}[name]
    assert ((high - low) <= wanted.abs() * 2.0**-mantissa * (1 + 1e-6))[large].all()


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8"])
def test_what_is_stored_stays(name):
    kind = format_of(name)
    arrays = kind.store(values(), torch.zeros((), dtype=torch.int64))
    again = kind.store(kind.load(*arrays), torch.full((), 2**32 - 1))
    assert all(torch.equal(a, b) for a, b in zip(arrays, again, strict=True))


# -- steps -----------------------------------------------------------------------------------------------------------
SHAPES = {"a": (13, 70), "b": (128,), "c.one": (1,), "layers.w": (2, 8, 40)}


def problem(scalar=True):
    g, shapes = torch.Generator().manual_seed(1), SHAPES | ({"c.scalar": ()} if scalar else {})
    draw = lambda: tree.from_paths({path: torch.randn(s, generator=g) for path, s in shapes.items()})  # noqa: E731
    return draw(), [draw() for _ in range(3)]


def steps(tx, halves, donate, scalar=True):
    params, grads = problem(scalar)
    state, fused = tx.init(params), optim.fuse(tx)
    params = halved(params) if halves else params
    for i, g in enumerate(grads):
        params, state = fused(g, state, params, ok=torch.tensor(i != 1), donate=donate, compile=False)
    return joined(params), state


TXS = {
    "adamw": partial(optim.adamw, 1e-2),
    "aggmo_adopt": partial(optim.aggmo_adopt, 1e-2, betas=(0.9, 0.99, 0.95), vs=(0.5, 0.3), weight_decay=0.1),
    "muon": partial(optim.muon, 1e-2),
    "sgd": partial(optim.sgd, 1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name, first, second", [
    ("adamw", "bf16", "bf16"), ("adamw", "fp8", "fp16"), ("aggmo_adopt", "fp16", "fp8"), ("muon", "fp8", "bf16"),
    ("sgd", "fp8", "fp32")])
def test_a_step_by_pieces_is_the_step(name, first, second):
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.in_formats(TXS[name](), first, second))
    scalar = name != "aggmo_adopt"  # whose bound is an fp64 scalar
    plain = steps(tx, False, False, scalar)
    for halves, donate in ((True, False), (False, True), (True, True)):
        for a, b in zip(tree.leaves(plain), tree.leaves(steps(tx, halves, donate, scalar)), strict=True):
            assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-6, atol=1e-8), (halves, donate)
    exact = steps(optim.chain(optim.clip_by_global_norm(1.0), TXS[name]()), False, False, scalar)
    worst = max(float((a - b).abs().max()) for a, b in zip(tree.leaves(plain[0]), tree.leaves(exact[0]), strict=True))
    assert 0 < worst < 0.04, worst  # three steps of 1e-2, each near the exact one


@pytest.mark.parametrize("name, first, second, halves", [
    ("sgd", "fp8", "fp32", True),
    pytest.param("sgd", "bf16", "fp32", True, marks=pytest.mark.long),
    pytest.param("adamw", "fp8", "fp16", False, marks=pytest.mark.long),
    pytest.param("adamw", "bf16", "fp8", True, marks=pytest.mark.long)])
def test_a_compiled_step_rounds_by_the_same_words(name, first, second, halves):
    """Moments from zeros are products, which no compiler rounds otherwise: their codes are equal, bit for bit. Later sums may
    differ in their last fp32 bit, and round to the other neighbour, one code in thousands. Other words change half of them."""
    shapes, g = {"a": (12, 320), "b": (128,), "d": (13, 70)}, torch.Generator().manual_seed(2)

    def draw():
        return {path: torch.randn(s, generator=g) for path, s in shapes.items()}

    tx, params = optim.in_formats(TXS[name](), first, second), draw()
    fused, state = optim.fuse(tx), tx.init(params)
    held = (halved(params) if halves else params, state)
    eager, compiled = tree.map(torch.clone, held), tree.map(torch.clone, held)
    for i in range(3):
        grads = draw()
        eager = fused(grads, eager[1], eager[0], donate=True, compile=False)
        compiled = fused(grads, compiled[1], compiled[0], donate=True, compile=True)
        for a, b in zip(tree.leaves(eager[1]), tree.leaves(compiled[1]), strict=True):
            assert torch.equal(a, b) or (i and (a != b).float().mean() < 2e-3), i
        for a, b in zip(tree.leaves(joined(eager[0])), tree.leaves(joined(compiled[0])), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


def test_a_skipped_step_keeps_codes():
    tx = optim.in_formats(optim.adamw(1e-2), "fp8", "fp8")
    params, grads = problem()
    fused, state = optim.fuse(tx), tx.init(params)
    params, state = fused(grads[0], state, params, donate=False, compile=False)
    for donate in (False, True):
        before = tree.map(torch.clone, state)
        _, after = fused(grads[1], state, params, ok=torch.tensor(False), donate=donate, compile=False)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(after), strict=True))


def test_what_has_no_such_moments_is_one_line():
    with pytest.raises(ValueError, match="second moments in bf16: this optimizer keeps none element by element"):
        optim.in_formats(optim.sgd(0.1, momentum=0.9), "bf16", "bf16")
    with pytest.raises(ValueError, match="first moments in fp8"):
        optim.in_formats(optim.adafactor(0.1), "fp8")


# -- on a mesh -------------------------------------------------------------------------------------------------------
MODEL = gpt(Config(layers=3, embed=64, heads=2, kv=2, mlp=128, vocab=21, vocab_pad=8, no_rope=2))


def moments(tx, sh):
    """The state after two updates with gradients that any mesh draws alike."""
    plan, fused = plan_step(MODEL, sh), optim.fuse(tx)
    start = init(MODEL, tx, sh, key=0)
    grads = [init(MODEL, optim.sgd(0.1), sh, key=i + 1).params for i in range(2)]

    def on_rank(here, params, state, grads):
        params = to_optimizer(plan.leaves, params, here)
        for g in grads:
            g = to_optimizer(plan.leaves, g, here)
            params, state = fused(g, state, params, over=Over(here, plan.leaves), compile=False)
        return state

    return start._replace(opt_state=spmd(plan.sh, on_rank)(start.params, start.opt_state, grads))


@pytest.mark.parametrize("first, second", [("bf16", "fp16"), ("fp8", "fp8")])
def test_moments_have_the_same_bits_on_every_mesh(first, second, tmp_path):
    tx = optim.in_formats(optim.adamw(1e-2), first, second)
    alone = moments(tx, SINGLE)
    for i, (rules, sizes) in enumerate([("fsdp", {"dp": 2}), ("fsdp_tp_sp", {"dp": 2, "tp": 2}), ("zero1", {"dp": 2})]):
        sh = Sharding(virtual_mesh(**sizes), RULES[rules])
        saving.save(tmp_path / str(i), MODEL, sh, moments(tx, sh), {})
        loaded = saving.load(tmp_path / str(i), MODEL, SINGLE, init(MODEL, tx, SINGLE))
        for path, x in tree.to_paths(loaded.opt_state).items():
            wanted = tree.to_paths(alone.opt_state)[path]
            if "embed.token" in path or "head.weight" in path:  # pads are not saved
                rows = slice(0, 21)
                x, wanted = x[rows], wanted[rows]
            assert torch.equal(x, wanted), f"{rules}: {path}"
    assert all(x.isfinite().all() for x in tree.leaves(decoded(alone.opt_state)))
