"""From a run's keys about precision to values: docs/precision.md."""

from __future__ import annotations

import math
from typing import Any

from fmegatron.config import ConfigError, RunConfig
from fmegatron.models import Model
from fmegatron.optim.formats import BLOCK
from fmegatron.sharding import Sharding
from fmegatron.train.leaves import plan_leaves
from fmegatron.train.pipeline.stages import without_pp
from fmegatron.train.precision import LossScale, Precision, constant_scale
from fmegatron.train.saving import DTYPES


def precision_of(c: RunConfig) -> Precision:
    """What the state keeps beside parameters, and the dtype of gradient sums."""
    t = c.training
    scale = None
    wanted = t.loss_scale or ("dynamic" if t.dtype == "fp16" else "off")
    try:
        if wanted == "dynamic":
            settings = (t.initial_loss_scale, t.loss_scale_window, t.hysteresis, t.min_loss_scale)
            scale = LossScale(*settings, t.loss_scale_growth, t.loss_scale_backoff)
        elif wanted != "off":
            scale = constant_scale(float(wanted))
    except ValueError as error:
        raise ConfigError(f"training: {error}") from None
    sums = None if t.accumulate_dtype == "fp32" else DTYPES[t.accumulate_dtype]
    return Precision(scale, sums, remainder=t.param_dtype == "bf16")


def check_moments(c: RunConfig, model: Model, sh: Sharding) -> None:
    """ConfigError where moments in blocks would be cut inside a block, or moments in fewer bits averaged over replicas."""
    o = c.optimizer
    if c.semisync.params and (o.mu_dtype, o.nu_dtype) != ("fp32", "fp32"):
        raise ConfigError("optimizer.mu_dtype, nu_dtype: moments of replicas that go apart are averaged, keep them fp32")
    if not {"fp16", "fp8"} & {o.mu_dtype, o.nu_dtype}:
        return
    sh = without_pp(sh).bind(model.sizes)
    for path, leaf in plan_leaves(model, sh).items():
        *_, name = leaf.optimizer.names
        ranks = math.prod(sh.mesh[axis].size for axis in leaf.optimizer.axes[-1])
        pad = leaf.optimizer.pad(len(leaf.optimizer.names) - 1)
        if ranks > 1 and (here := (sh.size(name) + pad) // ranks) % BLOCK:
            raise ConfigError(
                f"optimizer.mu_dtype, nu_dtype: fp16 and fp8 lie in blocks of {BLOCK}, and {path} has {here} of {name} on "
                "a rank: use bf16, or rules that cut another dim"
            )


def gradient_settings_of(c: RunConfig) -> dict[str, Any]:
    """Settings of `plan_step` about when a step counts."""
    return {"precision": precision_of(c), "skip_norm": c.training.skip_norm, "count_zeros": c.training.count_zeros}
