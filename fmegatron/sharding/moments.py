"""Moments that merge exactly: of parts (rows, microbatches, ranks) to those of the whole, in any order, to rounding.

A vector [9], fp64, of a tensor's elements and of its rows (its last dim):

    n, mean, M2, M3, M4                     M_k = sum (x - mean)^k
    rows, skewness, kurtosis, largest       of each row, summed over the rows

    M2 = sum_i  M2_i + n_i d_i^2            d_i = mean_i - mean
    M3 = sum_i  M3_i + 3 d_i M2_i + n_i d_i^3
    M4 = sum_i  M4_i + 4 d_i M3_i + 6 d_i^2 M2_i + n_i d_i^4

Nine zeros are the moments of nothing. Source: Pébay 2008 (Sandia report SAND2008-6212), for many parts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SIZE = 9


def moments(x: Tensor, whole_rows: bool = True) -> Tensor:
    """[9] of a tensor of floats; a row's moments are taken in fp32 at least, all else in fp64.

    whole_rows: else rows are pieces, whose own statistics (the last four) are not numbers.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    n = x.shape[-1]
    mean = x.mean(-1, keepdim=True)
    d = x - mean
    square = d * d
    m2, m3, m4 = square.sum(-1).double(), (square * d).sum(-1).double(), (square * square).sum(-1).double()
    variance = (m2 / n).clamp(min=torch.finfo(x.dtype).eps)
    count = torch.full_like(m2, n)
    shape = (torch.ones_like(m2), m3 / n / variance**1.5, m4 / n / variance.square(), x.amax(-1).double())
    shape = shape if whole_rows else (torch.full_like(m2, torch.nan),) * 4
    return merge(torch.stack((count, mean[..., 0].double(), m2, m3, m4, *shape), -1).flatten(0, -2))


def merge(parts: Tensor) -> Tensor:
    """[parts, 9] -> [9]."""
    return merged(parts, lambda x: x.sum(0))


def merged(parts: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The whole's moments from [..., 9] of parts; `total` adds tensors [..., k] up over the parts, which may lie on ranks."""
    n, mean, m2, m3, m4 = parts[..., :5].unbind(-1)
    first = total(torch.cat((torch.stack((n, n * mean), -1), parts[..., 5:]), -1))
    center = first[..., 1] / first[..., 0].clamp(min=1)
    d = mean - center
    square = d * d
    powers = torch.stack(
        (m2 + n * square, m3 + d * (3 * m2 + n * square), m4 + d * (4 * m3 + d * (6 * m2 + n * square))), -1
    )
    return torch.cat((first[..., :1], center[..., None], total(powers), first[..., 2:]), -1)


def described(m: Tensor) -> dict[str, Tensor]:
    """Of [..., 9]: mean, l2 (root of the sum of squares), skewness and kurtosis (3 for a Gaussian) of all elements, biased;
    and the means over rows of a row's own skewness, kurtosis and largest element. Not a number where there is no row.
    """
    n, mean, m2, m3, m4, rows, skewness, kurtosis, largest = m.unbind(-1)
    variance = m2 / n
    return {
        "mean": mean,
        "l2": (m2 + n * mean * mean).sqrt(),
        "skewness": m3 / n / variance**1.5,
        "kurtosis": m4 / n / variance.square(),
        "row_skewness": skewness / rows,
        "row_kurtosis": kurtosis / rows,
        "row_max": largest / rows,
    }


# -- statistics of three kinds, told apart by their op ------------------------------------------------------------------
Taps = dict[str, tuple[str, Tensor]]  # name: (op, value)


def joined(op: str, a: Tensor, b: Tensor) -> Tensor:
    """A statistic of two parts from those of each; op: "sum", "max" or "moments"."""
    return merge(torch.stack((a, b))) if op == "moments" else torch.maximum(a, b) if op == "max" else a + b


def collect(total: Taps, more: Mapping[str, tuple[str, Tensor]], number: int) -> None:
    """Join what node `number` tapped to `total`, {layer} in its names replaced by the number."""
    for name, (op, x) in more.items():
        name = numbered(name, number)
        total[name] = (op, joined(op, total[name][1], x) if name in total else x)


def numbered(name: str, number: int) -> str:
    """A tap's name as it is known outside of the node: "activations/{layer}.h" -> "activations/03.h"."""
    return name.replace("{layer}", f"{number:02d}")
