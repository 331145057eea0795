"""What is planned: a run's configuration, with hardware and a pipeline; or a published model by name.

    request("llama3_8b.toml", {...})     a TOML file, or one that is shipped
    request("gpt-177b", {...})           a preset: bf16, its own sequence, one sample a microbatch, the least remat that fits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fmegatron import config as configs
from fmegatron import toml
from fmegatron.config import ConfigError
from fmegatron.models import presets
from fmegatron.plan.config import PlanConfig


@dataclass(frozen=True)
class Request:
    """A configuration to plan, and what it leaves open: auto names settings that the planner may choose."""

    name: str
    run: PlanConfig
    auto: frozenset[str] = frozenset()


def request(name: str, table: Mapping[str, Any]) -> Request:
    """What a word and the options after it ask for. Raises ConfigError."""
    named = preset_named(name)
    if named is None:
        try:
            path = configs.find(name.removesuffix(".toml")) if not Path(name).is_file() else Path(name)
        except ConfigError as error:
            raise ConfigError(f"{error}, nor a preset as llama3-8b or gpt-177b") from None
        start = toml.update(PlanConfig(run=configs.Run(name=path.stem)), toml.read(path), name)
        return Request(path.stem, toml.update(start, table, "command line"))
    c = presets.config(named)
    start = PlanConfig(
        run=configs.Run(name=name),
        model=configs.Model(preset=named),
        data=configs.Data(source="preset", seq=min(c.context, 8192), document_mask=False),
        training=configs.Training(dtype="bf16"),
    )
    run = toml.update(start, table, "command line")
    training = table.get("training", {})
    auto = {key for key in ("microbatches", "remat", "global_batch") if key not in training}
    if "rules" not in table.get("sharding", {}) and run.mesh.pp > 1:
        run = replace(run, sharding=replace(run.sharding, rules="zero1_tp_sp"))
    return Request(name, run, frozenset(auto))


def preset_named(name: str) -> str | None:
    """ "family:size" of a preset written with dashes or underscores; None if it is none."""
    if Path(name).is_file() or name.endswith(".toml"):
        return None
    plain = name.lower().replace("_", "-").replace(":", "-")
    for family, (_, sizes) in presets.FAMILIES.items():
        for size in sizes:
            if plain == f"{family}-{size}":
                return f"{family}:{size}"
    return None



