"""Formats against torch's dtypes and an exhaustive list; scales against their definitions; products against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron.kernels import scaled_mm
from fmegatron.kernels.quantize import E2M1, E4M3, E5M2, RECIPES, Scaling, factors, largest, multiply, quantize, recipe

torch.set_num_threads(1)
FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_values_of_four_bits_are_the_nearest_ones_ties_to_even():
    x = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    legal = torch.cat([-FOUR_BITS.flip(0)[:-1], FOUR_BITS]).double()
    assert torch.equal((E2M1.round(x).double() - x).abs(), (x[:, None] - legal).abs().min(1).values)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_values_of_eight_bits_are_torchs_and_saturate(format):
    every = torch.arange(256, dtype=torch.uint8).view(format.dtype).float()
    every = every[every.isfinite()]
    assert torch.equal(format.round(every).float(), every) and every.max() == format.largest
    assert format.round(torch.tensor([1e9, -1e9, float("inf")])).tolist() == [format.largest, -format.largest, format.largest]
    assert format.round(torch.tensor(float("nan"))).float().isnan()


def by_hand(x, format, name, block):
    """Scale of every element, from the definitions, one loop over blocks."""
    out = torch.empty_like(x)
    rows, inner = x.shape
    high, wide = {"tensorwise": (rows, inner), "rowwise": (1, inner)}.get(name, (1, block))
    for i in range(0, rows, high):
        for j in range(0, inner, wide):
            here = x[i : i + high, j : j + wide]
            top = here.abs().max().item()
            if name == "mxfp8":
                scale = 1.0 if top == 0 else next(2.0**e for e in range(-140, 140) if top / 2.0**e <= format.largest)
            elif name == "nvfp4":
                over = x.abs().max().item() / (448 * 6)
                scale = (torch.tensor(top / 6 / over).to(torch.float8_e4m3fn).double() * over).item()
            else:
                scale = top / format.largest if top else 1.0
            out[i : i + high, j : j + wide] = scale
    return out


@settings(max_examples=60)
@given(st.sampled_from(["tensorwise", "rowwise", "blockwise", "mxfp8", "nvfp4"]), st.integers(0, 2**20), st.floats(-20, 20))
def test_scales_and_values(name, seed, size):
    block = 8
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 24, generator=draw, dtype=torch.float64) * torch.randn(4, 24, generator=draw).exp2() * 2.0**size
    x[1, :block] = 0
    how = recipe(name, block=block) if name in ("blockwise", "mxfp8", "nvfp4") else recipe(name)
    q = quantize(x, how.format, how.operand)
    scale = by_hand(x, how.format, name, block)
    spread = q.tensor / torch.where(q.values == 0, torch.ones_like(q.values), q.values)
    kept = q.values != 0
    assert torch.allclose(spread[kept], scale[kept], rtol=1e-6)
    assert torch.equal(q.values, how.format.round(q.values).double()) and q.values.abs().max() <= how.format.largest
    gap = 0.5 if name == "nvfp4" else 2.0**-4  # of a format with 1 and 3 digits behind the point
    assert ((q.tensor - x).abs() <= gap * x.abs() + scale * 1.001).all()


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_by_torchs_operator_are_those_by_definition(name, dtype, seen):
    torch.manual_seed(0)
    how = recipe(name)
    x, w = (torch.randn(128, 256) * 3).to(dtype), torch.randn(384, 256).to(dtype)
    for left in (how.format, how.gradient):
        a, b = quantize(x, left, how.operand), quantize(w, how.format, how.weight)
        got = scaled_mm.multiply(a, b, dtype, "triton")
        called = 0 if name in ("blockwise", "mxfp8", "nvfp4") else 1
        assert got.dtype == dtype and len(seen) == called
        exact = (a.tensor.double() @ b.tensor.double().T).float()
        assert (got.float() - exact).norm() <= (1e-6 if dtype == torch.float32 else 3e-3) * exact.norm()
        assert torch.equal(scaled_mm.multiply(a, b, dtype, "reference"), multiply(a, b).to(dtype)) and len(seen) == called
        seen.clear()
    assert (multiply(a, b) - x.float() @ w.float().T).norm() < 0.2 * (x.float() @ w.float().T).norm()


@pytest.fixture
def seen():
    """Operators of scaled products that ran."""
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.extend([func] if "_scaled_mm" in func.name() else [])
            return func(*args, **(kwargs or {}))

    if not scaled_mm.served(torch.device("cpu")):
        pytest.skip("torch's CPU operator came with torch 2.13")
    with Watch():
        yield calls


@pytest.mark.parametrize("name", list(RECIPES))
def test_what_is_not_finite_stays_so_and_zeros_are_zeros(name):
    how, x = recipe(name), torch.ones(128, 128)
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[3, 5] = bad
        assert not quantize(y, how.format, how.operand).tensor[3, 5].isfinite()
    assert torch.equal(quantize(0 * x, how.format, how.weight).tensor, 0 * x)


def test_a_margin_leaves_powers_of_two_free_and_pow2_scales_are_powers():
    top = torch.tensor([[[[3.0]]]])
    assert factors(top, E4M3, Scaling(margin=2))[0].item() == pytest.approx(448 / 3 / 4)
    factor, scale = factors(top, E4M3, Scaling(scale="pow2"))
    assert factor.item() == 128 and scale.item() == 1 / 128
    assert largest(torch.tensor([[1.0, -3.0]]), Scaling(1, 1)).flatten().tolist() == [1, 3]


@pytest.mark.parametrize(("said", "part"), [
    ({"name": "fp8"}, "known are tensorwise"),
    ({"name": "rowwise", "block": 32}, "have blocks"),
    ({"name": "nvfp4", "format": "hybrid"}, "none for nvfp4"),
    ({"name": "tensorwise", "history": 16}, "delayed scaling alone"),
])  # fmt: skip
def test_mistakes(said, part):
    with pytest.raises(ValueError, match=part):
        recipe(**said)
