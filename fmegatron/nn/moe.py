"""A mixture of experts in place of a feed-forward block: router, routed experts, and experts that every token shares.

    y = sum_j w_j expert_j(x)  (+ sigmoid(x g) shared(x))          latent: up(sum_j w_j expert_j(down(x)))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fmegatron.nn import dispatch, experts, leanexperts, lowexperts, mlp, router
from fmegatron.nn.mlp import Mlp
from fmegatron.nn.param import Init, Param
from fmegatron.nn.router import Router, hits
from fmegatron.sharding.ragged import Meanwhile
from fmegatron.transforms import compiling, inside_transform

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding

DOWN = "batch seq embed, embed expert_latent -> batch seq expert_latent"
UP = "batch seq expert_latent, expert_latent embed -> batch seq embed"


@dataclass(frozen=True)
class Moe(Router):
    """The block, and which layers have it; the router's fields come first."""

    mlp: int | None = None  # width of an expert; None: that of a dense layer
    shared: int = 0  # width of the experts that every token shares, together
    shared_gate: bool = False
    latent: int | None = None  # routed experts work on so many features
    first_dense: int = 0  # layers without experts at the start
    layers: int | tuple[bool, ...] = 1  # n: one of n layers has experts, the first of each; or a flag for each layer
    capacity: float | None = None  # an expert takes so many times its even share of a rank's tokens; None: all
    drop: Literal["probs", "position"] = "probs"  # what is over: the choices of least weight, or the last

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("mlp", 1), ("shared", 0), ("latent", 1), ("first_dense", 0), ("layers", 1)):
            if isinstance(value := getattr(self, name), int) and value < least:
                raise ValueError(f"moe.{name} = {value}: it is at least {least}")
        if self.drop not in ("probs", "position"):
            raise ValueError(f"moe.drop = {self.drop!r}: it is one of probs, position")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate without shared experts: give their width, shared")
        if self.drop != "probs" and self.capacity is None:
            raise ValueError(f"moe.drop = {self.drop} without capacity: nothing is dropped, give a factor like 1.25")
        if self.first_dense and not isinstance(self.layers, int):
            raise ValueError(f"moe.first_dense = {self.first_dense} and a flag for each layer in moe.layers: drop one")
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"capacity = {self.capacity}: it is a factor of the even share, like 1.25")

    def at(self, layer: int) -> bool:
        """Whether a layer, from 0, has experts."""
        if isinstance(self.layers, int):
            return layer >= self.first_dense and (layer - self.first_dense) % self.layers == 0
        return self.layers[layer]

    def sizes(self, mlp: int) -> dict[str, int]:
        """Named sizes; mlp: the width of a dense layer."""
        sizes = {"expert": self.experts, "router_expert": self.experts, "expert_mlp": self.mlp or mlp}
        sizes |= {"shared_mlp": self.shared} if self.shared else {}
        return sizes | ({"expert_latent": self.latent} if self.latent else {})


def own(number: int) -> tuple[tuple[str, str], ...]:
    """(name inside, name outside) of a layer's own values: what a router has chosen, and its load in a step so far."""
    return (("route", f"route.{number}"), ("load", f"load.{number}"))


def renumbered(reads: Sequence[str], number: int) -> tuple[str, ...]:
    """What a layer reads, of another number."""
    return tuple(f"{kind}.{number}" if (kind := name.split(".")[0]) in ("route", "load") else name for name in reads)


def experts_of(table: Mapping[str, Any], base: Moe | None = None) -> Moe:
    """The block of a table of its fields, as TOML and JSON give them; base: one with the others."""
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in table.items()}
    if unknown := [name for name in given if name not in Moe.__dataclass_fields__]:
        raise ValueError(f"moe has no setting {unknown[0]!r}, known are {', '.join(Moe.__dataclass_fields__)}")
    if base is None and "experts" not in given:
        raise ValueError("moe has no experts: say how many, like experts = 8")
    return Moe(**given) if base is None else replace(base, **given)


def declare(moe: Moe, kind: Mlp, inner: Init, outer: Init) -> dict[str, Any]:
    """Its weights: `inner` fills the projections up, `outer` those back into the residual stream."""
    width = "expert_latent" if moe.latent else "embed"
    p: dict[str, Any] = {"router": router.declare(moe, inner), "experts": experts.declare(kind, inner, outer, width)}
    if moe.latent:
        p |= {"latent_down": Param("embed expert_latent", inner), "latent_up": Param("expert_latent embed", outer)}
    if moe.shared:
        p["shared"] = mlp.declare(kind, inner, outer, "shared_mlp")
        p |= {"shared_gate": Param("embed", inner, decay=True)} if moe.shared_gate else {}
    return p


def apply(
    sh: Sharding, moe: Moe, kind: Mlp, p: dict[str, Any], x: Tensor, v: dict[str, Tensor], key: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """[batch, seq, embed] -> the same, and the router's loss terms; taps a layer's load, entropy, dropped choices.

    Where "routes" are watched, `route` is among the terms: what a later run can replay.
    """
    routing = router.apply(sh, moe, p["router"], x, v, key)
    inside = sh.einsum(DOWN, x, p["latent_down"]) if moe.latent else x
    meanwhile = Meanwhile(partial(shared, sh, moe, kind, p, x) if moe.shared else None)
    y = routed(sh, moe, kind, p["experts"], inside, routing.chosen, routing.weight, meanwhile)
    if moe.latent:
        y = sh.einsum(UP, y, p["latent_up"])
    monitor(sh, routing)
    meanwhile.run()
    record = {"route": routing.chosen} if sh.watches("routes") else {}
    return y if meanwhile.result is None else y + meanwhile.result, routing.terms | record


def shared(sh: Sharding, moe: Moe, kind: Mlp, p: dict[str, Any], x: Tensor) -> Tensor:
    """The experts that every token shares."""
    y = mlp.apply(sh, kind, p["shared"], x, "shared_mlp")
    if not moe.shared_gate:
        return y
    return y * (x @ p["shared_gate"]).sigmoid()[..., None]


def routed(
    sh: Sharding,
    moe: Moe,
    kind: Mlp,
    p: dict[str, Any],
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    meanwhile: Meanwhile | None = None,
) -> Tensor:
    """Tokens x [batch, seq, d] through the experts index [batch, seq, k], each result times its weight.

    meanwhile: work that may be done while rows travel. Raises ValueError where the rules ask for a form that cannot be.
    """
    shape, t, e = x.shape, x.shape[0] * x.shape[1], moe.experts
    x, index, weight = x.flatten(0, 1), index.flatten(0, 1), weight.flatten(0, 1)
    ways, form = dispatch.ways_of(sh), form_of(sh, x)
    full = t if not x.is_meta else dispatch.capacity(t, moe.top_k, e, 1.0)  # a plan takes the load to be even
    slots = full if moe.capacity is None else dispatch.capacity(t, moe.top_k, e, moe.capacity)
    dropped = slots < full
    slot = dispatch.slots_of(index, weight, e, slots, moe.drop) if dropped or form == "padded" else None
    if dropped and slot is not None:
        index = torch.where(slot < e * slots, index, e)
        if sh.taps is not None:
            sh.tap("experts/{layer}.dropped", (index == e).unflatten(0, shape[:2]).double(), "batch seq top")
    width = "expert_latent" if moe.latent else "embed"
    table = sh.relayout(p["down_bias"], f"expert {width} -> router_expert {width}") if kind.bias else None
    p = lowexperts.placed(sh, p)
    grouped, batched = (partial(fn, kind, p, form=sh.kernels) for fn in (experts.grouped, experts.batched))
    here = sh.mesh.device if x.is_meta else "" if blind(x) else x.device.type
    plain = here == "cpu" and sh.kernels == "reference" and all(isinstance(w, Tensor) for w in p.values())
    lean = partial(leanexperts.lean, kind, p) if plain else None
    if form == "local":
        y = dispatch.local(x, index, weight, e, grouped, lean, dropped)
    elif form == "ragged":
        y = dispatch.ragged(sh, ways, x, index, weight, e, grouped, dropped, meanwhile)
    elif form == "gather":
        y = dispatch.gathered(sh, ways, x, index, weight, e, None if blind(x) else grouped, lean, batched)
    else:
        assert slot is not None
        y = dispatch.padded(sh, ways, x, weight, slot, e, slots, batched)
    if table is not None:
        y = y + weight.new_zeros(t, e + 1).scatter(1, index, weight)[:, :e].to(y.dtype) @ table
    return y.unflatten(0, shape[:2])


def blind(x: Tensor) -> bool:
    """Whether the program may not look at values: under a transform, traced into a graph, or without any."""
    return inside_transform() or compiling() or x.is_meta


def form_of(sh: Sharding, x: Tensor) -> str:
    """How tokens x travel here: as the rules say, and "local" where they need not."""
    form, alone = sh.rules.dispatch, dispatch.ways_of(sh).alone
    if form == "ragged" and blind(x) and not x.is_meta:
        raise ValueError("dispatch 'ragged' looks at values, which a vmap and a compiled block cannot: use 'padded' or 'auto'")
    if alone:
        traced = compiling() and not inside_transform() and experts.traceable(x)
        return "local" if x.is_meta or traced or not blind(x) else "padded"
    return form if form in ("gather", "padded") else "padded" if blind(x) else "ragged"


def monitor(sh: Sharding, routing: router.Routing) -> None:
    """Tap the load of each expert, and the number of tokens and the entropy of their scores in nats, summed."""
    if sh.taps is None:
        return
    s = routing.scores
    sh.tap("experts/{layer}.load", hits(s, routing.chosen), "batch seq router_expert", keep="router_expert")
    sh.tap("experts/{layer}.tokens", torch.ones_like(s[..., 0]), "batch seq")
    sh.tap("experts/{layer}.entropy", -(s * (s + 1e-20).log()).sum(-1), "batch seq")
