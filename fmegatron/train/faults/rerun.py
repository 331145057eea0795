"""A step whose result is refused is run again on the same state and batch, to tell a fault of the machine from bad data.

    refused, run again in place
      another result                              a transient fault
      the same result                             bad data, or a device that is always wrong; on other devices (`elsewhere`)
        accepted there                            a persistent fault of one of the devices before
        refused there too                         the result is correct: bad data, or a mistake in the program

A refused step has changed nothing but counters (`make_step`), so the state before it is there whether it was donated or not.
Megatron-LM's "rerun state machine", as one function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.config.faults import Faults
from fmegatron.train.faults.watch import Suspect, Watch
from fmegatron.train.state import TrainState
from fmegatron.train.step import Limits, Metrics

Run = Callable[[TrainState, Any, Limits, int, int], tuple[TrainState, Metrics]]  # ..., number of the step, attempt
Then = Literal["go", "stop", "rollback", "elsewhere"]
SMALL = 256  # elements: counters and scales, kept in copies
NEVER = -1.0  # a limit that refuses any result


@dataclass(frozen=True)
class Outcome:
    """What came of a step, and what is to be done; `said` where something was found.

    then: "elsewhere" is about the state before the step, the others about that after it.
    """

    state: TrainState
    numbers: Metrics
    watch: Watch
    then: Then = "go"
    said: str = ""


def judged(
    run: Run,
    state: TrainState,
    batch: Any,
    watch: Watch,
    c: Faults,
    number: int,
    *,
    devices: Sequence[str] = ("",),
    any_rank: Callable[[bool], bool] = bool,
    overflows: bool = False,
) -> Outcome:
    """One step, its result watched. devices: names of all ranks' devices. any_rank: whether a flag is set on any rank."""
    kept, limits, trial = small(state), watch.limits(c, overflows), None
    if c.recheck and number % c.recheck == 0:
        state, trial = run(state, batch, {"loss": NEVER}, number, -1)
        state = put_back(state, kept)
    after, numbers = run(state, batch, limits, number, 0)
    refused = first(numbers["skipped"]) > first(kept["skipped"])
    if not any_rank(refused):
        return _accepted(Outcome(after, numbers, watch), trial, c, number, devices, any_rank)
    if any_rank(not refused):
        return Outcome(after, numbers, watch, "stop", f"step {number}: only some ranks refuse the result: a transient fault")
    out = out_of_bounds(numbers, limits)
    if not out:  # gradients of fp16 that were too large for their scale
        return Outcome(after, numbers, watch)
    again, second = run(put_back(after, kept), batch, limits, number, 1)
    still = first(second["skipped"]) > first(kept["skipped"])
    said = f"step {number}: {out}"
    if any_rank(not same(numbers, second, c.tolerance)):
        other = out_of_bounds(second, limits) or describe(second, limits)
        said = f"{said}; run again: {other}: a transient fault of {_one_of(devices)}"
        then: Then = "stop" if any_rank(still) or c.on_fault == "stop" else "go"
        return Outcome(again, second, watch.saw(values_of(second), c) if then == "go" else watch, then, said)
    return _reproduced(Outcome(again, second, watch, "go", f"{said}; run again: the same"), kept, c, number, devices)


def _accepted(
    found: Outcome, trial: Metrics | None, c: Faults, number: int, devices: Sequence[str], any_rank: Callable[[bool], bool]
) -> Outcome:
    said, suspect = "", found.watch.suspect
    if trial is not None and any_rank(not same(trial, found.numbers, c.tolerance)):
        both = f"{describe(trial)} and {describe(found.numbers)}"
        said = f"step {number}: computed twice, {both}: a transient fault of {_one_of(devices)}"
    watch = found.watch.saw(values_of(found.numbers), c)
    if suspect is not None and suspect.step == number:
        gone = [name for name in suspect.devices if name not in devices]
        said = f"{suspect.said}; on {_one_of(devices)}: {describe(found.numbers)}: a persistent fault of {_one_of(gone)}"
        watch = replace(watch, suspect=None)
    then: Then = "stop" if said and c.on_fault == "stop" else "go"
    return replace(found, watch=watch, then=then, said=said)


def _reproduced(found: Outcome, kept: Mapping[str, Tensor], c: Faults, number: int, devices: Sequence[str]) -> Outcome:
    """A result that is as bad when it is computed again: elsewhere first, if that is wanted, then what `on_bad` says."""
    watch, suspect = found.watch, found.watch.suspect
    known = suspect is not None and suspect.step == number
    if c.elsewhere and not (known and suspect is not None and set(suspect.devices) != set(devices)):
        told = f"{found.said}; to be run on other devices than {', '.join(devices)}"
        watch = replace(watch, suspect=Suspect(number, tuple(devices), found.said))
        return Outcome(put_back(found.state, kept), found.numbers, watch, "elsewhere", told)
    said = f"{found.said}, on other devices too: the result is correct" if known else found.said
    then: Then = "go" if c.on_bad == "skip" else c.on_bad
    if then == "rollback" and watch.rollbacks >= c.rollbacks:
        then, said = "stop", f"{said}; after {watch.rollbacks} rollbacks"
    doing = {"go": "the batch is left out", "stop": "stops", "rollback": "goes back to the last checkpoint"}
    return replace(found, watch=replace(watch, suspect=None), then=then, said=f"{said}: {doing[then]}")


# -- numbers --------------------------------------------------------------------------------------------------------
def first(x: Tensor) -> float:
    """A 0-D value; where one process holds all ranks, the first rank's."""
    return float(x.flatten()[0])


def values_of(numbers: Metrics) -> dict[str, float]:
    """The metrics of a step as plain numbers."""
    return {name: first(x) for name, x in numbers.items() if x.dim() <= 1}


def out_of_bounds(numbers: Metrics, limits: Limits) -> str:
    """The metrics that are not below their limits, "" if none."""
    bad = {name: value for name, most in limits.items() if not abs(value := first(numbers[name])) < most}
    return ", ".join(f"{name} = {value:.6g} (limit {limits[name]:.6g})" for name, value in bad.items())


def describe(numbers: Metrics, names: Mapping[str, float] | tuple[str, ...] = ("loss", "grad_norm")) -> str:
    """Some metrics in words."""
    return ", ".join(f"{name} = {first(numbers[name]):.9g}" for name in names)


def same(a: Metrics, b: Metrics, tolerance: float) -> bool:
    """Whether two results are the same: bit for bit (nan is nan), or up to a relative difference."""
    return all(
        torch.allclose(x, b[name], rtol=tolerance, atol=0.0, equal_nan=True)
        for name, x in a.items()
        if x.is_floating_point()
    )


# -- states ---------------------------------------------------------------------------------------------------------
def small(state: TrainState) -> dict[str, Tensor]:
    """Copies of the state's small leaves: what a refused step may change is among them."""
    return {path: x.clone() for path, x in tree.to_paths(state).items() if x.numel() <= SMALL} | {
        name: getattr(state, name).clone() for name in ("step", "consumed", "skipped")
    }


def put_back(state: TrainState, kept: Mapping[str, Tensor]) -> TrainState:
    """The state before a refused step, from that after it."""
    old: TrainState = tree.map_with_path(lambda path, x: kept[path].clone() if path in kept else x, state)
    return old._replace(**{name: kept[name].clone() for name in ("step", "consumed", "skipped")})


def _one_of(devices: Sequence[str]) -> str:
    names = sorted(set(devices))
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
