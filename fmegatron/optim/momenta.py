"""Any number of momenta over one preconditioner: Adam, quasi-hyperbolic Adam, aggregated momenta, and ADOPT with each.

    x = g                                            Adam's form
    x = clamp(g / max(sqrt(nu), eps), -c, c)         ADOPT's: nu of the steps before, c = t^(1/4)
    mu_i = b_i mu_i + (1 - b_i) x
    u = (1 - v_1 - ... - v_K) x + v_1 mu_1 + ... + v_K mu_K
    nu = b2 nu + (1 - b2) g^2

Adam's form divides the mu_i by 1 - b_i^t and then u by sqrt(nu / (1 - b2^t)) + eps. ADOPT's first update only sets
nu = g^2. K = 1 is QHAdam (Ma and Yarats 2019, nu_2 = 1) and QHADOPT, v = 1 with it Adam and ADOPT (Taniguchi et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmegatron.kernels.adamw import Adam
from fmegatron.optim.base import Transform
from fmegatron.optim.elementwise import Elementwise, Slots, elementwise
from fmegatron.optim.switch import Number, Switch, missing, values

Clip = Callable[[Tensor], Tensor]


def fourth_root(t: Tensor) -> Tensor:
    """t**0.25: ADOPT's bound at step t, counted from 0."""
    return t.double() ** 0.25


def scale_by_momenta(
    betas: Sequence[Number] = (0.9, 0.95), vs: Sequence[Number] = (1.0,), eps: float = 1e-8, amsgrad: bool = False,
    eps_root: float = 0.0,
) -> Transform:
    """Adam's form. State: {"count", "mu", "mu_2", ..., "nu"}, with amsgrad "nu_max", whose root divides in nu's place.

    betas: one for each of vs, then that of nu. vs: weights of the momenta; what they leave of 1 is the gradient's. eps_root:
    added under the root, whose derivative at a gradient of zero is else not finite: for derivatives through training.
    """
    *firsts, b2 = check(betas, vs)
    names = momenta_names(vs)

    def numbers(count: Tensor) -> dict[str, Tensor]:
        unbias = {f"unbias_{name}": 1 / (1 - missing(b, count)) for name, b in zip(names, firsts, strict=True)}
        return unbias | {"unbias_nu": 1 / (1 - missing(b2, count))} | moving(names, firsts, vs, b2, count)

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        new = momenta(u, slots, s, names, firsts)
        new["nu"] = second = toward(slots["nu"], u * u, b2, s, "nu")
        if amsgrad:
            new["nu_max"] = second = torch.maximum(slots["nu_max"], second)
        up = mixed(u, [new[name] * s[f"unbias_{name}"] for name in names], vs, s)
        second = second * s["unbias_nu"]
        return up / ((second + eps_root if eps_root else second).sqrt() + eps), new

    still = [float(b) for b in betas if not isinstance(b, Switch)]
    plain = tuple(vs) == (1.0,) and len(still) == 2 and not amsgrad and not eps_root
    known = ("adam", Adam((still[0], still[1]), eps)) if plain else ()
    return elementwise(Elementwise(leaf, (*names, "nu", *(("nu_max",) if amsgrad else ())), numbers, known=known))


def scale_by_adopt(
    betas: Sequence[Number] = (0.9, 0.9999), vs: Sequence[Number] = (1.0,), eps: float = 1e-6,
    clip: Clip | float | None = fourth_root,
) -> Transform:
    """ADOPT's form. State: {"count", "mu", "mu_2", ..., "nu"}. clip: the bound by step (from 0), a constant one, or none."""
    *firsts, b2 = check(betas, vs)
    names = momenta_names(vs)
    if isinstance(b2, Switch) and b2.reset:
        raise ValueError("adopt divides by the squares of the steps before: they cannot be reset, momenta can")
    if isinstance(clip, float | int) and not clip > 0:
        raise ValueError(f"adopt's clip {clip}: a bound above 0, t**0.25, or none")

    def numbers(count: Tensor) -> dict[str, Tensor]:
        first = count == 0
        limit: dict[str, Tensor] = {}
        fill = 1 - (b2(count) if isinstance(b2, Switch) else b2) * (~first).double()
        if clip is not None:
            limit["high"] = clip(count) if callable(clip) else torch.zeros_like(fill) + clip
            limit["low"] = -limit["high"]
        return {"live": (~first).double(), "fill": fill} | limit | moving(names, firsts, vs, 0.0, count)

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        x = u * s["live"] / slots["nu"].sqrt().clamp(min=eps)
        if clip is not None:
            x = torch.maximum(torch.minimum(x, s["high"]), s["low"])
        new = momenta(x, slots, s, names, firsts)
        out = mixed(x, [new[name] for name in names], vs, s)
        return out, new | {"nu": slots["nu"] + (u * u - slots["nu"]) * s["fill"]}

    return elementwise(Elementwise(leaf, (*names, "nu"), numbers))


# -- the parts ------------------------------------------------------------------------------------------------------
def check(betas: Sequence[Number], vs: Sequence[Number]) -> tuple[Number, ...]:
    """betas, if each is in [0, 1), there is one more than of vs, and no sum of vs is above 1; ValueError otherwise."""
    given, weights = [values(b) for b in betas], [values(v) for v in vs]
    if len(betas) != len(vs) + 1:
        count = f"{len(vs) + 1} are needed, one for each momentum (vs {_told(weights)}) and one for the squares"
        raise ValueError(f"betas {_told(given)}: {count}")
    if not all(0 <= b < 1 for beta in given for b in beta):
        raise ValueError(f"betas {_told(given)}: each must be at least 0 and below 1")
    if not all(0 <= x <= 1 for v in weights for x in v) or any(sum(v[i] for v in weights) > 1 + 1e-8 for i in (0, -1)):
        raise ValueError(f"vs {_told(weights)}: each must be at least 0, and their sum at most 1")
    return tuple(betas)


def _told(numbers: Sequence[tuple[float, ...]]) -> str:
    """What the numbers are, "0.9, 0.95 then 0.999" where one changes."""
    return ", ".join(" then ".join(f"{x:g}" for x in number) for number in numbers)


def momenta_names(vs: Sequence[Number]) -> tuple[str, ...]:
    """mu, mu_2, mu_3, ..."""
    return tuple("mu" if i == 0 else f"mu_{i + 1}" for i in range(len(vs)))


def moving(
    names: tuple[str, ...], firsts: Sequence[Number], vs: Sequence[Number], b2: Number, count: Tensor
) -> dict[str, Tensor]:
    """The numbers that a Switch makes data: betas, whether a moment is kept, weights."""
    betas = {name: b for name, b in zip((*names, "nu"), (*firsts, b2), strict=True) if isinstance(b, Switch)}
    weights = {f"v_{name}": v(count) for name, v in zip(names, vs, strict=True) if isinstance(v, Switch)}
    fill = {f"fill_{name}": 1 - b(count) for name, b in betas.items()}
    return fill | {f"keep_{name}": b.keep(count) for name, b in betas.items()} | weights


def toward(mean: Any, x: Any, beta: Number, s: dict[str, Any], name: str) -> Any:
    """beta mean + (1 - beta) x."""
    if not isinstance(beta, Switch):
        return mean.lerp(x, 1 - beta)
    mean = mean * s[f"keep_{name}"]
    return mean + (x - mean) * s[f"fill_{name}"]


def momenta(x: Any, slots: Slots, s: dict[str, Any], names: tuple[str, ...], firsts: Sequence[Number]) -> Slots:
    """The momenta after x."""
    return {name: toward(slots[name], x, b, s, name) for name, b in zip(names, firsts, strict=True)}


def mixed(x: Any, mus: list[Any], vs: Sequence[Number], s: dict[str, Any]) -> Any:
    """(1 - sum of vs) x + sum of v_i mu_i; terms of weight 0 are left out."""
    names = momenta_names(vs)
    weights = [s[f"v_{name}"] if isinstance(v, Switch) else v for name, v in zip(names, vs, strict=True)]
    still = all(isinstance(v, float | int) for v in vs)
    rest = 1 - sum(weights)
    terms = [mu if still and w == 1 else mu * w for mu, w in zip(mus, weights, strict=True) if not (still and w == 0)]
    terms += [x * rest] if not still or abs(rest) > 1e-12 else []
    return sum(terms[1:], start=terms[0])
