"""einsum over named dims that lie on a mesh: the collectives follow from the names on the two sides of the arrow.

For each mesh axis m of "x, w -> out":
    a contracted name that both operands carry on m owns m: the product is partial, and is summed, by psum or, where the
        output carries m, by reduce_scatter;
    otherwise the output's name owns m, and an operand that has the name without m takes its piece;
    an operand that carries m on any other name is gathered first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fmegatron.sharding.collectives import Op
from fmegatron.sharding.mesh import Mesh
from fmegatron.sharding.placement import Placement, parse_names
from fmegatron.sharding.relayout import plan_relayout, run

Names = tuple[str, ...]
Placer = Callable[[Names], Placement]
Lies = Literal["in, out", "out, in", "mixed"]


@dataclass(frozen=True)
class Matmul:
    """x [..., in] times w: the number of dims of "in", how w lies, and its dims in the order in, out."""

    contracted: int
    lies: Lies
    order: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """One right operand's part of an einsum: prepare both operands, multiply locally, bring the result home."""

    left: tuple[Op, ...]
    right: tuple[Op, ...]
    x: Names
    w: Names
    out: Names
    home: tuple[Op, ...]
    owned: tuple[tuple[str, tuple[str, ...]], ...] = ()  # the mesh axes over which a name of the local operands lies

    @cached_property
    def matmul(self) -> Matmul | None:
        """The product as one matmul; None where the names do not allow it."""
        contracted = [n for n in self.x if n in self.w and n not in self.out]
        rows = [n for n in self.x if n not in contracted]
        columns = [n for n in self.w if n not in contracted]
        if list(self.x) != rows + contracted or list(self.out) != rows + columns or not contracted:
            return None
        order = [self.w.index(n) for n in contracted + columns]
        lies: Lies = "in, out" if order == sorted(order) else "out, in" if list(self.w) == columns + contracted else "mixed"
        return Matmul(len(contracted), lies, tuple(order))


class Weight(Protocol):
    """A right operand with a product of its own, in place of a tensor; shared: what those of one einsum leave each other."""

    def product(self, sh: Any, plan: Product, x: Tensor, shared: dict[Any, Any]) -> Tensor: ...


def parse_einsum(pattern: str) -> list[tuple[Names, Names, Names]]:
    """ "a b, (b c | b d) -> (a c | a d)" -> [(x, w, out) names for each right operand].

    Raises ValueError where the numbers of right operands and outputs differ, or a name leads nowhere.
    """
    sides = pattern.split("->")
    operands = sides[0].split(",")
    if len(sides) != 2 or len(operands) != 2:
        raise ValueError(f"einsum pattern {pattern!r} is not of the form 'x, w -> out' or 'x, (w1 | w2) -> (out1 | out2)'")
    x = parse_names(operands[0])
    rights = [parse_names(text) for text in operands[1].replace("(", "").replace(")", "").split("|")]
    outs = [parse_names(text) for text in sides[1].replace("(", "").replace(")", "").split("|")]
    if len(rights) != len(outs):
        raise ValueError(f"einsum pattern {pattern!r} has {len(rights)} right operands but {len(outs)} outputs")
    for w, out in zip(rights, outs, strict=True):
        lost = [n for n in (*x, *w) if n not in out and not (n in x and n in w)]
        lost += [n for n in out if n not in x and n not in w]
        if lost:
            raise ValueError(f"einsum pattern {pattern!r}: {lost[0]!r} stands on one side only; use reduce to sum a dim away")
    return [(x, w, out) for w, out in zip(rights, outs, strict=True)]


def plan_einsum(mesh: Mesh, place: Placer, pattern: str) -> tuple[Product, ...]:
    """What each rank does for a pattern, with `place` giving the placement of names."""
    return tuple(_plan_product(mesh, place, *names) for names in parse_einsum(pattern))


def _plan_product(mesh: Mesh, place: Placer, x: Names, w: Names, out: Names) -> Product:
    at_x, at_w, at_out = place(x), place(w), place(out)
    owned: dict[str, list[str]] = {name: [] for name in (*x, *w, *out)}
    partial: set[str] = set()
    for name in owned:
        if name not in out:  # contracted: owns what both operands carry on it
            both = [m for m in at_x.of(name) if m in at_w.of(name)]
            owned[name] = both
            partial.update(both)
    for name in out:
        owned[name] = [m for m in at_out.of(name) if m not in partial]

    def operand(at: Placement) -> tuple[Op, ...]:
        return plan_relayout(mesh, at, Placement(at.names, tuple(tuple(owned[n]) for n in at.names)))

    product = Placement(out, tuple(tuple(owned[n]) for n in out), frozenset(partial))
    axes = tuple((name, tuple(found)) for name, found in owned.items())
    return Product(operand(at_x), operand(at_w), x, w, out, plan_relayout(mesh, product, at_out), axes)


def local_product(sh: Any, product: Product, x: Tensor, w: Tensor | Weight, shared: dict[Any, Any]) -> Tensor:
    """The product of a left operand that is ready and a right one that is not."""
    return multiply(product, x, run(w, sh.rank, product.right)) if isinstance(w, Tensor) else w.product(sh, product, x, shared)


def multiply(product: Product, x: Tensor, w: Tensor) -> Tensor:
    """The local product: a plain matmul wherever the names allow it."""
    form = product.matmul
    if form is None:
        return _general(product, x, w)
    k, shape = form.contracted, w.shape
    x = x.flatten(-k) if k > 1 else x
    inner, tail = x.shape[-1], [shape[dim] for dim in form.order[k:]]
    if form.lies == "in, out":
        matrix = w.reshape(inner, -1) if w.dim() > 2 else w
    elif form.lies == "out, in":
        matrix = w.reshape(-1, inner).t()
    else:
        matrix = w.permute(form.order).reshape(inner, -1)
    y = torch.matmul(x, matrix)
    return y if len(tail) == 1 else y.reshape((*y.shape[:-1], *tail))


def _general(product: Product, x: Tensor, w: Tensor) -> Tensor:
    letters = {name: chr(ord("a") + i) for i, name in enumerate(dict.fromkeys((*product.x, *product.w)))}
    spell = ["".join(letters[n] for n in names) for names in (product.x, product.w, product.out)]
    return torch.einsum(f"{spell[0]},{spell[1]}->{spell[2]}", x, w)
