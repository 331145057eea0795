"""LayerNorm and RMSNorm over the last dim, in fp32 whatever comes in.

layer    (x - mean) / sqrt(var + eps) * weight + bias
rms       x / sqrt(mean(x^2) + eps) * weight
l2        x / sqrt(mean(x^2) + eps)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fmegatron.kernels import norm as kernel
from fmegatron.kernels.launch import Form
from fmegatron.nn.param import Param, bias, ones, zeros

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding


@dataclass(frozen=True)
class Norm:
    """Which norm; `centred` stores weight - 1, so that decay would pull the scale to one (zero-centred gamma)."""

    kind: Literal["rms", "layer", "l2"] = "rms"
    eps: float = 1e-5
    centred: bool = False
    bias: bool = True  # of "layer"


def declare(norm: Norm, names: str = "embed") -> dict[str, Param]:
    """The norm's weights over dims `names`."""
    if norm.kind == "l2":
        return {}
    weight = {"weight": Param(names, zeros if norm.centred else ones, decay=False)}
    return weight | ({"bias": bias(names)} if norm.kind == "layer" and norm.bias else {})


def apply(sh: Sharding, norm: Norm, p: dict[str, Any], x: Tensor) -> Tensor:
    """Normalise [..., n] over its last dim; the result has x's dtype. A part that remat may compute again."""
    form = sh.kernels
    return sh.remat("norm", lambda x, *weights: normalize(norm, dict(zip(p, weights, strict=True)), x, form), x, *p.values())


def after_add(sh: Sharding, norm: Norm, p: dict[str, Any], y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(the norm of h + y, h + y) over the last dim, by one kernel where the form is one and dtypes are alike."""
    if sh.kernels == "reference" or y.dtype != h.dtype:
        h = h + y
        return apply(sh, norm, p, h), h
    kind: Literal["rms", "layer"] = "layer" if norm.kind == "layer" else "rms"

    def both(y: Tensor, h: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(p, weights, strict=True))
        options: dict[str, Any] = {"kind": kind, "eps": norm.eps, "centred": norm.centred, "form": sh.kernels}
        return kernel.add_norm(y, h, own.get("weight"), own.get("bias"), **options)

    x, total = sh.remat("norm", both, y, h, *p.values())
    return x, total


def normalize(norm: Norm, p: dict[str, Any], x: Tensor, form: Form = "reference") -> Tensor:
    """The norm itself."""
    kind: Literal["rms", "layer"] = "layer" if norm.kind == "layer" else "rms"
    return kernel.norm(x, p.get("weight"), p.get("bias"), kind=kind, eps=norm.eps, centred=norm.centred, form=form)
