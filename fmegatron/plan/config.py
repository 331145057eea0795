"""The options of `plan` and `doctor`: a run's, and what a run has not."""

from __future__ import annotations

from dataclasses import dataclass

from fmegatron import config as configs
from fmegatron.config import RunConfig
from fmegatron.toml import option


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """A training run that is planned."""

    hardware: str = option("h100", "h100, h200, a100, b200 or cpu")
    gpus: int | None = option(None, "devices there are; the mesh fills them, mesh.dp = -1 with what is left", at_least=1)
    search: int | None = option(None, "list the best legal meshes of this many devices", at_least=1)
    memory: float | None = option(None, "GB of a device; none: the hardware's", at_least=0)
    show: int = option(10, "meshes that --search lists", at_least=1)


@dataclass(frozen=True)
class DoctorConfig:
    """What is examined."""

    mesh: configs.Mesh = configs.Mesh(dp=-1)
    timeout: int = option(60, "seconds after which a process that does not answer is a fault", at_least=1)
