"""Schedules against Megatron-LM's scalar formulas, against transformers, and as functions that can be mapped."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from fmegatron import optim

PEAK, MIN, INIT, WARMUP, STEPS, DECAY = 3e-4, 3e-5, 1e-6, 10, 100, 30


def megatron(t: int, style: str, warmup: int = WARMUP, shape: str = "linear") -> float:
    """optimizer_param_scheduler.py, scalar by hand."""
    if warmup > 0 and t <= warmup:
        return INIT + (PEAK - INIT) * t / warmup
    if style == "constant":
        return PEAK
    if t > STEPS:
        return MIN
    if style == "inverse_sqrt":
        return max(MIN, PEAK * math.sqrt(max(warmup, 1)) / math.sqrt(max(t, 1)))
    r = (t - warmup) / (STEPS - warmup)
    if style == "linear":
        c = 1 - r
    elif style == "cosine":
        c = 0.5 * (math.cos(math.pi * r) + 1)
    elif t <= STEPS - DECAY:
        c = 1.0
    else:
        q = (t - (STEPS - DECAY)) / DECAY
        c = {"linear": 1 - q, "cosine": 0.5 * (math.cos(math.pi * q) + 1), "exponential": 2 * 0.5**q - 1,
             "minus_sqrt": 1 - math.sqrt(q)}[shape]
    return MIN + c * (PEAK - MIN)


def ours(style: str, warmup: int = WARMUP, shape: str = "linear"):
    tail = {"warmup": warmup, "init": INIT}
    if style == "constant":
        return optim.constant(PEAK, **tail)
    if style == "wsd":
        return optim.wsd(PEAK, steps=STEPS, decay=DECAY, shape=shape, min=MIN, **tail)
    return getattr(optim, style)(PEAK, steps=STEPS, min=MIN, **tail)


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize("style, shape", [("constant", ""), ("linear", ""), ("cosine", ""), ("inverse_sqrt", ""),
                                          *(("wsd", s) for s in ("linear", "cosine", "exponential", "minus_sqrt"))])
def test_megatron(style, shape, warmup):
    rate = ours(style, warmup, shape)
    for t in range(STEPS + 20):
        value = rate(torch.tensor(t))
        assert value.shape == () and value.dtype == torch.float64
        assert float(value) == pytest.approx(megatron(t, style, warmup, shape), rel=1e-12, abs=1e-18), t


@pytest.mark.parametrize("name, build", [
    ("constant", lambda o: transformers.get_constant_schedule_with_warmup(o, WARMUP)),
    ("linear", lambda o: transformers.get_linear_schedule_with_warmup(o, WARMUP, STEPS)),
    ("cosine", lambda o: transformers.get_cosine_schedule_with_warmup(o, WARMUP, STEPS)),
    ("inverse_sqrt", lambda o: transformers.get_inverse_sqrt_schedule(o, WARMUP)),
    ("wsd", lambda o: transformers.get_wsd_schedule(o, WARMUP, DECAY, num_training_steps=STEPS, decay_type="linear"))])
def test_transformers(name, build):
    """Both give the first update the rate of count 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = build(optimizer)
    extra = {"constant": {}, "inverse_sqrt": {}, "wsd": {"steps": STEPS, "decay": DECAY}}.get(name, {"steps": STEPS})
    rate = getattr(optim, name)(PEAK, warmup=WARMUP, **extra)
    for t in range(STEPS):
        assert float(rate(torch.tensor(t))) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-20), t
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_mapped_over_counts(style):
    counts = torch.arange(0, STEPS + 5, 7)
    assert torch.equal(torch.vmap(ours(style))(counts), torch.stack([ours(style)(t) for t in counts]))


def test_mapped_over_peaks():
    def rate(peak, count):
        return optim.cosine(peak, warmup=WARMUP, steps=STEPS, min=0.1 * peak)(count)

    peaks = torch.tensor([1e-3, 1e-4], dtype=torch.float64)
    for t in (0, 5, 50, 200):
        mapped = torch.vmap(rate, (0, None))(peaks, torch.tensor(t))
        assert torch.equal(mapped, torch.stack([rate(float(p), torch.tensor(t)) for p in peaks]))


@pytest.mark.parametrize("build, word", [
    (lambda: optim.cosine(1.0, warmup=11, steps=10), "11 steps"),
    (lambda: optim.wsd(1.0, warmup=5, steps=10, decay=6), "between 1 and steps - warmup = 5"),
    (lambda: optim.wsd(1.0, steps=10, decay=5, shape="square"), "minus_sqrt"),
    (lambda: optim.constant(1.0, warmup=-1), "-1")])
def test_errors_name_the_numbers(build, word):
    with pytest.raises(ValueError, match=word):
        build()


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_increments_are_megatrons(shape):
    start, end, steps = (0.1, 0.1, 20) if shape == "constant" else (0.01, 0.1, 20)
    value = optim.increment(start, end, steps=steps, shape=shape)
    for t in range(30):
        r = t / steps
        c = {"constant": 1.0, "linear": r, "cosine": 0.5 * (math.cos(math.pi * (1 - r)) + 1)}[shape]
        expected = end if t > steps else start + c * (end - start)
        assert float(value(torch.tensor(t))) == pytest.approx(expected, rel=1e-12), t


@pytest.mark.parametrize("sizes, at", [
    (optim.rampup(32, 16, 1000, 128), lambda consumed: min(32 + 16 * int(consumed / (1000 / 6)), 128)),
    (optim.rampup(2, 2, 12, 8), lambda consumed: min(2 + 2 * (consumed // 4), 8)),  # 4 samples come out even
    (optim.rampup(8, 8, 0, 8), lambda consumed: 8),
    (optim.stepwise("0:4 100:8 0.5K:16"), lambda consumed: 4 if consumed < 100 else 8 if consumed < 500 else 16),
    (optim.stepwise("0:4 64K:8 2M:32", seq=1000), lambda consumed: 4 if consumed < 64 else 8 if consumed < 2000 else 32),
    (optim.stepwise("0:50 10:60 20:70"), lambda consumed: 50 if consumed < 10 else 60 if consumed < 20 else 70)])
def test_batch_sizes_are_megatrons(sizes, at):
    consumed = 0
    for step in range(200):
        assert int(sizes.before(torch.tensor(step))) == consumed
        assert sizes.at(consumed) == at(consumed), consumed
        consumed += at(consumed)
    counts = torch.arange(200)
    assert torch.equal(torch.vmap(sizes.before)(counts), torch.stack([sizes.before(t) for t in counts]))
    rate = optim.by_samples(optim.linear(1.0, steps=2000), sizes.before)
    assert float(rate(torch.tensor(7))) == pytest.approx(max(1 - int(sizes.before(torch.tensor(7))) / 2000, 0))


@pytest.mark.parametrize("build, word", [
    (lambda: optim.rampup(32, 16, 100, 100), "multiple of 16"), (lambda: optim.stepwise("1:4"), "begin with 0"),
    (lambda: optim.stepwise("0:4 0:8"), "rise"), (lambda: optim.stepwise("0=4"), "250B:1536"),
    (lambda: optim.stepwise("0:0"), "'0:0' is not"), (lambda: optim.stepwise("0:4 inf:8"), "'inf:8' is not"),
    (lambda: optim.rampup(4, 4, -1, 8), "over -1 samples"),
    (lambda: optim.increment(0.0, 0.1, steps=5), "cannot go from")])
def test_more_errors(build, word):
    with pytest.raises(ValueError, match=word):
        build()
