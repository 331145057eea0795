"""Numbers of 8 and 4 bits: what a tensor becomes, and the scales that bring it into range; exact on any machine.

    q = quantize(x, E4M3, recipe.operand)        x [rows, inner] is about q.values times q.scales; a product sums over inner

    tensorwise      one scale a tensor                                   torchao, Transformer Engine's current scaling
    delayed         the same, from the last steps' largest values, gradients too                Transformer Engine
    rowwise         one scale a row (inner is what a product sums over)   torchao
    blockwise       1 x 128, weights 128 x 128                            DeepSeek-V3, arXiv:2412.19437, section 3.3
    mxfp8           1 x 32, scales are powers of two                      OCP MX v1.0; rounded up, so that nothing saturates
    nvfp4           1 x 16 of 4 bits, scales of 8 bits, one scale a tensor over them     NVIDIA, arXiv:2509.25149

Values lie in 8 bits each (those of 4 bits too, which e4m3 holds exactly); scales, and products, are at least fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fmegatron.kernels.bits import same_bits

Name = Literal["tensorwise", "delayed", "rowwise", "blockwise", "mxfp8", "nvfp4"]
Across = Callable[[Tensor], Tensor]  # the maximum over ranks that hold other parts of the same block


@dataclass(frozen=True)
class Format:
    """A floating-point format: its largest value, and the dtype of 8 bits in which its values are kept."""

    name: str
    largest: float
    dtype: torch.dtype

    def round(self, x: Tensor) -> Tensor:
        """The nearest values of the format (ties to even), in its dtype; beyond the largest, the largest."""
        x = x.clamp(-self.largest, self.largest)
        if self.name == "e2m1":
            size = x.abs()
            step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
            x = (x / step).round() * step
        return x.to(self.dtype)


E4M3 = Format("e4m3", 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 57344.0, torch.float8_e5m2)
E2M1 = Format("e2m1", 6.0, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Scaling:
    """How an operand [rows, inner] is scaled: blocks of `rows` x `inner` (None: all of it), and what a scale can be.

    e4m3: scales of blocks are such numbers, times one scale of the whole tensor. margin: powers of two left free at the top.
    """

    rows: int | None = None
    inner: int | None = None
    scale: Literal["fp32", "pow2", "e4m3"] = "fp32"
    margin: int = 0


@dataclass(frozen=True)
class Recipe:
    """How the three products of a linear map are computed: activations, weights and the gradient of the result in formats.

    square: weights are scaled in blocks as high as wide. wgrad False: the weight's gradient is a product of what was not
    quantized. history, algorithm, of delayed scaling: the steps whose largest values are remembered, and which of them counts.
    """

    name: Name
    operand: Scaling
    square: bool = False
    format: Format = E4M3
    gradient: Format = E4M3
    wgrad: bool = True
    history: int = 1
    algorithm: Literal["max", "most_recent"] = "most_recent"

    @property
    def weight(self) -> Scaling:
        """How weights are scaled."""
        return replace(self.operand, rows=self.operand.inner) if self.square else self.operand

    @property
    def one(self) -> bool:
        """Whether a scale does not ask along what a product sums: a tensor is quantized once for all of its products."""
        return self.operand.rows == self.operand.inner


RECIPES = MappingProxyType({
    "tensorwise": Recipe("tensorwise", Scaling(), gradient=E5M2),
    "delayed": Recipe("delayed", Scaling(), gradient=E5M2),
    "rowwise": Recipe("rowwise", Scaling(rows=1)),
    "blockwise": Recipe("blockwise", Scaling(1, 128), square=True),
    "mxfp8": Recipe("mxfp8", Scaling(1, 32, "pow2")),
    "nvfp4": Recipe("nvfp4", Scaling(1, 16, "e4m3"), format=E2M1, gradient=E2M1),
})


def recipe(
    name: str, *, format: str | None = None, block: int | None = None, pow2: bool = False, margin: int = 0, wgrad: bool = True,
    history: int = 1, algorithm: Literal["max", "most_recent"] = "most_recent",
) -> Recipe:  # fmt: skip
    """A recipe by its name. format: e4m3, or hybrid for gradients in e5m2 (None: the recipe's own). block: another size.

    Raises ValueError for a name or a setting that there is not.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}: known are {', '.join(RECIPES)}")
    base = RECIPES[name]
    if block is not None and (base.operand.inner is None or block < 1):
        raise ValueError(f"recipe {name}, block {block}: blockwise, mxfp8 and nvfp4 have blocks, of 1 or more")
    if format not in (None, "e4m3", "hybrid") or (format is not None and name == "nvfp4"):
        raise ValueError(f"recipe {name}, format {format!r}: e4m3 or hybrid, and none for nvfp4")
    if name != "delayed" and (history, algorithm) != (1, "most_recent"):
        raise ValueError(f"recipe {name}, history {history}, {algorithm}: delayed scaling alone remembers")
    most = 3 if name == "nvfp4" else 16
    if not 0 <= margin <= most:
        raise ValueError(f"recipe {name}, margin {margin}: 0 to {most}, beyond that the largest values become zero")
    if pow2 and name == "nvfp4":
        raise ValueError("recipe nvfp4: its scales are of 8 bits, not powers of two")
    operand = replace(base.operand, margin=margin, inner=block or base.operand.inner)
    operand = replace(operand, scale="pow2") if pow2 else operand
    gradient = {None: base.gradient, "e4m3": E4M3, "hybrid": E5M2}[format]
    return replace(base, operand=operand, gradient=gradient, wgrad=wgrad, history=history, algorithm=algorithm)


def same(x: Tensor) -> Tensor:
    """No other rank."""
    return x


class Quantized(NamedTuple):
    """Numbers of 8 bits [rows, inner], and scales that broadcast against them in blocks [rows, 1, inner, 1]."""

    payload: Tensor
    scales: Tensor

    @property
    def values(self) -> Tensor:
        """The numbers in the dtype of products."""
        return self.payload.to(self.scales.dtype)

    @property
    def tensor(self) -> Tensor:
        """The tensor that they stand for."""
        (high, _, wide, _), (rows, inner) = self.scales.shape, self.payload.shape
        return (self.values.reshape(high, rows // high, wide, inner // wide) * self.scales).reshape(rows, inner)

    @property
    def mT(self) -> Quantized:
        """The same of the tensor transposed."""
        return Quantized(self.payload.mT, self.scales.permute(2, 3, 0, 1))


def largest(x: Tensor, scaling: Scaling, rows: Across = same, inner: Across = same) -> Tensor:
    """The largest size of each block of x [rows, inner]: [blocks of rows, 1, blocks of inner, 1], at least fp32.

    rows, inner: the maximum over ranks that hold other rows, or other parts of them; asked where a block is all of these.
    """
    top = _blocks(x, scaling).abs().amax((1, 3), keepdim=True)
    top = rows(top) if scaling.rows is None else top
    return inner(top) if scaling.inner is None else top


def factors(top: Tensor, format: Format, scaling: Scaling, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(factor into the format, scale back) of blocks whose largest values are `top`; whole: of the tensor, for e4m3 scales.

    A block of zeros has factor 1. What is not finite makes the block not finite.
    """
    if scaling.scale == "e4m3":
        assert whole is not None
        over = torch.where(whole > 0, whole / (E4M3.largest * format.largest), torch.ones_like(whole))
        scale = E4M3.round(top / format.largest / over).to(top.dtype) * over * 2.0**scaling.margin
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)  # a block far below the tensor's largest is lost
        return torch.where(scale == 0, torch.zeros_like(scale), 1 / safe), scale
    factor = (format.largest / 2.0**scaling.margin / top).clamp(max=torch.finfo(top.dtype).max)
    if scaling.scale == "pow2":
        mantissa, exponent = torch.frexp(factor)
        factor = torch.where(mantissa > 0, torch.ldexp(torch.ones_like(factor), exponent - 1), factor)
    factor = torch.where(top == 0, torch.ones_like(factor), factor)
    return factor, 1 / factor


def quantize(x: Tensor, format: Format, scaling: Scaling, rows: Across = same, inner: Across = same) -> Quantized:
    """x [rows, inner] in a format; see `largest` for rows and inner. Blocks divide x."""
    top = largest(x, scaling, rows, inner)
    whole = inner(rows(top.amax((0, 2), keepdim=True))) if scaling.scale == "e4m3" else None
    return scaled(x, format, scaling, *factors(top, format, scaling, whole))


def scaled(x: Tensor, format: Format, scaling: Scaling, factor: Tensor, scale: Tensor) -> Quantized:
    """x times factors, rounded to a format."""
    return Quantized(format.round(_blocks(x, scaling) * factor).reshape(x.shape), scale)


def largest_of(top: Tensor) -> Tensor:
    """A largest value in the dtype of scales."""
    return top.to(torch.promote_types(top.dtype, torch.float32))


def boxes(sizes: Sequence[int], rows: int, block: int) -> tuple[int, ...] | None:
    """Squares of a matrix as boxes of the leaf whose first `rows` dims are flattened to one of its sides, and the others to
    the other: how many lie along each dim; None where blocks of the flattened dims are no boxes.
    """
    found: list[int] = []
    for group in (sizes[:rows], sizes[rows:]):
        left, counts = block, list[int]()
        for size in reversed(group):
            inside = min(size, left)
            if size % inside or left % inside:
                return None
            counts.append(size // inside)
            left //= inside
        if left > 1:
            return None
        found += reversed(counts)
    return tuple(found)


def tops(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The largest size in each of x's boxes, of which there are `counts` along its dims; (): in all of it [0-D]."""
    return _boxed(x, counts).abs().amax(tuple(range(1, 2 * len(counts), 2))) if counts else x.abs().amax()


def eight_bits(x: Tensor, top: Tensor, recipe: Recipe) -> Tensor:
    """A weight's shard, of any shape, as uint8: what `quantize` makes of the whole. top: the largest value of each of its
    boxes, or the whole weight's [0-D].
    """
    factor, _ = factors(top, recipe.format, recipe.weight)
    factor = factor.reshape([n for size in top.shape for n in (size, 1)])
    return same_bits(recipe.format.round(largest_of(_boxed(x, top.shape)) * factor), torch.uint8).reshape(x.shape)


def _boxed(x: Tensor, counts: Sequence[int]) -> Tensor:
    """With two dims for each: blocks, and what is in one; no counts: as it is."""
    return x.reshape([n for size, count in zip(x.shape, counts, strict=True) for n in (count, size // count)]) if counts else x


def multiply(a: Quantized, b: Quantized) -> Tensor:
    """a [m, inner] times b [n, inner] transposed: [m, n]; scales that are one along inner are multiplied in afterwards."""
    if a.scales.shape[2] == 1 and b.scales.shape[2] == 1:
        y = a.values @ b.values.mT
        return y * _column(a.scales, y.shape[-2]) * _column(b.scales, y.shape[-1]).mT
    return a.tensor @ b.tensor.mT


def _column(scales: Tensor, rows: int) -> Tensor:
    column = scales.reshape(-1, 1)
    return column if column.shape[0] in (1, rows) else column.repeat_interleave(rows // column.shape[0], 0)


def _blocks(x: Tensor, scaling: Scaling) -> Tensor:
    rows, inner = x.shape
    high, wide = scaling.rows or rows, scaling.inner or inner
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(rows // high, high, inner // wide, wide)
