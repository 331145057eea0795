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
