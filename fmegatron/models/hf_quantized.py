"""Weights that files hold in few bits, as numbers, box by box: gpt-oss's MXFP4 and DeepSeek-V3's FP8.

    MXFP4   name_blocks uint8 [experts, out, groups, 16], name_scales uint8 [experts, out, groups]: two numbers a byte, the
            lower half first; 32 of them share the power of two 2^(scale - 127). Stands for name [experts, 32 groups, out].
    FP8     name [out, in], name_scale_inv fp32: a factor for each block of 128 x 128

Sources: OCP microscaling formats 1.0; arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP, BLOCK = 32, 128
Read = Callable[[str, tuple[slice, ...]], Tensor]  # a box of a stored tensor


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., groups, 16] and [..., groups] -> fp32 [..., 32 groups]."""
    table = torch.tensor(FP4, device=blocks.device)
    pairs = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1).flatten(-2)
    return torch.ldexp(pairs, scales.int()[..., None] - 127).flatten(-2)


def read_mxfp4(read: Read, name: str, box: tuple[slice, ...]) -> Tensor:
    """A box (experts, in, out) of the tensor that a name's blocks and scales stand for."""
    experts, inner, out = box
    groups = slice(inner.start // GROUP, -(-inner.stop // GROUP))
    x = from_mxfp4(read(f"{name}_blocks", (experts, out, groups)), read(f"{name}_scales", (experts, out, groups)))
    first = groups.start * GROUP
    return x[..., inner.start - first : inner.stop - first].transpose(1, 2)


def read_fp8(read: Read, name: str, box: tuple[slice, ...]) -> Tensor:
    """A box (out, in) of a weight that has factors for its blocks, fp32."""
    x = read(name, box).float()
    factors = read(f"{name}_scale_inv", tuple(slice(s.start // BLOCK, -(-s.stop // BLOCK)) for s in box))
    for dim, s in enumerate(box):
        block = torch.arange(s.start, s.stop) // BLOCK - s.start // BLOCK
        factors = factors.index_select(dim, block)
    return x * factors
