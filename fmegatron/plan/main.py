"""The command `fmegatron plan`."""

from __future__ import annotations

from dataclasses import replace

from fmegatron.models import Model
from fmegatron.plan import search
from fmegatron.plan.config import PlanConfig
from fmegatron.plan.estimate import Estimate, estimate
from fmegatron.plan.hardware import Hardware, hardware
from fmegatron.plan.legal import check, complete
from fmegatron.plan.options import Request, request
from fmegatron.plan.report import to_json, to_text
from fmegatron.plan.study import study
from fmegatron.toml import Table
from fmegatron.train.explain import model_from

REMATS = ("none", "selective", "full")  # from the fastest to the smallest


def plan(asked: Request, model: Model | None = None) -> Estimate:
    """The estimate of what is asked for. Raises ConfigError or ValueError in one line where it is not legal."""
    device, run = hardware(asked.run.hardware), complete(asked.run, asked.auto)
    model = model_from(run) if model is None else model
    check(run, model)
    if "remat" not in asked.auto:
        return estimate(asked.name, study(run, model), device)
    return least_remat(asked.name, run, model, device)


def least_remat(name: str, run: PlanConfig, model: Model, device: Hardware) -> Estimate:
    """The estimate with the least remat that fits; with all of it where none does."""
    for remat in REMATS:
        found = estimate(name, study(replace(run, training=replace(run.training, remat=remat)), model), device)
        if found.fits:
            break
    return found


def main(name: str, table: Table, json: bool = False) -> None:
    """Print the plan of a configuration or a preset."""
    asked = request(name, table)
    if asked.run.search is not None:
        plans = search.best(asked, plan, hardware(asked.run.hardware).node, search.on_all_cores)
        print(f"[{', '.join(map(to_json, plans))}]" if json else search.to_text(plans))
        return
    found = plan(asked)
    print(to_json(found) if json else to_text(found))
