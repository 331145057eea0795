"""Semi-synchronous training: replicas step on their own data, and average what they hold now and then. Pure functions.

    rule = SemiSync(params=32, moments={"mu": 96, "nu": 192})                        DES-LOC
    rule = SemiSync(params=32, moments=32)                                           Local Adam (Local SGD with sgd)
    rule = SemiSync(params=32, outer=sgd(0.7, momentum=0.9, nesterov=True))          DiLoCo
    rule = SemiSync(params=32, outer=..., fragments=4, delay=5)                      streaming DiLoCo: a fragment every 8 steps

At step t replica m takes its gradient g at its own parameters. DES-LOC (arXiv 2505.22549, Algorithm 1) then averages, before
the local update, whatever has a period that divides t:

    x = mean over m of x_m  if K_x divides t, else x_m       u likewise with K_u, v with K_v
    u = b1 u + (1 - b1) g;   v = b2 v + (1 - b2) g²;   x = x - rate u / (sqrt(v) + eps)

That is order="before". order="after" averages at the end of step t where the period divides t + 1, so that the next gradient is
taken at the mean: Local SGD, DiLoCo (arXiv 2311.08105). With an outer optimizer the mean is not what replicas go on from:

    d = mean over m of (a - x_m);   a = a + outer(d);   x = a          a: where all replicas last stood together

With a delay the mean of d is sent off at t and awaited at t + delay, while steps go on (arXiv 2501.18512, Algorithm 2): a then
moves, and replicas go on from keep · x_m + (1 - keep) · a. What is on its way is part of the state, `outer["sent"]`.

Everything here is a function of the clock (steps so far, a Python int, equal on all replicas) and the state. The first
step has nothing to average: replicas start equal. `Ways` are how values meet: `apart.mean_over` on a mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optree
import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models import layers
from fmegatron.models.model import Model
from fmegatron.optim import Transform, apply_updates
from fmegatron.optim.elementwise import zero
from fmegatron.optim.fuse import keep
from fmegatron.tree import Tree

Mean = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Ways:
    """How values meet. mean: at once. delta: pseudo-gradients, at once; send: these, which nobody may read before `arrive`."""

    mean: Mean
    delta: Mean
    send: Mean
    arrive: Mean


@dataclass(frozen=True)
class SemiSync:
    """When replicas meet, and what they do then. Periods are in steps; a period of 0 is never.

    params: of the parameters. moments: of the optimizer's state, one for all, or by slot ({"mu": 96, "nu": 192}), each slot
    named. outer: of the pseudo-gradient; None: replicas go on from the mean. order: None is "before", with an outer optimizer
    "after". fragments: parts of the parameters, which take turns inside a period. pattern: how layers fall into them.
    keep: share of its own parameters that a replica keeps at a synchronisation (alpha of streaming DiLoCo).
    dtype: in which pseudo-gradients travel; None is their own. delay: steps between sending them and the outer update.
    """

    params: int
    moments: int | Mapping[str, int] = 0
    outer: Transform | None = None
    order: Literal["before", "after"] | None = None
    fragments: int = 1
    pattern: Literal["strided", "sequential"] = "strided"
    keep: float = 0.0
    dtype: torch.dtype | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        moments = self.moments.values() if isinstance(self.moments, Mapping) else (self.moments,)
        if self.params < 1 or min(moments, default=0) < 0:
            raise ValueError(f"periods params = {self.params}, moments = {self.moments}: at least 1 step, and 0 for no moments")
        if not 1 <= self.fragments <= self.params:
            raise ValueError(f"fragments = {self.fragments}: each needs a step of its own in a period of {self.params}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep = {self.keep}: a share, at least 0 and below 1")
        if self.dtype is not None and self.outer is None:
            raise ValueError(f"dtype = {self.dtype} is of pseudo-gradients, which an outer optimizer takes: name one")
        if self.delay and self.outer is None:
            raise ValueError(f"delay = {self.delay} is of pseudo-gradients, which an outer optimizer takes: name one")
        if not 0 <= self.delay < self.params:
            raise ValueError(f"delay = {self.delay}: at least 0, and less than the {self.params} steps between two meetings")

    @property
    def after(self) -> bool:
        """Whether replicas meet after a step's update, not before."""
        return self.order == "after" or (self.order is None and self.outer is not None)

    def fragment_at(self, clock: int) -> int | None:
        """Whose turn it is; fragment f's is f / fragments of a period after the first one's."""
        turns = [f * self.params // self.fragments for f in range(self.fragments)]
        return turns.index(clock % self.params) if clock > 0 and clock % self.params in turns else None


@dataclass(frozen=True)
class Piece:
    """A parameter, or one layer of a stacked one, by the name that files give it; and the fragment it belongs to."""

    name: str
    path: str
    row: int | None
    fragment: int

    def of(self, params: Mapping[str, Tensor]) -> Tensor:
        """Its tensor among parameters by path."""
        return params[self.path] if self.row is None else params[self.path][self.row]


def pieces_of(model: Model, rule: SemiSync) -> tuple[Piece, ...]:
    """The model's parameters in fragments: layers in turn or in runs, and what is no layer where least is so far."""
    declared = tree.to_paths(model.declare)
    sizes = {path: math.prod(p.true_shape(model.sizes)) for path, p in declared.items()}
    depth = 1 + max((layers.split_run(name)[1] for path, p in declared.items() if p.layers is not None
                     for name in layers.layer_paths(path, p)), default=0)  # fmt: skip
    found, filled = list[Piece](), [0] * rule.fragments
    for path, p in declared.items():
        for row, name in enumerate(layers.layer_paths(path, p) if p.layers is not None else ()):
            layer = layers.split_run(name)[1]
            fragment = layer % rule.fragments if rule.pattern == "strided" else layer * rule.fragments // depth
            filled[fragment] += sizes[path] // (p.layers or 1)
            found.append(Piece(name, path, row, fragment))
    for path in sorted((path for path, p in declared.items() if p.layers is None), key=lambda path: (-sizes[path], path)):
        fragment = filled.index(min(filled))
        filled[fragment] += sizes[path]
        found.append(Piece(path, path, None, fragment))
    return tuple(found)


# -- moments, and parameters without an outer optimizer ---------------------------------------------------------------
def desloc_sync(step: int, params: Tree, opt_state: Tree, periods: tuple[Tree, Tree], mean: Mean) -> tuple[Tree, Tree]:
    """Parameters and state, averaged where a leaf's period divides `step`.

    periods: for the parameters and for the state, each a tree of ints or a prefix of one; 0 is never. Counts are no moments:
    what is not floating stays. All that is due goes through one call of `mean`.
    """
    both: Tree = (params, opt_state)
    prefix: Tree = periods
    values, spec = tree.flatten(both)
    due = [
        i for i, (x, every) in enumerate(zip(values, optree.broadcast_prefix(prefix, both), strict=True))
        if every and step > 0 and step % every == 0 and x.is_floating_point()
    ]  # fmt: skip
    if due:
        for i, x in zip(due, mean([values[i] for i in due]), strict=True):
            values[i] = x
    params, opt_state = tree.unflatten(spec, values)
    return params, opt_state


def moment_periods(moments: int | Mapping[str, int], params: Tree, opt_state: Tree) -> Tree:
    """A tree like an optimizer's state: the period of each leaf that mirrors a parameter, by its slot, and 0 for counts.

    Raises ValueError where slots and the optimizer's do not match: a moment without a period would be a silent choice.
    """
    paths, slots = frozenset(tree.to_paths(params)), slots_of(params, opt_state)
    by_slot = dict.fromkeys(slots, moments) if isinstance(moments, int) else moments
    if by_slot.keys() != set(slots):
        has = ", ".join(slots) or "none"
        raise ValueError(f"moments = {dict(by_slot)}: this optimizer's are {has}; give each its period, 0 for never")
    return tree.map_with_path(lambda path, _: by_slot.get(slot_of(path, paths) or "", 0), opt_state)


def slots_of(params: Tree, opt_state: Tree) -> list[str]:
    """The names of an optimizer's state that mirrors the parameters."""
    paths = frozenset(tree.to_paths(params))
    return sorted({slot for path in tree.to_paths(opt_state) if (slot := slot_of(path, paths)) is not None})


def slot_of(path: str, params: frozenset[str]) -> str | None:
    """The slot of a state's leaf that mirrors a parameter, "0.mu.layers.0.attn.q" -> "mu"; None of any other leaf."""
    parts = path.split(".")
    return next((parts[i - 1] for i in range(1, len(parts)) if ".".join(parts[i:]) in params), None)


# -- parameters in fragments, with an outer optimizer -----------------------------------------------------------------
def init_outer(rule: SemiSync, pieces: Sequence[Piece], params: Tree) -> Tree:
    """{"params": {name: a}, "state": {fragment: the outer optimizer's}}; empty where there is no outer optimizer.

    With a delay also "sent": {name: mean pseudo-gradient} and "waits": {fragment: 1 where one is on its way, else 0}.
    """
    if rule.outer is None:
        return ()
    flat = tree.to_paths(params)
    start = {piece.name: piece.of(flat).clone() for piece in pieces}
    mine = [[piece.name for piece in pieces if piece.fragment == f] for f in range(rule.fragments)]
    state = {str(f): rule.outer.init({name: start[name] for name in names}) for f, names in enumerate(mine)}
    if not rule.delay:
        return {"params": start, "state": state}
    sent = {name: torch.zeros_like(x, dtype=rule.dtype) for name, x in start.items()}
    return {"params": start, "state": state, "sent": sent, "waits": {at: zero(params) for at in state}}


def fragment_sync(
    rule: SemiSync, pieces: Sequence[Piece], clock: int, params: Tree, outer: Tree, ways: Ways
) -> tuple[Tree, Tree]:
    """Parameters and outer state after the fragment whose turn it is has met, or what it sent has arrived."""
    turn = rule.fragment_at(clock - rule.delay)
    mine = [piece for piece in pieces if piece.fragment == turn]
    if mine:
        flat, at = tree.to_paths(params), str(turn)
        own = {piece.name: piece.of(flat) for piece in mine}
        if rule.outer is None:
            new = dict(zip(own, ways.mean(list(own.values())), strict=True))
        elif rule.delay:
            new, outer = _outer_step(rule, at, dict.fromkeys(own), outer, ways.arrive([outer["sent"][name] for name in own]))
        else:
            new, outer = _outer_step(rule, at, own, outer, ways.delta(_deltas(own, outer)))
        # Never the outer's own tensors: a donating step overwrites parameters in place.
        given = {name: new[name].lerp(x, rule.keep) if rule.keep else new[name].clone() for name, x in own.items()}
        if rule.delay:  # nothing was sent where the step was refused
            given = keep(outer["waits"][at] > 0, given, own)
            outer = {**outer, "waits": {**outer["waits"], at: torch.zeros_like(outer["waits"][at])}}
        params = _put(params, mine, given)
    return params, _send(rule, pieces, clock, params, outer, ways) if rule.delay else outer


def _deltas(own: Mapping[str, Tensor], outer: Tree) -> list[Tensor]:
    return [outer["params"][name] - x for name, x in own.items()]


def _outer_step(
    rule: SemiSync, at: str, names: Mapping[str, Any], outer: Tree, deltas: Sequence[Tensor]
) -> tuple[dict[str, Tensor], Tree]:
    """(new a of a fragment, outer state) after its mean pseudo-gradient; where it waited for none the old ones."""
    assert rule.outer is not None
    start, old = {name: outer["params"][name] for name in names}, outer["state"][at]
    given = {name: d.to(start[name].dtype) for name, d in zip(names, deltas, strict=True)}
    updates, state = rule.outer.update(given, old, start)
    new = apply_updates(start, updates)
    if rule.delay:
        new, state = keep(outer["waits"][at] > 0, (new, state), (start, old))
    return new, {**outer, "params": {**outer["params"], **new}, "state": {**outer["state"], at: state}}


def _send(rule: SemiSync, pieces: Sequence[Piece], clock: int, params: Tree, outer: Tree, ways: Ways) -> Tree:
    """The outer state with the pseudo-gradients of the fragment whose turn it is on their way."""
    turn, flat = rule.fragment_at(clock), tree.to_paths(params)
    own = {piece.name: piece.of(flat) for piece in pieces if piece.fragment == turn}
    if not own:
        return outer
    sent = dict(zip(own, ways.send(_deltas(own, outer)), strict=True))
    waits = {**outer["waits"], str(turn): torch.ones_like(outer["waits"][str(turn)])}
    return {**outer, "sent": {**outer["sent"], **sent}, "waits": waits}


def _put(params: Tree, pieces: Sequence[Piece], values: Mapping[str, Tensor]) -> Tree:
    """Parameters with some pieces in place of their own."""
    by_path: dict[str, dict[int | None, Tensor]] = {}
    for piece in pieces:
        by_path.setdefault(piece.path, {})[piece.row] = values[piece.name]

    def leaf(path: str, x: Tensor) -> Tensor:
        rows = by_path.get(path)
        if rows is None or None in rows:
            return x if rows is None else rows[None]
        return torch.stack([rows.get(i, x[i]) for i in range(x.shape[0])])

    out: Any = tree.map_with_path(leaf, params)
    return out


# -- both -------------------------------------------------------------------------------------------------------------
def synchronize(
    rule: SemiSync, pieces: Sequence[Piece], clock: int, held: tuple[Tree, Tree, Tree], ways: Ways
) -> tuple[Tree, Tree, Tree]:
    """(params, opt_state, outer) after the meeting of this clock; `held` itself where none is due."""
    params, opt_state, outer = held
    whole = rule.outer is None and rule.fragments == 1 and not rule.keep
    periods = (rule.params if whole else 0, moment_periods(rule.moments, params, opt_state))
    params, opt_state = desloc_sync(clock, params, opt_state, periods, ways.mean)
    if not whole:
        params, outer = fragment_sync(rule, pieces, clock, params, outer, ways)
    return params, opt_state, outer
