"""A run's numbers that change once, from [optimizer.switch]: betas and weights of momenta, momenta that start anew."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fmegatron.config import ConfigError, Optimizer
from fmegatron.optim import Switch
from fmegatron.optim.momenta import momenta_names

KEYS = ("at", "betas", "vs", "reset", "lr_scale")
FIXED = ("lion",)  # whose betas are no Switch
PARTS = ("muon",)  # whose matrices have a momentum beside the betas


def switched(o: Optimizer, given: Mapping[str, Any], takes: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The betas and vs of an optimizer that takes `takes` and is `given` these, as they change. Raises ConfigError."""
    if not o.switch:
        return {}
    check(o)
    at, out = o.switch["at"], dict[str, Any]()
    for key in ("betas", "vs"):
        if key not in o.switch:
            continue
        if key not in takes or o.name in FIXED:
            raise ConfigError(f"optimizer.switch.{key}: {o.name} has no {key} that change")
        old, new = given.get(key, takes[key].default), tuple(o.switch[key])
        if len(old) != len(new):
            raise ConfigError(f"optimizer.switch.{key} = {list(new)}: as many as before, {list(old)}")
        out[key] = tuple(Switch(float(a), float(b), at) for a, b in zip(old, new, strict=True))
    if reset := o.switch.get("reset"):
        if "betas" not in takes or o.name in (*FIXED, *PARTS):
            raise ConfigError(f"optimizer.switch.reset: {o.name} has no momenta that can be reset")
        betas = out.get("betas", given.get("betas", takes["betas"].default))
        slots = (*momenta_names(betas[:-1]), "nu")
        wanted = slots[:-1] if reset is True else tuple(reset)
        if unknown := [name for name in wanted if name not in slots]:
            raise ConfigError(f"optimizer.switch.reset = {list(wanted)}: {unknown[0]!r} is none of {', '.join(slots)}")
        both = [b if isinstance(b, Switch) else Switch(float(b), float(b), at) for b in betas]
        out["betas"] = tuple(replace(b, reset=True) if name in wanted else old
                             for name, b, old in zip(slots, both, betas, strict=True))  # fmt: skip
    return out


def check(o: Optimizer) -> None:
    """ConfigError for a key that there is not, or a value that is none of its kind."""
    legal = {
        "at": (lambda x: type(x) is int and x >= 0, "the update, counted from 0, from which the new values hold"),
        "betas": (_numbers, "a list of numbers"),
        "vs": (_numbers, "a list of numbers"),
        "reset": (lambda x: type(x) is bool or (isinstance(x, list) and bool(x)), "true, or a list of moments such as [mu]"),
        "lr_scale": (lambda x: type(x) in (int, float) and 0 <= x < float("inf"), "a factor on the learning rate, at least 0"),
    }
    for key, value in o.switch.items():
        if key not in legal:
            raise ConfigError(f"optimizer.switch.{key}: known are {', '.join(KEYS)}")
        if not legal[key][0](value):
            raise ConfigError(f"optimizer.switch.{key} = {value}: expected {legal[key][1]}")
    if "at" not in o.switch:
        raise ConfigError(f"optimizer.switch.at: {legal['at'][1]}")
    if not any(o.switch.get(key) for key in ("betas", "vs", "reset")) and "lr_scale" not in o.switch:
        raise ConfigError(f"optimizer.switch.at = {o.switch['at']}: and what changes then? betas, vs, reset or lr_scale")


def _numbers(x: Any) -> bool:
    return isinstance(x, list | tuple) and bool(x) and all(type(n) in (int, float) for n in x)
