"""The best legal meshes for a number of devices: every (pp, cp, tp) that the model divides over, dp what is left."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

from rich.console import Console
from rich.progress import track

from fmegatron.config import ConfigError
from fmegatron.plan.config import PlanConfig
from fmegatron.plan.estimate import Estimate
from fmegatron.plan.options import Request
from fmegatron.sharding.traffic import columns


def candidates(run: PlanConfig, devices: int, node: int) -> Iterator[PlanConfig]:
    """Runs on every mesh of `devices` ranks with tp inside a node, pp up to 16 and cp up to 8; ep is the run's own.

    Not all are legal.
    """
    sizes = [2**i for i in range(5)]
    for pp in sizes:
        for cp in sizes[:4]:
            for tp in (n for n in sizes if n <= node):
                others = pp * cp * tp * run.mesh.ep
                if devices % others == 0:
                    mesh = replace(run.mesh, pp=pp, cp=cp, tp=tp, fsdp=1, dp=devices // others)
                    yield replace(run, mesh=mesh, gpus=devices)


Planner = Callable[[Request], Estimate]
Tried = Estimate | str  # or why it is not legal


def best(
    asked: Request, plan: Planner, node: int, each: Callable[[Callable[[Request], Tried], list[Request]], Iterable[Tried]] = map
) -> list[Estimate]:
    """Plans that fit, the fastest first; each: how many are made, `on_all_cores` or one by one.

    Raises ConfigError where no mesh is legal, or none fits.
    """
    assert asked.run.search is not None
    requests = [replace(asked, run=run) for run in candidates(asked.run, asked.run.search, node)]
    tried = list(each(partial(_try, plan), requests))
    found = [made for made in tried if isinstance(made, Estimate)]
    fitting = sorted((made for made in found if made.fits), key=lambda made: -made.tokens_per_second_per_rank)
    if not fitting:
        least = min(found, key=lambda made: made.memory_bytes, default=None)
        why = next((made for made in tried if isinstance(made, str)), "")
        said = f"the smallest needs {least.memory_bytes / 1e9:.1f} GB a rank" if least else why
        raise ConfigError(f"search = {asked.run.search}: no mesh is legal and fits: {said}")
    return fitting[: asked.run.show]


def _try(plan: Planner, request: Request) -> Tried:
    try:
        return plan(request)
    except ValueError as error:
        return str(error)


def on_all_cores(fn: Callable[[Request], Tried], requests: list[Request]) -> Iterator[Tried]:
    """`map(fn, requests)` by a process a core, with a bar on a terminal: a plan takes seconds of Python."""
    context = multiprocessing.get_context("forkserver")  # fork would copy a process whose threads may hold locks
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(requests)), context) as pool:
        done = pool.map(fn, requests)
        yield from track(done, "meshes", total=len(requests), console=Console(stderr=True), transient=True)


def to_text(plans: list[Estimate]) -> str:
    """One line a mesh."""
    cells = [["mesh", "remat", "GB a rank", "step s", "MFU", "binds"]]
    for made in plans:
        mesh = " x ".join(f"{axis}={n}" for axis, n in made.mesh.items()) or "one device"
        numbers = [f"{made.memory_bytes / 1e9:.1f}", f"{made.step_seconds:.3f}", f"{made.mfu:.1%}"]
        cells.append([mesh, made.remat, *numbers, made.binds])
    return "\n".join(columns(cells, 2))
