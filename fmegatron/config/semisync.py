"""The group `semisync` of a run's configuration: when replicas of mesh.replica meet, and what they do then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fmegatron.toml import option


@dataclass(frozen=True)
class SemiSync:
    """Replicas (mesh.replica) that train apart and meet now and then: see docs/semisync.md."""

    params: int = option(0, "steps between meetings of the parameters; 0: replicas are plain data parallelism", at_least=0)
    moments: int | dict[str, Any] = option(0, "the same for the optimizer's state, or {mu = 96, nu = 192}; 0: never")
    order: Literal["before", "after"] | None = option(None, "of a step's update; none: before, after with an outer optimizer")
    outer: str | None = option(None, "optimizer of the pseudo-gradient, as optimizer.name; none: replicas go on from the mean")
    outer_lr: float = option(0.7, "its learning rate", at_least=0)
    outer_arguments: dict[str, Any] = option({}, "its further arguments, such as {momentum = 0.9, nesterov = true}")
    fragments: int = option(1, "parts of the parameters that take turns inside a period", at_least=1)
    pattern: Literal["strided", "sequential"] = option("strided", "how layers fall into fragments")
    keep: float = option(0.0, "share of its own parameters that a replica keeps in a meeting", at_least=0)
    delay: int = option(0, "steps for which pseudo-gradients are on their way while training goes on", at_least=0)
    dtype: Literal["fp32", "bf16"] | None = option(None, "in which pseudo-gradients travel; none: fp32")
