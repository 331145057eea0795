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

from fmegatron.kernels.bits import same_bits
from fmegatron.kernels.launch import Form
from fmegatron.kernels.quantize import Format, Quantized, Recipe, Scaling, factors, quantize, scaled
from fmegatron.kernels.scaled_mm import multiply
from fmegatron.sharding import Sharding
from fmegatron.sharding.collectives import Once, Pmax, Psum, apply
from fmegatron.sharding.einsum import Product
from fmegatron.sharding.mesh import Axis
from fmegatron.sharding.relayout import run

Axes = tuple[Axis, ...]
PAYLOAD, TOP = "_8bit", "_top"  # behind a weight's name: what it was gathered as


@dataclass(frozen=True)
class Lowered:
    """A weight inside a block, and the recipe of its products; `sh.einsum` takes it in place of a tensor.

    history: of delayed scaling, fp32 [3, steps], the newest last: the largest values of x, of the weight, and of the result's
    gradient. site: its name, under which this step's are tapped; the gradient's comes as the cotangent of history's last place.
    payload, top: the weight as it was gathered, in 8 bits (uint8), and the whole one's largest value [0-D] (of delayed scaling
    this shard's), or that of each of its boxes [blocks along each dim]; `tensor` has its shape, dtype, gradient, no values.
    """

    tensor: Tensor
    recipe: Recipe
    history: Tensor | None = None
    site: str = ""
    payload: Tensor | None = None
    top: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The weight's, in which the product is given."""
        return self.tensor.dtype

    def product(self, sh: Sharding, plan: Product, x: Tensor, shared: dict[Any, Any]) -> Tensor:
        """The local product with x, as `plan` names the dims; weights of one einsum share what x becomes.

        Raises ValueError where blocks do not divide the dims.
        """
        form = plan.matmul
        if form is None:
            raise ValueError(f"recipe {self.recipe.name}: {' '.join(plan.x)}, {' '.join(plan.w)} is no matmul")
        if sh.chunks > 1:
            raise ValueError(f"recipe {self.recipe.name} and products in {sh.chunks} chunks (async_tp): choose one of the two")
        k = form.contracted

        def flattened(w: Tensor) -> Tensor:
            return w.permute(*form.order[k:], *form.order[:k]).flatten(-k).flatten(0, -2)

        w = run(self.tensor, sh.rank, plan.right)
        tail, matrix = [w.shape[dim] for dim in form.order[k:]], flattened(w)
        names = plan.x[:-k], plan.x[-k:], tuple(plan.w[dim] for dim in form.order[k:])
        self._check(sh, names, (x.shape[-k - 1], matrix.shape[1], matrix.shape[0]))
        flat, on = x.flatten(-k).flatten(0, -2), lines(sh, plan, names, self.recipe, sh.kernels)
        if self.history is not None and sh.taps is not None:
            for which, z in (("x", flat), ("w", matrix if self.top is None else self.top.to(matrix.dtype))):
                sh.tap(f"fp8/{{layer}}/{self.site}.{which}", z.detach().abs(), "", "max")
        tops = self._tops()
        key = (plan.left, *names[:2], self.recipe, self.site if tops is not None else "")
        if key not in shared:
            shared[key] = operand(flat.detach(), sh.rank, on, None if tops is None else tops[0])
        low: tuple[Tensor | None, ...] = (None, None)
        if self.payload is not None and self.top is not None:
            one = self.top if tops is None else tops[1].to(self.top.dtype)
            of = flattened(run(self.top, sh.rank, plan.right)) if self.top.dim() else one.reshape(1, 1)
            block = self.recipe.operand.inner
            if block is not None and (of.shape[0] * block, of.shape[1] * block) != matrix.shape:
                raise ValueError(f"{self.site}: a product over other dims than it is declared with: set fp8.gather = false")
            made = factors(of[:, None, :, None], self.recipe.format, self.recipe.weight)
            low = (same_bits(flattened(run(self.payload, sh.rank, plan.right)), self.recipe.format.dtype), made[1])
        y: Tensor = _Linear.apply(flat, matrix, self.history, *low, *shared[key], tops, sh.rank, on)
        return y.reshape(*x.shape[:-k], *tail)

    def _tops(self) -> Tensor | None:
        """The largest values that set the scales of x, of the weight and of the gradient [3]; None: those of this step."""
        return None if self.history is None else settled(self.history.detach(), self.recipe)

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


def settled(history: Tensor, recipe: Recipe) -> Tensor:
    """Which largest values of a history [3, steps] set the scales of x, of the weight and of the gradient [3]."""
    return history.amax(-1) if recipe.algorithm == "max" else history[:, -1]


@dataclass(frozen=True)
class Lines:
    """Mesh axes over which tokens, what is summed over, and columns lie, and those on which the result is replicated."""

    recipe: Recipe
    tokens: Axes
    inner: Axes
    columns: Axes
    alike: Axes
    form: Form  # what computes the products


def lines(sh: Sharding, plan: Product, names: tuple[tuple[str, ...], ...], recipe: Recipe, form: Form) -> Lines:
    """The axes of a product's tokens, sum and columns."""
    owned = dict(plan.owned)
    tokens, inner, columns = (tuple(sh.mesh[axis] for name in group for axis in owned[name]) for group in names)
    taken = {axis.name for axis in (*tokens, *inner, *columns)}
    alike = tuple(axis for axis in sh.mesh.axes if axis.size > 1 and axis.name not in taken)
    return Lines(recipe, tokens, inner, columns, alike, form)


def operand(x: Tensor, rank: Tensor | None, on: Lines, top: Tensor | None) -> tuple[Tensor | None, ...]:
    """x [m, k] as its products take it: (payload, scales) along the sum, and what the weight's gradient needs of it where that
    is not the same: (payload, scales) along the tokens, or None twice."""
    r = on.recipe
    a = _quantize(x, r.format, r.operand, rank, on.tokens, on.inner, top)
    if r.one or not r.wgrad or not torch.is_grad_enabled():
        return *a, None, None
    return *a, *_quantize(x.mT, r.format, r.operand, rank, on.inner, on.tokens, top)


class _Linear(torch.autograd.Function):
    """x [m, k], w [n, k] -> [m, n]. Kept is x in 8 bits, of which products of one x share one, and w, a parameter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, history: Tensor | None, b: Tensor | None, b_scales: Tensor | None, a: Tensor, a_scales: Tensor,
        at: Tensor | None, at_scales: Tensor | None, tops: Tensor | None, rank: Tensor | None, on: Lines,
    ) -> Tensor:
        right = _weight(w, b, b_scales, rank, on, tops)
        return multiply(Quantized(a, a_scales), right, x.dtype, on.form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, history, b, b_scales, a, a_scales, at, at_scales, tops, rank, ctx.on = inputs
        r: Recipe = ctx.on.recipe
        kept = (a, a_scales) if r.one else (at, at_scales)
        ctx.dtype = w.dtype
        ctx.save_for_backward(*(kept if r.wgrad else (x, None)), w if b is None else None, b, b_scales, tops, rank, history)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, scales, w, low, low_scales, tops, rank, history), on = ctx.saved_tensors, ctx.on
        r, dtype = on.recipe, dy.dtype
        for axis in on.alike:
            dy = apply(dy, rank, Psum(axis))
        g = _quantize(dy, r.gradient, r.operand, rank, on.tokens, on.columns, None if tops is None else tops[2])
        b = _weight(w, low, low_scales, rank, on, tops, back=True)
        dx = multiply(g, b, dtype, on.form)
        if r.wgrad:
            g = g.mT if r.one else _quantize(dy.mT, r.gradient, r.operand, rank, on.columns, on.tokens)
            a = Quantized(x, scales)
            dw = multiply(g, a.mT if r.one else a, ctx.dtype, on.form)
        else:
            dw = (dy.mT @ x).to(ctx.dtype)
        for axis in on.alike:
            dx, dw = apply(dx, rank, Once(axis)), apply(dw, rank, Once(axis))
        return dx, dw, _newest(history, dy), *(None,) * 9


def _newest(history: Tensor | None, dy: Tensor) -> Tensor | None:
    """A cotangent that is zero but for the last place, which says how large dy is."""
    if history is None:
        return None
    top = dy.abs().amax().to(history.dtype)
    last = torch.arange(history.numel(), device=history.device).reshape(history.shape) == history.numel() - 1
    return torch.where(last, top, torch.zeros_like(history))


def _weight(
    w: Tensor, low: Tensor | None, scales: Tensor | None, rank: Tensor | None, on: Lines, tops: Tensor | None,
    back: bool = False,
) -> Quantized:
    """A weight [n, k] as a product takes it, or its transpose for the product back; low, scales: it as it was gathered."""
    if low is not None and scales is not None:
        return Quantized(low, scales).mT if back else Quantized(low, scales)
    r, top, axes = on.recipe, None if tops is None else tops[1], (on.columns, on.inner)
    return _quantize(w.mT if back else w, r.format, r.weight, rank, *(axes[::-1] if back else axes), top)


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
