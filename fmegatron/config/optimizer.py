"""The group `optimizer` of a run's configuration: the rule of the update, its schedule, groups of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fmegatron.config.precision import Moments
from fmegatron.toml import option, unheard


@dataclass(frozen=True)
class Optimizer(Moments):
    """The rule of the update and its schedule."""

    name: str = option("adamw", "see docs/optimizers.md, or your.module:function, called with the learning rate and arguments")
    lr: float = option(1e-3, "peak learning rate", at_least=0)
    betas: tuple[float, ...] | None = option(None, "decay of the moments; none, here and below: the optimizer's own default")
    vs: tuple[float, ...] | None = option(None, "weights of the momenta; what they leave of 1 is the gradient's")
    eps: float | None = option(None, "beside the root of the second moment", at_least=0)
    momentum: float | None = option(None, "of sgd and muon", at_least=0)
    weight_decay: float | None = option(None, "on matrices only", at_least=0)
    decouple: bool | None = option(None, "decay by lr / peak lr, and not into the gradient")
    clip: str | None = option(None, "of adopt's normalized gradient: a number, t**0.25, or off")
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = option("cosine", "of the learning rate")
    unit: Literal["updates", "samples"] = option("updates", "of warmup and decay_steps")
    warmup: int = option(100, "of linear warmup", at_least=0)
    warmup_fraction: float | None = option(None, "of the decay (or the run), in place of warmup", at_least=0)
    warmup_init: float = option(0.0, "learning rate at the start of the warmup", at_least=0)
    decay_steps: int | None = option(None, "steps of decay (wsd: the last ones); none: all that are left", at_least=0)
    decay_shape: str = option("linear", "of wsd's decay, see fmegatron.optim.wsd")
    min_lr: float = option(0.0, "learning rate at the end of the decay", at_least=0)
    weight_decay_start: float | None = option(None, "weight decay at the start, where it changes over the run", at_least=0)
    weight_decay_shape: Literal["constant", "linear", "cosine"] = option("constant", "from weight_decay_start to weight_decay")
    switch: dict[str, Any] = option({}, "at = N: from then on other betas, vs, lr_scale; reset = true: momenta from zero")
    groups: dict[str, Any] = option({}, "[optimizer.groups.NAME]: match = [patterns of paths], frozen, or any of these keys")
    offload: bool = option(False, "its state lies in pinned host memory, and is updated on the device piece by piece")
    on_resume: Literal["override", "restore", "match"] = option("override", "schedule of this run, the checkpoint's, or both")
    arguments: dict[str, Any] = option({}, "further arguments of the optimizer")

    def __post_init__(self) -> None:
        for name in ("min_lr", "warmup_init"):
            if getattr(self, name) > self.lr:
                said = f"optimizer.{name} = {getattr(self, name):g} with optimizer.lr = {self.lr:g}"
                raise ValueError(f"{said}: the peak is the largest rate, so at most {self.lr:g}")
        if self.warmup_fraction is not None and self.warmup_fraction > 1:
            raise ValueError(f"optimizer.warmup_fraction = {self.warmup_fraction:g}: at most 1, all of the decay or the run")
        if self.schedule == "constant":
            unheard("optimizer", self, ("decay_steps", "min_lr"), "a schedule that decays, not constant")
        if self.schedule != "wsd":
            unheard("optimizer", self, ("decay_shape",), f"schedule = wsd, and not {self.schedule}")
        if self.weight_decay_start is None:
            unheard("optimizer", self, ("weight_decay_shape",), "optimizer.weight_decay_start")
