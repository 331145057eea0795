"""Products of quantized matrices by torch's own operator for them, where device, formats and sizes allow it.

    y = multiply(a, b, torch.bfloat16, "triton")        a [m, inner], b [n, inner] -> a times b transposed, [m, n]

`torch.nn.functional.scaled_mm` takes one scale a tensor, or one a row, of fp32. CUDA (8.9 and later) wants sizes divisible by
16, the right factor of e4m3, and bf16 out of rows' scales. Its CPU kernel came with torch 2.13. Anything else, blocks too, is
`quantize.multiply`, which differs by the order of sums only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fmegatron.kernels import quantize
from fmegatron.kernels.launch import Form
from fmegatron.kernels.quantize import Quantized


def multiply(a: Quantized, b: Quantized, dtype: torch.dtype, form: Form) -> Tensor:
    """a [m, inner] times b [n, inner] transposed, [m, n] in dtype; form "triton" is torch's kernel where it takes them."""
    kind = taken(a, b, dtype) if form == "triton" else None
    if kind is None:
        return quantize.multiply(a, b).to(dtype)
    shapes = ((1, 1), (1, 1)) if kind is F.ScalingType.TensorWise else ((-1, 1), (1, -1))
    scales = [q.scales.reshape(shape).contiguous() for q, shape in zip((a, b), shapes, strict=True)]
    left, right = a.payload.contiguous(), b.payload.contiguous().t()
    return F.scaled_mm(left, right, scales[0], kind, scales[1], kind, output_dtype=dtype)


def taken(a: Quantized, b: Quantized, dtype: torch.dtype) -> F.ScalingType | None:
    """The kind of scaling by which torch's kernel takes a product here; None: it does not."""
    (m, inner), n, device = a.payload.shape, b.payload.shape[0], a.payload.device
    rows, columns = a.scales.shape, b.scales.shape
    if rows[2] != 1 or columns[2] != 1 or a.scales.dtype != torch.float32 or not served(device):
        return None
    if rows[0] == columns[0] == 1:
        kind = F.ScalingType.TensorWise
    elif (rows[0], columns[0]) == (m, n):
        kind = F.ScalingType.RowWise
    else:
        return None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or 0 in (m, n, inner):
        return None
    if device.type == "cuda":
        right = b.payload.dtype == torch.float8_e4m3fn
        whole = inner % 16 == 0 and n % 16 == 0 and right
        return kind if whole and (kind is F.ScalingType.TensorWise or dtype == torch.bfloat16) else None
    return kind


def served(device: torch.device) -> bool:
    """Whether torch has the operator on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu" and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")
