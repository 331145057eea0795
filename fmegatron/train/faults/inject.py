"""Faults on purpose, as wrappers of a step: what `faults.inject` names, for tests and drills.

    transient:STEP              the loss is nan the first time that the step is computed
    persistent:STEP:DEVICE      it is nan as often as it is computed on that device
    correct:STEP                it is nan on any device: as bad data would have it
    silent:STEP                 it is off by a millionth the first of the two times of a `faults.recheck`
    hang:STEP:RANK              the rank does not go on
    slow:STEP:RANK              from that step on the rank takes 0.2 s more
    kill:STEP:RANK              the rank is killed (SIGKILL)
    memory:STEP:RANK            the rank asks for more memory than there is

A hang, a kill and a lack of memory happen in the first of the launches that torchrun makes, not after its restarts.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fmegatron.toml import ConfigError
from fmegatron.train.faults.rerun import NEVER, Run
from fmegatron.train.state import TrainState
from fmegatron.train.step import Limits, Metrics

BAD = ("transient", "persistent", "correct")
KINDS = (*BAD, "silent", "hang", "slow", "kill", "memory")


@dataclass(frozen=True)
class Fault:
    """One line of `faults.inject`."""

    kind: str
    step: int
    where: str = ""

    @property
    def by_rank(self) -> bool:
        """Whether `where` is a rank, not a device."""
        return self.kind not in (*BAD, "silent")


def parse(lines: Sequence[str]) -> list[Fault]:
    """The faults that lines name. Raises ConfigError, naming the line."""
    found = []
    for line in lines:
        kind, _, rest = line.partition(":")
        step, _, where = rest.partition(":")
        fault = Fault(kind, int(step) if step.isdigit() else 0, where)
        named = where.isdigit() if fault.by_rank else bool(where) or kind != "persistent"
        if kind not in KINDS or fault.step < 1 or not named:
            said = "expected KIND:STEP:RANK, STEP counted from 1"
            raise ConfigError(f"faults.inject = {line}: {said}, KIND one of {', '.join(KINDS)}")
        found.append(fault)
    return found


def injected(run: Run, faults: Sequence[Fault], *, rank: int, devices: Sequence[str], launch: int = 0) -> Run:
    """`run` with these faults in it. launch: how often torchrun has restarted the processes."""
    if not faults:
        return run

    def faulty(state: TrainState, batch: Any, limits: Limits, number: int, attempt: int) -> tuple[TrainState, Metrics]:
        for fault in faults:
            if fault.where == str(rank) and attempt <= 0:
                _strike(fault, number, launch)
        if attempt < 0 and Fault("silent", number) in faults:
            state, numbers = run(state, batch, limits, number, attempt)
            return state, numbers | {"loss": numbers["loss"] * (1 + 1e-6)}
        if not any(_wrong(fault, number, attempt, devices) for fault in faults):
            return run(state, batch, limits, number, attempt)
        refused, numbers = run(state, batch, {"loss": NEVER}, number, attempt)  # changes nothing, as a nan would
        return refused, numbers | {"loss": torch.full_like(numbers["loss"], float("nan"))}

    return faulty


def _wrong(fault: Fault, number: int, attempt: int, devices: Sequence[str]) -> bool:
    if fault.kind not in BAD or fault.step != number or attempt < 0:
        return False
    return {"transient": attempt == 0, "persistent": fault.where in devices, "correct": True}[fault.kind]


def _strike(fault: Fault, number: int, launch: int) -> None:
    if fault.kind == "slow" and number >= fault.step:
        time.sleep(0.2)
    if number != fault.step or launch:
        return
    if fault.kind == "hang":
        time.sleep(1e6)
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "memory":
        torch.empty(1 << 60, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
