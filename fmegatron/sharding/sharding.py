"""A Sharding: a mesh, a strategy and a table of sizes, as one frozen value that blocks take as first argument.

A tensor whose dims have names N lies in one known way, `sh.placement(N)`, everywhere in the program; so each function
here needs names only, and issues the collectives that follow from them. With one device they are all plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fmegatron.sharding import named, zigzag
from fmegatron.sharding.collectives import Once, apply
from fmegatron.sharding.einsum import Weight, local_product, plan_einsum
from fmegatron.sharding.mesh import Mesh
from fmegatron.sharding.moments import moments
from fmegatron.sharding.overlap import in_chunks
from fmegatron.sharding.placement import Placement, Size, Sizes, parse_names, place
from fmegatron.sharding.relayout import plan_relayout, run
from fmegatron.sharding.rules import INSIDE, RULES, SEQ_NAMES, Kind, Rules


@dataclass(frozen=True, eq=False)
class Layout:
    """What placements depend on: mesh, rules, sizes; with a memo of the plans made from them."""

    mesh: Mesh
    rules: Rules
    sizes: Sizes
    activations: Kind = "compute"
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def plan(self, what: str, *args: str | None) -> Any:
        """The plan `what` for these names, made once and remembered."""
        key = (what, *args)
        if key not in self.memo:
            self.memo[key] = PLANS[what](self, *args)
        return self.memo[key]

    def placement(self, names: tuple[str, ...], kind: Kind | None = None, leaf: str | None = None) -> Placement:
        """Where a tensor with these names lies; what is stored is padded as the optimizer's pieces of it want it."""
        found = place(names, self.rules.lines(kind or self.activations), self.mesh.sizes, self.sizes, leaf)
        if kind == "storage" and self.rules.storage and self.rules.optimizer:
            pieces = self.placement(names, "optimizer", leaf)
            pads = tuple(pieces.pad(dim) if axes else 0 for dim, axes in enumerate(found.axes))
            return replace(found, pads=pads if any(pads) else ())
        return found

    def large(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of several ranks."""
        return tuple(axis for axis in axes if self.mesh.sizes.get(axis, 1) > 1)


NO_LAYOUT = Layout(Mesh("single"), RULES["single"], {})  # stands for "to be made"


@dataclass(frozen=True, eq=False)
class Sharding:
    """How a program lies on a mesh. `sh = Sharding(mesh, RULES["fsdp_tp_sp"])`; see the module's text.

    Raises ValueError where a mesh axis of several ranks is named by no rule: its ranks would all do the same work.
    """

    mesh: Mesh
    rules: Rules
    sizes: Sizes = field(default_factory=dict)
    rank: Tensor | None = None  # 0-D int64, set while a rank's program runs
    activations: Kind = "compute"
    recompute: Callable[[str], Callable[..., Any] | None] | None = None
    taps: dict[str, tuple[str, Tensor]] | None = None
    watch: frozenset[str] = frozenset()  # kinds of statistics that are wanted beside those that training itself needs
    chunks: int = 1  # in which a product and its collective go, overlapping: see overlap.py
    kernels: Literal["reference", "triton"] = "reference"  # what computes the parts that kernels/ has: docs/kernels.md
    layout: Layout = field(default_factory=lambda: NO_LAYOUT, repr=False)  # made from the fields above

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Rules):
            raise ValueError(f"rules are a value, such as RULES['fsdp'] or Rules(...), not {self.rules!r}")
        idle = [a.name for a in self.mesh.axes if a.size > 1 and a.name not in self.rules.axes and a.name != "pp"]
        if idle:
            known = [name for name, rules in RULES.items() if {a.name for a in self.mesh.axes if a.size > 1} <= rules.axes]
            raise ValueError(
                f"mesh axis {idle[0]!r} of {self.mesh.sizes[idle[0]]} ranks is named by no rule of {self.rules.name!r}, so its "
                f"ranks would repeat each other's work: drop it, or use rules that name it ({', '.join(known) or 'your own'})"
            )
        if self.layout is NO_LAYOUT:
            object.__setattr__(self, "layout", Layout(self.mesh, self.rules, self.sizes, self.activations))
            for rules in (self.rules, *(self.rules.of_layer(i) for i in dict(self.rules.layers))):
                if rules.attention and "q_heads" in self.sizes and self.activations == "compute":
                    place(("q_heads",), rules.lines("compute"), self.mesh.sizes, self.sizes, "attention")

    # -- values of it -----------------------------------------------------------------------------------------------
    def bind(self, sizes: Mapping[str, int | Size]) -> Sharding:
        """With a table of named sizes; optional rules, padding and wildcards need it."""
        if all(self.sizes.get(name) == size for name, size in sizes.items()):
            return self
        sizes = {**sizes, **{inside: sizes[name] for name, inside in INSIDE.items() if name in sizes}}
        return replace(self, sizes={**self.sizes, **sizes}, layout=NO_LAYOUT)

    def of_layer(self, number: int) -> Sharding:
        """As a layer sees it, counted from 1: with its own form of context parallelism where the rules give it one."""
        if number not in dict(self.rules.layers):
            return self
        rules, memo = self.rules.of_layer(number), self.layout.memo
        key = ("rules", rules.attention)
        if key not in memo:
            memo[key] = replace(self, rules=rules, layout=NO_LAYOUT).layout
        return replace(self, rules=rules, layout=memo[key])

    def at(self, rank: Tensor) -> Sharding:
        """As rank `rank` sees it."""
        return replace(self, rank=rank)

    def decoding(self) -> Sharding:
        """With the decode list for activations: no rule on seq, optional batch."""
        return replace(self, activations="decode", layout=NO_LAYOUT)

    def recomputing(self, recompute: Callable[[str], Callable[..., Any] | None]) -> Sharding:
        """With a policy: `recompute(name)` gives the wrapper that drops a named part's residuals, or None to keep them."""
        return replace(self, recompute=recompute)

    def tapping(self, taps: dict[str, tuple[str, Tensor]] | None) -> Sharding:
        """With a dict in which `tap` leaves its values; None: taps are off."""
        return replace(self, taps=taps)

    def watching(self, kinds: frozenset[str]) -> Sharding:
        """With kinds of statistics, which blocks tap where `watches` says so."""
        return replace(self, watch=kinds)

    def watches(self, kind: str) -> bool:
        """Whether statistics of a kind are wanted here and now."""
        return self.taps is not None and kind in self.watch

    def overlapping(self, chunks: int) -> Sharding:
        """With products and their collectives in chunks, one travelling while another is multiplied (1: whole)."""
        return replace(self, chunks=chunks)

    # -- placement --------------------------------------------------------------------------------------------------
    def placement(self, names: str, kind: Kind | None = None, leaf: str | None = None) -> Placement:
        """Where a tensor with these names lies: `kind` compute (activations), storage or optimizer."""
        return self.layout.plan("placement", names, kind, leaf)

    def size(self, name: str) -> int:
        """The padded global size of a bound name."""
        size = self.sizes[name]
        if not isinstance(size, Size):
            return size
        named_by = {a.rstrip("?") for n, axes in self.rules.compute if n == name for a in axes}
        return size.padded(math.prod(axis.size for axis in self.mesh.axes if axis.name in named_by))

    def true_size(self, name: str) -> int:
        """The global size of a bound name without pads."""
        return size.n if isinstance(size := self.sizes[name], Size) else size

    def index(self, name: str, names: str, x: Tensor) -> Tensor:
        """Global indices of the local slice of one dim: int64 [local size], for `x` that lies as `names`.

        Of the sequence they are places in natural order, however it is stored.
        """
        place = self.placement(names)
        local = x.shape[place.names.index(name)]
        index = torch.arange(local, device=x.device) + named.offset(self.mesh, self.rank, place.of(name), local)
        if name not in SEQ_NAMES:
            return index
        return zigzag.places(index, local * math.prod(self.mesh[axis].size for axis in place.of(name)), self.zigzag)

    @property
    def zigzag(self) -> int:
        """Ranks among which the sequence lies zigzag; 1: it lies contiguous."""
        return int(self.layout.plan("zigzag"))

    def slice_index(self, name: str, axes: tuple[str, ...], like: Tensor, pad: int = 0) -> Tensor:
        """Global indices of this rank's slice of a bound dim over `axes`: int64 [(size + pad) / ranks], on like's device."""
        shards = math.prod(self.mesh[axis].size for axis in axes)
        local = (self.size(name) + pad) // shards
        return torch.arange(local, device=like.device) + named.offset(self.mesh, self.rank, axes, local)

    # -- moving data ------------------------------------------------------------------------------------------------
    def relayout(self, x: Tensor, pattern: str) -> Tensor:
        """Rename dims by position, "batch seq kv hd -> batch kv_seq kv hd", moving data as the rules say."""
        return run(x, self.rank, self.layout.plan("relayout", pattern))

    def align(self, x: Tensor, names: str, within: str) -> Tensor:
        """Bring a tensor to where its dims lie inside another: "batch seq" within "batch seq heads hd"."""
        return run(x, self.rank, self.layout.plan("align", names, within))

    def einsum(self, pattern: str, x: Tensor, *weights: Tensor | Weight) -> Any:
        """ "batch seq embed, embed mlp -> batch seq mlp"; or one left operand with several right ones, "x, (w | v) -> (y | z)":
        x is gathered once and its cotangent reduced once. Returns one tensor, or a list of them."""
        products = self.layout.plan("einsum", pattern)
        if len(products) != len(weights):
            raise ValueError(f"einsum pattern {pattern!r} has {len(products)} right operands but got {len(weights)}")
        if self.chunks > 1 and (done := in_chunks(products, x, weights, self.rank, self.chunks)) is not None:
            return done[0] if len(done) == 1 else done
        ready, shared, out = dict[Any, Tensor](), dict[Any, Any](), list[Tensor]()
        for product, w in zip(products, weights, strict=True):
            if product.left not in ready:
                ready[product.left] = run(x, self.rank, product.left)
            y = local_product(self, product, ready[product.left], w, shared)
            out.append(run(y, self.rank, product.home))
        return out[0] if len(out) == 1 else out

    def lookup(self, pattern: str, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of a table: "batch seq, vocab embed -> batch seq embed", the table whole or sharded over its rows."""
        return named.lookup(self.layout.plan("lookup", pattern), self.mesh, self.rank, ids, table)

    def reduce(self, pattern: str, x: Tensor, op: str) -> Tensor:
        """Reduce names away, "batch seq vocab -> batch seq", by "sum", "max" (no derivative) or "logsumexp"."""
        return named.reduce(self.layout.plan("reduce", pattern), self.rank, x, op)

    def groups(self, kv: Tensor, pattern: str) -> Tensor:
        """Key/value heads for the local query heads, "batch kv_seq kv hd -> batch kv_seq heads hd"; of three sides the first is
        where they were made.

        Where the groups stay aligned the result has fewer heads than the queries: local query head j uses head
        j // (local heads / result heads). Where KV heads are fewer than ranks each rank takes the ones that it needs.
        """
        return named.groups(self, kv, pattern)

    def local(self, fn: Callable[..., Tensor], pattern: str) -> Callable[..., Tensor]:
        """`fn` on local tensors, once the pattern "a b, b c -> a c" is known not to mix over a sharded name.

        Raises ValueError naming the dim where it would.
        """
        self.layout.plan("local", pattern)
        return fn

    # -- terms, statistics, recomputation -----------------------------------------------------------------------------
    def total(self, x: Tensor, names: str, keep: str = "") -> Tensor:
        """The local part of a global sum, over all dims but `keep`: copies are counted once, so the ranks' parts add up."""
        dims = [dim for dim, name in enumerate(names.split()) if name != keep]
        return self._once(x.sum(dims) if keep else x.sum(), names)

    def _once(self, y: Tensor, names: str) -> Tensor:
        for axis in self.layout.plan("unplaced", names):
            assert self.rank is not None, "total ran outside of its mesh"
            y = apply(y, self.rank, Once(axis))
        return y

    def tap(self, name: str, x: Tensor, names: str, op: str = "sum", keep: str = "") -> None:
        """Leave a statistic of all elements, everywhere, for aux; no gradient, free when taps are off.

        op: "sum" (may `keep` a dim), "max" (with `keep` element by element), or "moments" (moments.py). {layer} in the name
        becomes the number of the node that taps; a name without is added up, or compared, over all of them.
        """
        if self.taps is not None and op == "moments":
            whole_rows = not self.placement(names).axes[-1]
            self.taps[name] = (op, self._once(moments(x.detach(), whole_rows), names))
        elif self.taps is not None:
            x = x.detach()
            self.taps[name] = (op, self.total(x, names, keep) if op == "sum" else x if keep else x.amax())

    def remat(self, name: str, fn: Callable[..., Any], *tensors: Tensor) -> Any:
        """`fn(*tensors)`, a named part whose residuals a remat policy may drop and compute again."""
        wrap = self.recompute(name) if self.recompute is not None else None
        return wrap(fn, *tensors) if wrap is not None else fn(*tensors)


def _placement(layout: Layout, names: str, kind: Kind | None, leaf: str | None) -> Placement:
    return layout.placement(parse_names(names), kind, leaf)


def _relayout(layout: Layout, pattern: str) -> Sequence[Any]:
    source, target = (layout.placement(parse_names(side)) for side in pattern.split("->"))
    return plan_relayout(layout.mesh, source, target)


def _align(layout: Layout, names: str, within: str) -> Sequence[Any]:
    source, outer = layout.placement(parse_names(names)), layout.placement(parse_names(within))
    target = Placement(source.names, tuple(outer.of(name) for name in source.names))
    return plan_relayout(layout.mesh, source, target)


def _einsum(layout: Layout, pattern: str) -> Any:
    return plan_einsum(layout.mesh, layout.placement, pattern)


def _unplaced(layout: Layout, names: str) -> tuple[Any, ...]:
    placed = layout.placement(parse_names(names)).placed
    return tuple(axis for axis in layout.mesh.axes if axis.size > 1 and axis.name not in placed)


PLANS: Mapping[str, Callable[..., Any]] = {
    "placement": _placement,
    "relayout": _relayout,
    "align": _align,
    "einsum": _einsum,
    "unplaced": _unplaced,
    "zigzag": zigzag.plan_zigzag,
    "lookup": named.plan_lookup,
    "reduce": named.plan_reduce,
    "local": named.check_local,
}

SINGLE = Sharding(Mesh("single"), RULES["single"])
