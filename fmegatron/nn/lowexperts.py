"""Products of rows grouped by expert in 8 bits, on any mesh; `lowbits.py` has those of all other weights.

    y = x w_e      rows x [n, a] in groups of counts[e] (or [experts, slots, a]) times w [experts, a, b]
    dx = dy w_e'   dw_e = x_e' dy_e

tensorwise: one scale for all rows everywhere, and one for each expert's matrix. rowwise: one along what is summed; for dw that
is an expert's rows, on all ranks. Computed by definition: the values' product in fp32, times scales. Rows are kept wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmegatron.kernels.quantize import Format, Recipe, factors, largest_of
from fmegatron.nn.experts import grouped_outer, grouped_product
from fmegatron.nn.lowbits import Lowered
from fmegatron.sharding import Sharding
from fmegatron.sharding.collectives import Once, Pmax, Psum, apply
from fmegatron.sharding.mesh import Axis
from fmegatron.sharding.relayout import run

Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Spread:
    """Mesh axes over which an expert's matrix lies by its first and its second dim, those of experts, all that hold something,
    and those on which all is held alike."""

    recipe: Recipe
    first: Axes
    second: Axes
    experts: Axes
    every: Axes
    alike: Axes

    def but(self, *axes: Axis) -> Axes:
        """All that are not among these."""
        return tuple(axis for axis in self.every if axis not in axes)


@dataclass(frozen=True)
class LowExperts:
    """The stacked weights of a projection, whose product with rows is of 8 bits."""

    tensor: Tensor
    rank: Tensor | None
    on: Spread

    def product(self, rows: Tensor, counts: Tensor | None) -> Tensor:
        """Rows [n, a] in groups, or [experts, slots, a] where counts are None, times the weights."""
        y: Tensor = _Product.apply(rows, self.tensor, counts, self.rank, self.on)
        return y


def placed(sh: Sharding, p: dict[str, Any]) -> dict[str, Any]:
    """Experts' weights, of which those of few bits know where they lie."""
    experts, width = (sh.placement("expert expert_mlp").of(name) for name in ("expert", "expert_mlp"))
    tokens = sh.placement("batch seq embed").placed
    every = tuple(axis for axis in sh.mesh.axes if axis.size > 1)
    wide, own = (tuple(axis for axis in every if axis.name in names) for names in (width, experts))
    alike = tuple(axis for axis in every if axis.name not in tokens | {*experts, *width})

    def of(name: str, w: Any) -> Any:
        if not isinstance(w, Lowered):
            return w
        first, second = (wide, ()) if name == "down" else ((), wide)
        return LowExperts(w.tensor, sh.rank, Spread(w.recipe, first, second, own, every, alike))

    return {name: of(name, w) for name, w in p.items()}


class _Product(torch.autograd.Function):
    """rows, w [experts, a, b] -> rows of b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, w: Tensor, counts: Tensor | None, rank: Tensor | None, on: Spread) -> Tensor:
        r = on.recipe
        x, x_scale = by_row(rows, r.format, r, rank, on, on.first)
        m, m_scale = by_matrix(w, 1, r, rank, on, on.first)
        y = multiplied(x.to(x_scale.dtype), m.to(m_scale.dtype), counts) * x_scale * spread(m_scale, rows, counts)
        return y.to(rows.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, w, counts, rank, ctx.on = inputs
        ctx.save_for_backward(rows, w, counts, rank)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (rows, w, counts, rank), on = ctx.saved_tensors, ctx.on
        r: Recipe = on.recipe
        for axis in on.alike:
            dy = apply(dy, rank, Psum(axis))
        g, g_scale = by_row(dy, r.gradient, r, rank, on, on.second)
        m, m_scale = by_matrix(w, 2, r, rank, on, on.second)
        dx = multiplied(g.to(g_scale.dtype), m.to(m_scale.dtype).transpose(1, 2), counts)
        dx = (dx * g_scale * spread(m_scale.transpose(1, 2), dy, counts)).to(rows.dtype)
        if not r.wgrad:
            dw = outer(rows, dy, counts).to(w.dtype)
        else:
            x, x_scale = by_expert(rows, counts, r.format, r, rank, on, on.first)
            g, g_scale = by_expert(dy, counts, r.gradient, r, rank, on, on.second)
            dw = outer(x.to(x_scale.dtype), g.to(g_scale.dtype), counts) * x_scale.transpose(1, 2) * g_scale
        for axis in on.alike:
            dx, dw = apply(dx, rank, Once(axis)), apply(dw, rank, Once(axis))
        return dx, dw.to(w.dtype), None, None, None


# -- quantized, by one scale or by those that the recipe asks for ---------------------------------------------------------
def by_row(x: Tensor, format: Format, r: Recipe, rank: Tensor | None, on: Spread, along: Axes) -> tuple[Tensor, Tensor]:
    """Rows as a product sums them, and scales that broadcast."""
    top = largest_of(x).abs().amax(-1, keepdim=True) if r.operand.rows else _largest(x)
    return _rounded(x, format, r, over(top, rank, along if r.operand.rows else on.every))


def by_matrix(w: Tensor, dim: int, r: Recipe, rank: Tensor | None, on: Spread, along: Axes) -> tuple[Tensor, Tensor]:
    """Weights as a product sums them along dim 1 or 2: each expert by itself."""
    top = largest_of(w).abs().amax(dim if r.operand.rows else (1, 2), keepdim=True)
    return _rounded(w, r.format, r, over(top, rank, along if r.operand.rows else (*on.first, *on.second)))


def by_expert(
    x: Tensor, counts: Tensor | None, format: Format, r: Recipe, rank: Tensor | None, on: Spread, columns: Axes
) -> tuple[Tensor, Tensor]:
    """Rows as the weights' gradient sums them, by expert; scales [experts or 1, 1, features or 1]."""
    if not r.operand.rows:
        payload, scale = by_row(x, format, r, rank, on, ())
        return payload, scale.reshape(1, 1, 1)
    if counts is None:
        top = largest_of(x).abs().amax(1, keepdim=True)
    else:
        sizes = largest_of(x).abs()
        index = groups(counts, x)[:, None].expand_as(sizes)
        top = sizes.new_zeros(len(counts), x.shape[1]).scatter_reduce(0, index, sizes, "amax")[:, None]
    factor, scale = factors(over(top, rank, on.but(*on.experts, *columns)), format, r.operand)
    return format.round(largest_of(x) * spread(factor, x, counts)), scale


def _rounded(x: Tensor, format: Format, r: Recipe, top: Tensor) -> tuple[Tensor, Tensor]:
    factor, scale = factors(top, format, r.operand)
    return format.round(largest_of(x) * factor), scale


def _largest(x: Tensor) -> Tensor:
    """Of all rows; 0 where there are none."""
    wide = largest_of(x).abs()
    return torch.cat((wide.reshape(-1), wide.new_zeros(1))).amax()


def over(top: Tensor, rank: Tensor | None, axes: Axes) -> Tensor:
    """The maximum over ranks."""
    return run(top, rank, [Pmax(axis) for axis in axes])


# -- products -----------------------------------------------------------------------------------------------------------
def multiplied(x: Tensor, w: Tensor, counts: Tensor | None) -> Tensor:
    """Rows times their experts' matrices."""
    return x @ w if counts is None else grouped_product(x, w, counts)


def outer(x: Tensor, y: Tensor, counts: Tensor | None) -> Tensor:
    """Each expert's rows transposed, times its others."""
    return x.transpose(1, 2) @ y if counts is None else grouped_outer(x, y, counts)


def groups(counts: Tensor, x: Tensor) -> Tensor:
    """Whose each row is."""
    return torch.arange(len(counts), device=x.device).repeat_interleave(counts, output_size=x.shape[0])


def spread(scale: Tensor, x: Tensor, counts: Tensor | None) -> Tensor:
    """Scales [experts, 1, features or 1] for the rows of x."""
    return scale if counts is None else scale[:, 0].index_select(0, groups(counts, x))
