"""What a step computes, sums and keeps its numbers in; and the scale of the loss that fp16 needs.

    parameters at rest    fp32; or bf16 and, where the optimizer holds them, the 16 bits that make them fp32 (optim/formats.py)
    in use                cast to `dtype`: fp32, bf16, fp16
    gradients             summed over microbatches in `accumulate`, at least fp32 unless said otherwise
    loss scale            dynamic, constant, or none; seeds of the backward are multiplied by it, gradients divided

The loss scale follows Megatron-LM's rule, to the letter:

    a gradient is not finite:  clean = 0, patience -= 1; if patience <= 0: scale = max(scale * backoff, minimum)
    all are finite:            clean += 1; if clean == window: clean = 0, patience = hysteresis, scale *= growth

so patience counts bad steps since the last growth, not consecutive ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmegatron.optim.formats import Split
from fmegatron.optim.fuse import keep
from fmegatron.optim.packed import halved
from fmegatron.tree import Tree


@dataclass(frozen=True)
class LossScale:
    """A factor on the loss. window None: it stays what it is at first; the defaults are Megatron-LM's."""

    initial: float = 2.0**32
    window: int | None = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    growth: float = 2.0
    backoff: float = 0.5

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("initial", self.initial, self.initial > 0),
            ("window", self.window, self.window is None or self.window > 0),
            ("hysteresis", self.hysteresis, self.hysteresis > 0),
            ("minimum", self.minimum, 0 < self.minimum <= self.initial or self.window is None),
            ("growth", self.growth, self.growth > 1),
            ("backoff", self.backoff, 0 < self.backoff < 1),
        ):
            if not legal:
                raise ValueError(
                    f"loss scale: {name} = {value}; initial, window and hysteresis are above 0, minimum is from there to "
                    f"initial = {self.initial:g}, growth above 1, backoff between 0 and 1"
                )

    def init(self, zero: Tensor) -> dict[str, Tensor]:
        """{"scale": fp32, "clean": int64, "patience": int64}, 0-D, made from `zero` (0-D int64)."""
        return {"scale": zero.float() + self.initial, "clean": zero.clone(), "patience": zero + self.hysteresis}

    def update(self, state: dict[str, Tensor], finite: Tensor) -> dict[str, Tensor]:
        """The state after a step whose gradients were, or were not, all finite (0-D bool)."""
        if self.window is None:
            return state
        scale, clean, patience = state["scale"], state["clean"] + 1, state["patience"] - 1
        grown = clean == self.window
        smaller = (scale * self.backoff).clamp(min=self.minimum)
        return {
            "scale": torch.where(
                finite, torch.where(grown, scale * self.growth, scale), torch.where(patience <= 0, smaller, scale)
            ),
            "clean": torch.where(finite & ~grown, clean, 0),
            "patience": torch.where(finite, torch.where(grown, self.hysteresis, state["patience"]), patience),
        }


def constant_scale(scale: float) -> LossScale:
    """A loss scale that never changes."""
    return LossScale(initial=scale, window=None, minimum=scale)


@dataclass(frozen=True)
class Precision:
    """What a run keeps beside parameters and optimizer state, under `TrainState.precision`.

    accumulate: dtype of gradient sums; None: the parameters', at least fp32. remainder: parameters at rest are bf16, and
    the optimizer's fp32 parameters are these and 16 bits more, exactly.
    """

    loss_scale: LossScale | None = None
    accumulate: torch.dtype | None = None
    remainder: bool = False

    def init(self, zero: Tensor, master: Tree) -> Tree:
        """The first state, from a 0-D int64 zero and the fp32 parameters as the optimizer holds them."""
        kept = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.init(zero)}
        return {**kept, "remainder": halved(master).low} if self.remainder else kept

    def at_rest(self, params: Tree) -> Tree:
        """fp32 parameters as they are stored."""
        return halved(params).high if self.remainder else params

    def scale(self, state: Tree) -> Tensor | None:
        """The factor on this step's loss, 0-D fp32; None: 1."""
        return state["loss_scale"]["scale"] if self.loss_scale is not None else None

    def master(self, params: Tree, state: Tree) -> Tree:
        """What the optimizer changes: the parameters, with their other halves where these are apart."""
        return Split(params, state["remainder"]) if self.remainder else params

    def update(self, state: Tree, finite: Tensor, allowed: Tensor, master: Tree) -> tuple[Tree, Tree]:
        """(parameters, state) after a step whose gradients were finite or not; not allowed: the loss scale is as it was."""
        if self.loss_scale is not None:
            old = state["loss_scale"]
            state = {**state, "loss_scale": keep(allowed, self.loss_scale.update(old, finite), old)}
        return (master.high, {**state, "remainder": master.low}) if self.remainder else (master, state)

    def sums(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of parameters of `dtype` are summed."""
        return self.accumulate or torch.promote_types(dtype, torch.float32)

    def check(self, dtype: torch.dtype | None, semisync: bool = False) -> None:
        """ValueError where a computation in `dtype` would lose its gradients, or show more bits than there are."""
        if dtype == torch.float16 and self.loss_scale is None:
            raise ValueError("dtype = float16 without a loss scale: small gradients would vanish; give Precision(LossScale())")
        if self.remainder and dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype = {dtype} with remainders: parameters at rest are bfloat16, compute in that")
        if self.remainder and semisync:
            raise ValueError("parameters in bf16 and remainders cannot be averaged over replicas that go apart: keep them fp32")


PLAIN = Precision()


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, rounded once, as Megatron-LM takes it."""
    return scale.double().reciprocal().float()
