"""Keys of [training] and [optimizer] about precision, clipping and what is skipped; config/__init__.py makes groups of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fmegatron.toml import option, unheard


@dataclass(frozen=True)
class Moments:
    """Keys of [optimizer]: see docs/precision.md."""

    mu_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = option("fp32", "of means of gradients at rest; rounded at random")
    nu_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = option("fp32", "of means of squared gradients")


@dataclass(frozen=True)
class Precision:
    """Keys of [training]: see docs/precision.md."""

    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", "of the computation; the master state is fp32")
    param_dtype: Literal["fp32", "bf16"] = option("fp32", "of parameters at rest; bf16: the optimizer has 16 bits more")
    accumulate_dtype: Literal["fp32", "bf16"] = option("fp32", "in which gradients of microbatches are summed")
    loss_scale: str | None = option(None, "dynamic, a number, or off; none: dynamic for fp16, else off")
    initial_loss_scale: float = option(2.0**32, "of a dynamic loss scale", at_least=0)
    min_loss_scale: float = option(1.0, "it never falls below", at_least=0)
    loss_scale_window: int = option(1000, "steps without overflow after which it grows", at_least=1)
    loss_scale_growth: float = option(2.0, "times which it then grows", at_least=1)
    loss_scale_backoff: float = option(0.5, "times which it falls after overflows", at_least=0)
    hysteresis: int = option(2, "overflows since it last grew before it falls", at_least=1)
    clip_norm: float | None = option(1.0, "largest norm of a step's gradient; none: as it is", at_least=0)
    clip_value: float | None = option(None, "largest size of a gradient's elements, after clip_norm; none: any", at_least=0)
    skip_norm: float | None = option(None, "a gradient of a larger norm is skipped; none: no finite one", at_least=0)
    count_zeros: bool = option(False, "count the gradient's zeros: the metric zeros")

    def __post_init__(self) -> None:
        if self.loss_scale is not None and self.loss_scale not in ("dynamic", "off"):
            try:
                good = 0 < float(self.loss_scale) < float("inf")
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"training.loss_scale = {self.loss_scale}: dynamic, off, or a number above 0")
        if self.dtype == "fp16" and self.loss_scale == "off":
            raise ValueError("training.dtype = fp16 with training.loss_scale = off: small gradients would vanish, use dynamic")
        if self.param_dtype == "bf16" and self.dtype != "bf16":
            raise ValueError(f"training.param_dtype = bf16 with training.dtype = {self.dtype}: compute in bf16 too")
        for name in ("clip_norm", "clip_value", "skip_norm"):
            if getattr(self, name) == 0:
                raise ValueError(f"training.{name} = 0: must be above 0; none switches it off")
        if (self.loss_scale or ("dynamic" if self.dtype == "fp16" else "off")) != "dynamic":
            dynamic = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "loss_scale_growth", "loss_scale_backoff")
            unheard("training", self, (*dynamic, "hysteresis"), "a dynamic loss scale (training.loss_scale = dynamic)")
