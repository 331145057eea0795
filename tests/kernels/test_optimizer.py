"""Multi-tensor AdamW and the gradient's norm against torch's own, and against their references to the last bit or nearly."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE

from fmegatron import random
from fmegatron.kernels import adamw, grad_norm
from fmegatron.kernels.adamw import Leaves

pytest.importorskip("triton")
SHAPES = [(3,), (5000,), (17, 3), (0, 4), ()]


def draw(dtype, seed, scale=1.0):
    torch.manual_seed(seed)
    return [(torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_norm(dtype, scale):
    """Squares of large values do not overflow."""
    tensors = draw(dtype, 0, scale)
    want = torch.linalg.vector_norm(torch.cat([x.double().flatten() for x in tensors]))
    assert float((grad_norm.norm(tensors, form="triton").double() / want - 1).abs()) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_norm_of_what_is_not_finite(value):
    tensors = [torch.full((5000,), 1.0 if value else 0.0, device=DEVICE), torch.full((2,), value, device=DEVICE)]
    assert torch.equal(grad_norm.norm(tensors, form="triton").isfinite(), grad_norm.norm(tensors).isfinite())
    assert value == value or grad_norm.norm(tensors, form="triton").isnan()


def state(params, grads, moments, masters=False):
    made = Leaves(draw(params, 1), draw(grads, 2), draw(moments, 3), [x.abs() for x in draw(moments, 4)])
    return Leaves(made.params, made.grads, made.first, made.second, [p.float() for p in made.params] if masters else None)


def parts(leaves):
    lists = [leaves.params, leaves.first, leaves.second, *([leaves.masters] if leaves.masters else [])]
    return [x for role in lists for x in role]


KINDS = {"fp64": (torch.float64, torch.float64, torch.float64), "fp32": (torch.float32, torch.float32, torch.float32),
         "bf16 moments": (torch.float32, torch.bfloat16, torch.bfloat16),
         "master": (torch.bfloat16, torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("kind", KINDS)
def test_adamw_is_its_reference(kind):
    numbers = torch.tensor([0.1, 0.3, 0.2, 0.7], dtype=torch.float64 if kind == "fp64" else torch.float32, device=DEVICE)
    decay = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.3], dtype=numbers.dtype, device=DEVICE)
    keys = random.fold_in(random.key(0), torch.arange(5)).to(DEVICE)
    bits = [random.bits(key, torch.arange(torch.Size(shape).numel(), device=DEVICE)).reshape(shape)
            for key, shape in zip(keys, SHAPES, strict=True)]
    ours, theirs = (state(*KINDS[kind], masters=kind == "master") for _ in range(2))
    adamw.adamw(ours, numbers, decay, keys=keys, form="triton")
    adamw.adamw(theirs, numbers, decay, bits=bits)
    for a, b in zip(parts(ours), parts(theirs), strict=True):
        tolerance = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 1e-2}[a.dtype]
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
        if kind == "bf16 moments" and a.dtype == torch.bfloat16:  # the same draws: few are on the two sides of a bf16
            assert (a != b).sum() <= 0.01 * a.numel()


def test_adamw_is_torchs():
    leaves, numbers = state(torch.float32, torch.float32, torch.float32), []
    params = [p.clone().requires_grad_() for p in leaves.params]
    theirs = torch.optim.AdamW(params, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)
    for x in (*leaves.first, *leaves.second):
        x.zero_()
    for t in range(1, 4):
        for p, g in zip(params, leaves.grads, strict=True):
            p.grad = g * t
        theirs.step()
        numbers = torch.tensor([0.1, 1 - 0.9**t, 1 - 0.95**t, float(t)], device=DEVICE)
        adamw.adamw(leaves, numbers, torch.full((5,), 0.2, device=DEVICE), form="triton")
    for a, b in zip(leaves.params, params, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rounding_is_right_on_average():
    x = torch.full((4096,), 1.001, device=DEVICE)
    leaves = Leaves([x.clone()], [x * 10], [torch.zeros_like(x).bfloat16()], [torch.zeros_like(x).bfloat16()])
    one, key = torch.ones(1, device=DEVICE), random.key(1).reshape(1).to(DEVICE)
    adamw.adamw(leaves, torch.ones(4, device=DEVICE), one, betas=(0.9, 0.95), keys=key, form="triton")
    mean, step = float(leaves.first[0].double().mean()), 2.0**-7
    assert abs(mean - 1.001) < 4 * step / 4096**0.5 and leaves.first[0].unique().numel() == 2


def test_tensors_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="contiguous tensors"):
        grad_norm.norm([torch.ones(3), torch.ones(3).double()], form="triton")
