"""Norms against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fmegatron.nn import norm
from fmegatron.nn.norm import Norm
from fmegatron.sharding import SINGLE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
def test_norms_equal_torch(dtype, centred):
    torch.manual_seed(0)
    x, w, b = (3 * torch.randn(4, 32) + 1).to(dtype), torch.randn(32, dtype=dtype), torch.randn(32, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    scale = w.to(wide) + (1 if centred else 0)
    exact = {
        "rms": F.rms_norm(x.to(wide), (32,), scale, 1e-5),
        "layer": F.layer_norm(x.to(wide), (32,), scale, b.to(wide), 1e-5),
        "l2": F.rms_norm(x.to(wide), (32,), None, 1e-5),
    }
    for kind, want in exact.items():
        p = {"rms": {"weight": w}, "layer": {"weight": w, "bias": b}, "l2": {}}[kind]
        y = norm.apply(SINGLE, Norm(kind, centred=centred), p, x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, want.to(dtype), rtol=1e-5 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)


def test_declarations_start_as_the_plain_norm():
    x = torch.randn(3, 8)
    for centred in (False, True):
        n = Norm("rms", centred=centred)
        weight = norm.declare(n)["weight"].init(torch.tensor(0), torch.arange(8))
        torch.testing.assert_close(norm.apply(SINGLE, n, {"weight": weight}, x), F.rms_norm(x, (8,), None, 1e-5))
    assert norm.declare(Norm("l2")) == {}
    assert list(norm.declare(Norm("layer", bias=False))) == ["weight"]
