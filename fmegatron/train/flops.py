"""Model FLOPs of a training step, and what a device could do: their ratio is MFU.

Counted as Megatron-LM's `num_floating_point_operations` does: matrix products only, the backward twice the forward, the
causal half of attention; of experts the chosen ones. What remat computes again is not counted, nor is a sliding window's
saving, a router, or a latent that is cached.

    step = 3 * (2 T (L (attention + feed-forward) + embed vocab) + L T seq heads (hd + v_hd))
           |    |                                       |          |
           |    two per multiply-add; T = tokens     logits        scores and their use of the values: half of each product
           backward is twice the forward

A module that predicts a further token is one more layer, a projection and logits.
"""

from __future__ import annotations

import re

from fmegatron.models import Config
from fmegatron.models.config import moe_of


def step_flops(c: Config, seq: int, batch: int, causal: bool = True) -> float:
    """FLOPs of one step of a decoder on `batch` sequences of `seq` tokens. causal False: with the masked half of attention.

    Llama-3-8B, batch 128, seq 8192: 5.397063e16; DeepSeek-V3, batch 4096, seq 4096: 4.361958e18, as Megatron-LM's own
    function says.
    """
    tokens, layers = batch * seq, [*range(c.layers), *[c.layers - 1] * c.mtp]
    weights = sum(attention_weights(c) + forward_weights(c, i) for i in layers)
    weights += c.mtp * (3 * c.embed + 2 * c.embed**2) + (c.mtp + 1) * c.embed * c.vocab
    values = c.head_dim if c.latent is None else c.latent.v_hd
    scores = len(layers) * tokens * seq * c.heads * (c.head_dim + values)
    return 3.0 * (2 * tokens * weights + (scores if causal else 2 * scores))


def attention_weights(c: Config) -> int:
    """Multiply-adds of a token in a layer's projections; a latent's norm counts as a weight each, as in Megatron-LM."""
    m, hd = c.latent, c.head_dim
    if m is None:
        return c.embed * hd * (2 * c.heads + 2 * (c.kv or c.heads))
    queries = c.embed * c.heads * hd if m.q_lora is None else m.q_lora * (c.embed + c.heads * hd + 1)
    keys = m.kv_lora * (c.embed + c.heads * (hd - m.rope_hd + m.v_hd) + 1) + c.embed * m.rope_hd
    return queries + keys + c.heads * m.v_hd * c.embed


def forward_weights(c: Config, layer: int) -> int:
    """Multiply-adds of a token in a layer's feed-forward block, or in the experts that it meets."""
    products = 3 if c.block_mlp.gated else 2
    m = moe_of(c, layer)
    if m is None:
        return c.embed * c.mlp * products
    width = m.latent or c.embed
    return products * (width * (m.mlp or c.mlp) * m.top_k + c.embed * m.shared) + (2 * c.embed * m.latent if m.latent else 0)


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
