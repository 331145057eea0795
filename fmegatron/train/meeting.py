"""Where replicas of a mesh meet: a step's synchronisations, and its metrics over all of them.

The step itself runs inside one replica (`sharding/apart.py`); a Meeting is all that it knows of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models.model import Model
from fmegatron.sharding import Sharding, spmd
from fmegatron.sharding.apart import arrived, axis_of, mean_over, replicas, send_mean
from fmegatron.sharding.bucket import Wire
from fmegatron.sharding.collectives import Pmax, Psum
from fmegatron.sharding.relayout import run
from fmegatron.train.semisync import Piece, SemiSync, Ways, init_outer, pieces_of, synchronize
from fmegatron.tree import Tree

Held = tuple[Tree, Tree, Tree]  # parameters and state as the optimizer holds them, and the outer optimizer's


@dataclass(frozen=True)
class Meeting:
    """The rule of a step, and the sharding with all replicas; without a rule every method gives back what it got."""

    sh: Sharding
    rule: SemiSync | None = None
    pieces: tuple[Piece, ...] = ()

    def before(self, sh: Sharding, clock: int, held: Held) -> Held:
        """On one rank, between gradient and update; clock: steps before this one."""
        return held if self.rule is None or self.rule.after else self.at(sh, clock, held)

    def after(self, sh: Sharding, clock: int, held: Held) -> Held:
        """On one rank, after the update; clock: as in `before`."""
        return held if self.rule is None or not self.rule.after else self.at(sh, clock + 1, held)

    def due(self, clock: int) -> bool:
        """Whether anything is averaged in the step that `clock` steps came before."""
        if self.rule is None:
            return False
        now, moments = clock + self.rule.after, self.rule.moments
        periods = [moments] if isinstance(moments, int) else moments.values()
        turns = (self.rule.fragment_at(now), self.rule.fragment_at(now - self.rule.delay))
        return turns != (None, None) or any(every and now and now % every == 0 for every in periods)

    def at(self, sh: Sharding, clock: int, held: Held) -> Held:
        """What is due at this clock."""
        assert self.rule is not None
        dtype = self.rule.dtype
        ways = Ways(
            mean=partial(mean_over, sh),
            delta=partial(mean_over, sh, wire=None if dtype is None else Wire(dtype, dtype)),
            send=partial(send_mean, sh, dtype=dtype),
            arrive=partial(arrived, sh),
        )
        return synchronize(self.rule, self.pieces, clock, held, ways)

    def everywhere(self, sh: Sharding, ok: Tensor) -> Tensor:
        """Whether it holds on all replicas: what one refuses, all refuse."""
        axis = None if self.rule is None else axis_of(sh)
        return ok if axis is None else run((~ok).long(), sh.rank, [Pmax(axis)]) == 0

    def outer(self, params: Tree) -> Tree:
        """The outer optimizer's first state, for parameters as the optimizer holds them."""
        return () if self.rule is None else init_outer(self.rule, self.pieces, params)

    def metrics(self, sh: Sharding, own: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
        """Over all replicas, from each one's own: means of terms by their counts; counts and taps added up; of what is named a
        min or a max the smallest or largest; of all else the mean; "skipped" stays each one's own. One collective, and one more
        for smallest and largest values."""
        if self.rule is None or (axis := axis_of(sh)) is None:
            return dict(own)
        terms = [name.removeprefix("count.") for name in own if name.startswith("count.")]
        ends = {name: -1 if "/min/" in name else 1 for name in own
                if name.startswith("tap.max.") or "/min/" in name or "/max/" in name}  # fmt: skip
        added = {name: x.double() * (own[f"count.{name}"] if name in terms else 1) for name, x in own.items()
                 if name not in ends and name != "skipped"}  # fmt: skip
        sums = tree.as_one(added, lambda flat: run(flat, sh.rank, [Psum(axis)]))
        out = {name: x if name.startswith(("count.", "tap.")) else x / axis.size for name, x in sums.items()}
        out |= {term: sums[term] / sums[f"count.{term}"].clamp(min=1) for term in terms}
        out["loss"] = sum((factors.get(term, 1.0) * out[term] for term in terms), start=torch.zeros_like(out["loss"]))
        out["skipped"] = own["skipped"]
        if ends:
            signed = {name: sign * own[name].double() for name, sign in ends.items()}
            most = tree.as_one(signed, lambda flat: run(flat, sh.rank, [Pmax(axis)]))
            out |= {name: sign * most[name] for name, sign in ends.items()}
        return {name: out[name].to(x.dtype) for name, x in own.items()}


def meeting_of(model: Model, sh: Sharding, rule: SemiSync | None) -> Meeting:
    """How the replicas of a sharding meet. Raises ValueError where a rule and `Rules.apart` do not come together."""
    if (rule is None) != (sh.rules.apart is None):
        if rule is None:
            raise ValueError(f"replicas go apart along {sh.rules.apart!r} (Rules.apart), and no SemiSync says when they meet")
        raise ValueError(f"a SemiSync is of replicas that go apart, and rules {sh.rules.name!r} name no axis for them")
    axis_of(sh)  # checks where the axis lies
    return Meeting(sh, rule, () if rule is None else pieces_of(model, rule))


def settled(sh: Sharding, outer: Tree) -> Tree:
    """An outer optimizer's state with all that is on its way arrived: before anybody but a later step reads it."""
    if not isinstance(outer, Mapping) or "sent" not in outer:
        return outer
    names = list(outer["sent"])
    return {**outer, "sent": dict(zip(names, arrived(sh, [outer["sent"][name] for name in names]), strict=True))}


def make_average(model: Model, sh: Sharding) -> Callable[[Tree], Tree]:
    """`average(params) -> params`: each stored leaf's mean over replicas that go apart; the same tree where there are none."""
    if replicas(sh) == 1:
        return lambda params: params

    run_all = spmd(sh.bind(model.sizes), lambda here, values: mean_over(here, values))

    def average(params: Tree) -> Tree:
        values, spec = tree.flatten(params)
        with torch.no_grad():
            return tree.unflatten(spec, run_all(values))

    return average
