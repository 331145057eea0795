"""The work of one rank of a mesh in one step: two rehearsals of a few layers, and a straight line through them.

The step itself runs, as rank 0 of an abstract mesh on meta tensors, under a meter. Layers of a kind do the same work, so
counts are exactly linear in their number; peaks are, for each part of the step. So a model of any depth costs two rehearsals
of two and three layers, after those at the start that are of other kinds. Experts are evenly loaded: each takes its share.

    part      head: before the layers    layer    tail: after them, the loss    update: the optimizer    rest: what is between
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from fmegatron import optim, tree
from fmegatron.models import Model
from fmegatron.nn.param import Param
from fmegatron.optim import Transform
from fmegatron.optim.host import arrays_of
from fmegatron.plan.meter import Count, Fused, Meter
from fmegatron.sharding import Sharding
from fmegatron.train.rehearsal import rehearse
from fmegatron.train.remat import parse_remat
from fmegatron.transforms import AUTOGRAD, Autograd, Block, Derivative
from fmegatron.tree import Tree

PARTS = ("head", "layer", "tail", "update", "rest")


@dataclass(frozen=True)
class Line:
    """A value by number of layers: base + slope * layers."""

    base: Any
    slope: Any

    def __call__(self, layers: float) -> Any:
        return self.base + self.slope * layers


@dataclass(frozen=True)
class Work:
    """Of one rank, by number of layers. counts: by part, of a microbatch, "update" of a step.

    peaks: bytes alive, by part, with one microbatch in flight. kept: bytes that a microbatch's forward leaves for its backward.
    host: most bytes in host memory. link, swap: bytes that a microbatch, and the update, send to and from there.
    """

    counts: dict[str, Line]
    peaks: dict[str, Line]
    kept: Line
    host: Line
    link: Line
    swap: Line


def work_of(
    model: Model,
    sharding: Sharding,
    tx_of: Callable[[Model], Transform],
    *,
    batch: tuple[int, int],
    microbatches: int = 1,
    remat: str = "none",
    prefetch: int = 1,
    **settings: Any,
) -> Work:
    """The work of a rank; settings: those of `rehearse`. tx_of: the optimizer of a model. Raises ValueError as `explain` does.

    Two microbatches stand for any number above one: the second finds the gradients of the first, as all later ones do.
    """
    layers = [node for node in model.chain if node.is_layer]
    start, period = _period([node.fn for node in layers])
    policy = parse_remat(remat)
    period = math.lcm(period, max(policy.every, 1))
    window = max(prefetch, (policy.held or 0) * max(policy.every, 1))
    many = min(len(layers), start + period * max(4, -(-(window + 2) // period)))  # so that the fewer have an inside too
    few = many - period if many > start + period else many
    parts = min(microbatches, 2)
    shared: dict[str, Any] = {"microbatches": parts, "remat": remat, "prefetch": prefetch} | settings
    rows = batch[0] // microbatches * parts
    two = []
    for n in (few, many):
        part = first_layers(model, n)
        two.append(_rehearsed(part, sharding, tx_of(part), batch=(rows, batch[1]), **shared))

    def line(value: Callable[[Meter], Any]) -> Line:
        low, high = value(two[0]), value(two[1])
        slope = (high - low) * (1 / (many - few)) if many > few else high * (1 / max(many, 1))
        return Line(high - slope * many, slope)

    def counts(part: str) -> Line:
        times = 1.0 if part == "update" else 1 / parts
        return line(lambda meter: meter.counts.get(part, Count()) * times)

    host, grown = line(lambda meter: meter.host), line(lambda meter: meter.marks["after"] - meter.marks["before"])
    on_device = (policy.held or 0) * max(policy.every, 1)  # layers of each microbatch that do not wait in host memory
    return Work(
        counts={part: counts(part) for part in PARTS},
        peaks={part: line(partial(_peak, part)) for part in PARTS},
        kept=Line(on_device * host.slope, grown.slope),
        host=host,
        link=line(lambda meter: meter.counts.get("link", Count()).moved / parts),
        swap=line(lambda meter: meter.counts.get("update link", Count()).moved),
    )


def _peak(part: str, meter: Meter) -> int:
    return meter.peaks.get(part, 0)


def _period(kinds: list[Hashable]) -> tuple[int, int]:
    """The smallest (start, p), by their sum, with kinds[i] == kinds[i + p] from `start` on."""
    n = len(kinds)
    pairs = ((total - p, p) for total in range(1, n + 1) for p in range(total, 0, -1))
    return next((s, p) for s, p in pairs if all(kinds[i] == kinds[i + p] for i in range(s, n - p))) if n else (0, 1)


def first_layers(model: Model, n: int) -> Model:
    """The same model with its first n layers only."""
    layers = [node for node in model.chain if node.is_layer]
    kept = layers[:n]
    chain = tuple(node for node in model.chain if not node.is_layer or node in kept)
    held: dict[str, int] = {}
    for node in (node for node in chain if node.layer is not None):
        for _, path in node.params:
            held[path] = max(held.get(path, 0), (node.layer or 0) + 1)
    declare: dict[str, Param] = {}
    for path, param in tree.to_paths(model.declare).items():
        count = next((held[top] for top in held if f"{path}.".startswith(f"{top}.")), 0)
        if param.layers is None or count:
            declare[path] = param if param.layers is None else replace(param, layers=count)
    return replace(model, chain=chain, declare=tree.from_paths(declare))


def _rehearsed(model: Model, sharding: Sharding, tx: Transform, *, remat: str, **settings: Any) -> Meter:
    """The meter after a step."""
    meter = Meter()
    policy = replace(parse_remat(remat), copies=meter)
    first = next((i for i, node in enumerate(model.chain) if node.is_layer), len(model.chain))
    part = {node.fn: "layer" if node.is_layer else "tail" for node in model.chain[first:]}
    engine = Watched(meter, part)

    def finish(tx: Transform) -> Callable[..., Any]:
        fused = optim.FusedStep(tx, copies=meter)

        def update(*args: Any, **more: Any) -> Any:
            return engine.under("update", lambda: fused(*args, **more))

        return update

    practice = rehearse(model, sharding, engine, tx=tx, finish=finish, remat=policy, **settings)
    away = {id(x) for x in arrays_of(tx, practice.opt_state)} if tx.host else set()
    meter.keep(x for x in practice.held if id(x) in away)
    meter.hold(x for x in practice.held if id(x) not in away)
    meter.label = "rest"
    with Fused(), meter:
        practice.step()
    return meter


@dataclass(frozen=True)
class Watched(Autograd):
    """Autograd that tells a meter which part of the chain is running, and marks what a forward leaves alive."""

    meter: Meter
    part: Mapping[Any, str]  # by a node's function

    @property
    def light(self) -> Watched:
        """Itself: light nodes are watched too."""
        return self

    def vjp(self, fn: Block, wrt: Tree, rest: Tree, kind: Any = None) -> Derivative:
        """As Autograd's."""
        part = self.part.get(kind.fn, "head")
        if part == "head":
            self.meter.marks = {"before": self.meter.alive()}
        elif part == "tail":
            self.meter.marks.setdefault("after", self.meter.alive())  # what the last layer does not keep is gone
        out, moving, back = self.under(part, lambda: AUTOGRAD.vjp(fn, wrt, rest))

        def pullback(cotangents: Mapping[str, Tensor]) -> Tree:
            return self.under(part, lambda: back(cotangents))

        return out, moving, pullback

    def under(self, part: str, run: Callable[[], Any]) -> Any:
        """`run()`, counted as a part."""
        before, self.meter.label = self.meter.label, part
        try:
            return run()
        finally:
            self.meter.label = before
