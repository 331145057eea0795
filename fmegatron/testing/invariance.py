"""Whether a model computes on a mesh what it computes on one device: every value on its way, not only the loss.

`measure` runs a model under a sharding and brings everything back whole. Compared are, in the order in which they arise:
initial parameters (bit for bit), what each node of the chain writes, what each call of `sh` inside it returns, the loss,
its gradients, and their norm. The first value that differs tells where the mistake is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.models.model import Model, run_chain
from fmegatron.nn import router
from fmegatron.sharding import RULES, SINGLE, Placement, Rules, Sharding, shard, spmd, thread_mesh, virtual_mesh
from fmegatron.sharding.einsum import Weight
from fmegatron.sharding.named import split_arrow
from fmegatron.sharding.placement import parse_names
from fmegatron.sharding.relayout import plan_relayout, run
from fmegatron.sharding.shard_map import natural, rank_of, unstack_shards
from fmegatron.sharding.sharding import NO_LAYOUT
from fmegatron.testing.assertions import assert_trees_all_close, assert_trees_all_equal
from fmegatron.train.planned import Plan, plan_step
from fmegatron.train.state import Over, init_params
from fmegatron.train.step import value_and_grad

TOKENS = "batch seq"
HEADS = "batch seq heads hd"
NAMES: Mapping[str, str] = MappingProxyType({  # "a b within c": lies where a and b lie inside c; "": a sum over ranks
    **dict.fromkeys(("tokens", "labels", "weights", "positions", "documents", "order", "place.h"), TOKENS),
    **dict.fromkeys(("order.q", "order.k", "documents.all"), "batch place"),
    **{f"{table}.{part}": f"{TOKENS} one pair within {HEADS}" for table in ("rope", "rope.window") for part in ("cos", "sin")},
    "sample": "batch",
    "h": "batch seq embed",
    "out": "batch loss_seq embed",
    "out.labels": "batch loss_seq",
    "out.weights": "batch loss_seq",
    **{f"out.{k}": "batch loss_seq embed" for k in range(1, 5)},  # of multi-token prediction
    **{f"out.{name}.{k}": "batch loss_seq" for k in range(1, 5) for name in ("labels", "weights")},
    **{f"moe.{term}": "" for term in router.LOSSES},
})


@dataclass(frozen=True)
class Measured:
    """What a model computed, whole: {path: tensor} each; activations in the order in which they arose."""

    params: dict[str, Tensor]
    activations: dict[str, Tensor]
    metrics: dict[str, Tensor]
    grads: dict[str, Tensor]
    norm: Tensor


@dataclass(frozen=True, eq=False)
class Recording(Sharding):
    """A sharding that keeps what its calls return, in `seen`: {call: (names, the rules there, local tensor)}."""

    seen: dict[str, tuple[str, Rules, Tensor]] = field(default_factory=dict)
    where: str = ""

    def keep(self, call: str, names: str, x: Tensor) -> Tensor:
        """Note a value under its call, numbered."""
        self.seen[f"{self.where} #{len(self.seen)} {call}"] = (names, self.rules, x)
        return x

    def relayout(self, x: Tensor, pattern: str) -> Tensor:
        return self.keep(pattern, pattern.split("->")[1], super().relayout(x, pattern))

    def align(self, x: Tensor, names: str, within: str) -> Tensor:
        return self.keep(f"{names} within {within}", f"{names} within {within}", super().align(x, names, within))

    def einsum(self, pattern: str, x: Tensor, *weights: Tensor | Weight) -> Any:
        result = super().einsum(pattern, x, *weights)
        outs = pattern.split("->")[1].replace("(", "").replace(")", "").split("|")
        for names, y in zip(outs, result if len(outs) > 1 else [result], strict=True):
            self.keep(pattern, names, y)
        return result

    def lookup(self, pattern: str, ids: Tensor, table: Tensor) -> Tensor:
        return self.keep(pattern, pattern.split("->")[1], super().lookup(pattern, ids, table))

    def reduce(self, pattern: str, x: Tensor, op: str) -> Tensor:
        return self.keep(f"{op} {pattern}", pattern.split("->")[1], super().reduce(pattern, x, op))

    def local(self, fn: Callable[..., Tensor], pattern: str) -> Callable[..., Tensor]:
        inner, out = super().local(fn, pattern), " ".join(split_arrow(pattern)[1])
        return lambda *args: self.keep(pattern, out, inner(*args))


def forward(model: Model, sh: Sharding, params: Any, batch: Mapping[str, Tensor], names: Mapping[str, str], key: Any) -> Any:
    """{name of a value: (names of its dims, rules, local tensor)} of one forward pass on one rank."""
    given = {f.name: getattr(sh, f.name) for f in fields(Sharding)} | {"recompute": None}
    recording = Recording(**given)
    values = model.inputs(sh, batch)
    for i, node in enumerate(model.chain):
        here = replace(recording, where=f"node {i}")
        new = run_chain(model, (node,), params, values, sh=here, key=key)
        for name in node.writes:
            if name in new and new[name] is not values.get(name):
                if name not in names and not name.startswith("loss."):
                    raise ValueError(f"value {name!r} has no names: give names={{{name!r}: 'batch seq ...'}} of its dims")
                here.keep(name, names.get(name, ""), new[name])
        values = new
    return recording.seen


def measure(
    model: Model,
    sh: Sharding,
    batch: Mapping[str, Tensor],
    *,
    names: Mapping[str, str] = NAMES,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    expected: Measured | None = None,
    **settings: Any,
) -> Measured:
    """Run a model under a sharding, on a whole batch, and bring all it computes back whole.

    names: of the dims of the batch's entries and of the chain's values, in addition to `NAMES`. expected: one device's
    result, which settles the shapes of values with dims of size 1. settings: those of `plan_step`.
    """
    names = {**NAMES, **names}
    plan = plan_step(model, sh, **settings)
    sh = plan.sh
    key = random.key(seed + 1) if model.dropout else None
    lies: dict[str, tuple[str, Rules]] = {}

    def on_rank(here: Sharding, like: Tensor, local: dict[str, Tensor]) -> Any:
        params = init_params(model, here, plan.leaves, random.key(seed), dtype)
        seen = forward(model, here, params, local, names, key)
        lies.update({name: (dims, rules) for name, (dims, rules, _) in seen.items()})
        grads, metrics = value_and_grad(plan, here, params, local, key)
        norm = Over(here, plan.leaves).norm(grads)
        return params, {name: x for name, (*_, x) in seen.items()}, metrics, grads, norm

    ranks = torch.zeros(sh.mesh.size if sh.mesh.stacked else (), device=sh.mesh.device)
    local = {name: shard(sh, x, names[name]) for name, x in batch.items()}
    with torch.no_grad():
        params, seen, metrics, grads, norm = spmd(sh, on_rank)(ranks, local)
    alike: Any = (lambda x: x[0]) if sh.mesh.stacked else (lambda x: x)
    shapes = {} if expected is None else {name: x.shape for name, x in expected.activations.items()}
    return Measured(
        params=whole_leaves(plan, params, "storage"),
        activations={name: whole(under(sh, lies[name][1]), x, lies[name][0], shapes.get(name)) for name, x in seen.items()},
        metrics={name: alike(x) for name, x in metrics.items()},
        grads=whole_leaves(plan, grads, "optimizer"),
        norm=alike(norm),
    )


def under(sh: Sharding, rules: Rules) -> Sharding:
    """The same under other rules: a layer may have its own inside attention."""
    return sh if rules is sh.rules else replace(sh, rules=rules, layout=NO_LAYOUT)


def whole_leaves(plan: Plan, values: Any, kind: str) -> dict[str, Tensor]:
    """{path: global tensor without pads} of local parameters, or of what lies as they do: `kind` storage or optimizer."""
    leaves = zip(plan.leaves.items(), tree.leaves(values), strict=True)
    return {path: bring(plan.sh, x, getattr(leaf, kind), leaf.param.layers is not None) for (path, leaf), x in leaves}


def whole(sh: Sharding, x: Tensor, dims: str, shape: Any = None) -> Tensor:
    """The global tensor of a local one: "a b", "a b within c", or "" for a sum over ranks. A dim of size 1 is on all."""
    inner, _, outer = (part.strip() for part in dims.partition(" within "))
    names = parse_names(inner)
    every = frozenset(axis.name for axis in sh.mesh.axes)
    place = sh.placement(inner)
    if outer:
        lies = sh.placement(outer)
        place = Placement(names, tuple(lies.of(name) if name in lies.names else () for name in names))
    if not names:
        place = Placement((), (), every)
    if shape is not None:
        place = replace(place, axes=tuple(() if n == 1 else axes for n, axes in zip(shape, place.axes, strict=True)))
    return bring(sh, x, place)


def bring(sh: Sharding, x: Tensor, place: Placement, stacked: bool = False) -> Tensor:
    """The global tensor of a local one that lies as `place`, without pads; every process gets it."""
    if sh.mesh.stacked:
        x = unstack_shards(sh.mesh, x, place)
    else:
        replicated = Placement(place.names, ((),) * len(place.names))
        x = run(x, rank_of(sh.mesh), plan_relayout(sh.mesh, place, replicated))
    x = natural(sh, x, place.names)
    for dim, name in enumerate(place.names):
        if name in sh.sizes and not (stacked and dim == 0) and x.shape[dim] > sh.true_size(name):
            x = x.narrow(dim, 0, sh.true_size(name))
    return x


def assert_same(actual: Measured, expected: Measured, tolerance: float) -> None:
    """All that was measured agrees: parameters bit for bit, the rest to `tolerance` of each value's largest entry.

    Gradients that are rounding only (100 eps of the largest gradient of all) count as zero.
    """
    assert_trees_all_equal(actual.params, expected.params)
    for name, x in expected.activations.items():  # one by one: the first that differs is where to look
        assert name in actual.activations, f"{name}: not computed; blocks must make the same calls under every sharding"
        assert_trees_all_close({name: actual.activations[name]}, {name: x}, tolerance, 1e-6)
    assert_trees_all_close(actual.metrics, expected.metrics, tolerance)
    largest = max(float(x.abs().max()) for x in expected.grads.values() if x.numel())
    eps = torch.finfo(next(iter(expected.grads.values())).dtype).eps
    assert_trees_all_close(actual.grads, expected.grads, tolerance, 100 * eps * largest / tolerance)
    assert_trees_all_close({"gradient norm": actual.norm}, {"gradient norm": expected.norm}, tolerance)


MESHES = (
    {"dp": 2},
    {"dp": 4},
    {"dp": 2, "fsdp": 2},
    {"tp": 2},
    {"dp": 2, "tp": 2},
    {"cp": 2, "tp": 2},
    {"dp": 2, "cp": 2, "tp": 2},
)


def shardings(meshes: Iterable[Mapping[str, int]] = MESHES, threads: bool = False) -> list[Sharding]:
    """Every preset on every mesh whose axes it names, on virtual meshes (or with a thread a rank)."""
    make = thread_mesh if threads else virtual_mesh
    pairs = [(rules, sizes) for rules in RULES.values() for sizes in meshes]
    return [Sharding(make(**sizes), rules) for rules, sizes in pairs if sizes.keys() <= rules.axes]


def assert_mesh_invariant(
    model: Model,
    batch: Mapping[str, Tensor],
    over: Iterable[Sharding] | None = None,
    *,
    names: Mapping[str, str] = NAMES,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> None:
    """Under every sharding the model computes what it computes on one device: see `Measured`.

    over: shardings to try; None is every preset on the meshes `MESHES` that it fits. batch: whole; its rows and sequence
    must divide. names: of values of your own, {"h": "batch seq embed"}. tolerance: 1e-10 in fp64, 1e-5 in fp32.
    settings: of the step (microbatches, remat). Raises AssertionError naming sharding, value and place.
    """
    tolerance = tolerance or (1e-10 if dtype == torch.float64 else 1e-5)
    expected = measure(model, SINGLE, batch, names=names, dtype=dtype, seed=seed)
    for sh in shardings() if over is None else over:
        try:
            actual = measure(model, sh, batch, names=names, dtype=dtype, seed=seed, expected=expected, **settings)
            assert_same(actual, expected, tolerance)
        except AssertionError as wrong:
            raise AssertionError(f"{sh.rules.name} on {sh.mesh.kind} mesh {sh.mesh.sizes} {settings}: {wrong}") from wrong
