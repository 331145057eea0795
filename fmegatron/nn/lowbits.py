"""A linear map whose three products are of few bits, on any mesh: scales are those of the whole tensors.

    y  = x w        x quantized along what is summed over, and w               m rows of tokens, n columns
    dx = dy w'      dy and w quantized along the columns
    dw = x' dy      x and dy quantized along the tokens

A cotangent is quantized when it is complete: where the result is replicated along a mesh axis its ranks hold parts of it,
which are summed first, and the first rank alone passes the results on (docs/architecture.md, the law for gradients).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmegatron.kernels.quantize import Format, Quantized, Recipe, Scaling, factors, multiply, quantize, scaled
from fmegatron.sharding import Sharding
from fmegatron.sharding.collectives import Once, Pmax, Psum, apply
from fmegatron.sharding.einsum import Product
from fmegatron.sharding.mesh import Axis
from fmegatron.sharding.relayout import run

Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Lowered:
    """A weight inside a block, and the recipe of its products; `sh.einsum` takes it in place of a tensor.

    history: of delayed scaling, fp32 [2, steps], the newest last: the largest values of x and of the weight. site: its name,
    under which the largest values of this step are tapped.
    """

    tensor: Tensor
    recipe: Recipe
    history: Tensor | None = None
    site: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The weight's, in which the product is given."""
        return self.tensor.dtype

    def product(self, sh: Sharding, plan: Product, x: Tensor) -> Tensor:
        """The local product with x, as `plan` names the dims. Raises ValueError where blocks do not divide them."""
        form = plan.matmul
        if form is None:
            raise ValueError(f"recipe {self.recipe.name}: {' '.join(plan.x)}, {' '.join(plan.w)} is no matmul")
        if sh.chunks > 1:
            raise ValueError(f"recipe {self.recipe.name} and products in {sh.chunks} chunks (async_tp): choose one of the two")
        w, k = run(self.tensor, sh.rank, plan.right), form.contracted
        tail = [w.shape[dim] for dim in form.order[k:]]
        matrix = w.permute(*form.order[k:], *form.order[:k]).reshape(-1, x.shape[-k:].numel())
        names = plan.x[:-k], plan.x[-k:], tuple(plan.w[dim] for dim in form.order[k:])
        self._check(sh, names, (x.shape[-k - 1], matrix.shape[1], matrix.shape[0]))
        flat, on = x.flatten(-k).flatten(0, -2), lines(sh, plan, names, self.recipe)
        if self.history is not None and sh.taps is not None:
            for which, y in (("x", flat), ("w", matrix)):
                sh.tap(f"fp8/{{layer}}/{self.site}.{which}", y.detach().abs(), "", "max")
        return _Linear.apply(flat, matrix, sh.rank, on, self._tops()).reshape(*x.shape[:-k], *tail)

    def _tops(self) -> Tensor | None:
        """The largest values that set the scales of x and of the weight [2]; None: those of this step."""
        if self.history is None:
            return None
        return self.history.amax(-1) if self.recipe.algorithm == "max" else self.history[:, -1]

    def _check(self, sh: Sharding, names: tuple[tuple[str, ...], ...], sizes: tuple[int, ...]) -> None:
        block = self.recipe.operand.inner
        if block is None:
            return
        for which, size in zip(names, sizes, strict=True):
            part = size // 2 if which[-1] == "seq" and sh.zigzag > 1 else size
            if part % block:
                raise ValueError(
                    f"recipe {self.recipe.name} has a scale for each block of {block}: {which[-1]} of {part} on a rank does "
                    f"not divide into them, choose multiples of {block} or a recipe without blocks (tensorwise, rowwise)"
                )


@dataclass(frozen=True)
class Lines:
    """Mesh axes over which tokens, what is summed over, and columns lie, and those on which the result is replicated."""

    recipe: Recipe
    tokens: Axes
    inner: Axes
    columns: Axes
    alike: Axes


def lines(sh: Sharding, plan: Product, names: tuple[tuple[str, ...], ...], recipe: Recipe) -> Lines:
    """The axes of a product's tokens, sum and columns."""
    owned = dict(plan.owned)
    tokens, inner, columns = (tuple(sh.mesh[axis] for name in group for axis in owned[name]) for group in names)
    taken = {axis.name for axis in (*tokens, *inner, *columns)}
    alike = tuple(axis for axis in sh.mesh.axes if axis.size > 1 and axis.name not in taken)
    return Lines(recipe, tokens, inner, columns, alike)


class _Linear(torch.autograd.Function):
    """x [m, k], w [n, k] -> [m, n]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, rank: Tensor | None, on: Lines, tops: Tensor | None) -> Tensor:
        r = on.recipe
        a = _quantize(x, r.format, r.operand, rank, on.tokens, on.inner, None if tops is None else tops[0])
        b = _quantize(w, r.format, r.weight, rank, on.columns, on.inner, None if tops is None else tops[1])
        return multiply(a, b).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, rank, ctx.on, tops = inputs
        ctx.save_for_backward(x, w, rank, tops)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, w, rank, tops), on = ctx.saved_tensors, ctx.on
        r, (top_x, top_w) = on.recipe, (None, None) if tops is None else tops
        for axis in on.alike:
            dy = apply(dy, rank, Psum(axis))
        g = _quantize(dy, r.gradient, r.operand, rank, on.tokens, on.columns)
        b = _quantize(w.mT, r.format, r.weight, rank, on.inner, on.columns, top_w)
        dx = multiply(g, b)
        if r.wgrad:
            one = r.operand.rows == r.operand.inner  # a scale that does not ask along what is summed
            g = g.mT if one else _quantize(dy.mT, r.gradient, r.operand, rank, on.columns, on.tokens)
            a = _quantize(x.mT, r.format, r.operand, rank, on.inner, on.tokens, top_x)
            dw = multiply(g, a)
        else:
            dw = dy.mT @ x
        for axis in on.alike:
            dx, dw = apply(dx, rank, Once(axis)), apply(dw, rank, Once(axis))
        return dx.to(x.dtype), dw.to(w.dtype), None, None, None


def _quantize(
    x: Tensor, format: Format, scaling: Scaling, rank: Tensor | None, rows: Axes, inner: Axes, top: Tensor | None = None
) -> Quantized:
    """x in a format; top: the largest value that sets its scale, in place of its own."""
    if top is None:
        return quantize(x, format, scaling, _largest_over(rank, rows), _largest_over(rank, inner))
    wide = torch.promote_types(x.dtype, torch.float32)
    return scaled(x, format, scaling, *factors(top.to(wide).reshape(1, 1, 1, 1), format, scaling))


def _largest_over(rank: Tensor | None, axes: Axes) -> Callable[[Tensor], Tensor]:
    def over(x: Tensor) -> Tensor:
        for axis in axes:
            if axis.size > 1:
                assert rank is not None
                x = apply(x, rank, Pmax(axis))
        return x

    return over
