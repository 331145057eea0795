"""Model FLOPs of a training step, and what a device could do: their ratio is MFU.

Counted as Megatron-LM's `num_floating_point_operations` does: matrix products only, the backward twice the forward, the
causal half of attention; what remat computes again is not counted, nor is a sliding window's saving.

    step = 3 * (2 T (L (embed mlp f + embed hd (2 heads + 2 kv)) + embed vocab) + L * 2 T seq heads hd)
           |    |                   |                              |               |
           |    two per multiply-   f = 3 if gated, else 2         logits          scores and their use of the values:
           |    add; T = tokens                                                    two products, half of each
           backward is twice the forward
"""

from __future__ import annotations

import re


def train_step_flops(
    *,
    layers: int,
    embed: int,
    heads: int,
    kv: int,
    hd: int,
    mlp: int,
    gated: bool,
    vocab: int,
    seq: int,
    batch: int,
) -> float:
    """FLOPs of one step of a decoder on `batch` sequences of `seq` tokens. For experts, `mlp` is the active width.

    Llama-3-8B, batch 128, seq 8192: 5.397063e16, as Megatron-LM's own function says.
    """
    tokens = batch * seq
    projections = embed * hd * (2 * heads + 2 * kv)
    block = embed * mlp * (3 if gated else 2) + projections
    attention = layers * 2 * tokens * seq * heads * hd
    return 3.0 * (2 * tokens * (layers * block + embed * vocab) + attention)


# Dense peaks in FLOP/s of one device by torch.cuda.get_device_name, for (bf16, tf32, fp32 without tensor cores).
# Data sheets of Hopper and Blackwell print the tensor cores' rates for 2:4 sparse matrices: halved here.
# The first pattern that is found in the name counts.
_PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    # https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703 (HGX B200, GB200)
    (r"GB200", (2.5e15, 1.25e15, 80e12)),
    (r"B200", (2.25e15, 1.125e15, 75e12)),
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (SXM, PCIe and NVL differ)
    (r"H100.*NVL", (835e12, 417e12, 60e12)),
    (r"H100.*PCIe", (756e12, 378e12, 51e12)),
    (r"H200.*NVL", (835e12, 417e12, 60e12)),
    # https://www.nvidia.com/en-us/data-center/h200/ (the chip of the H100 SXM, more memory)
    (r"H100|H200|GH200|H800", (989.4e12, 494.7e12, 66.9e12)),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    (r"A100|A800", (312e12, 156e12, 19.5e12)),
    # https://www.nvidia.com/en-us/data-center/l40s/ and /l4/
    (r"L40S", (362e12, 183e12, 91.6e12)),
    (r"\bL4\b", (121e12, 60e12, 30.3e12)),
    # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    (r"\bA10\b", (125e12, 62.5e12, 31.2e12)),
)
_COLUMNS = ("bf16", "tf32", "fp32")


def peak_flops(device: str, precision: str = "bf16") -> float | None:
    """Dense peak FLOP/s of one device by its name, at "bf16", "tf32" or "fp32"; None if unknown, as every CPU is.

    fp16 runs at bf16's rate. ValueError for another precision.
    """
    column = {"fp16": "bf16"}.get(precision, precision)
    if column not in _COLUMNS:
        raise ValueError(f"no peak for precision {precision!r}: it is one of fp16, {', '.join(_COLUMNS)}")
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device):
            return peaks[_COLUMNS.index(column)]
    return None


def mfu(flops_per_second: float, peak: float | None, devices: int = 1) -> float | None:
    """Model FLOPs utilisation: the part of the devices' peak that the model's own FLOPs use; None without a peak."""
    return None if peak is None else flops_per_second / (peak * devices)
