"""FLOPs against Megatron-LM's own recorded numbers, and against torch's counter on a decoder written in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fmegatron.train.flops import mfu, peak_flops, train_step_flops

LLAMA3_8B = dict(layers=32, embed=4096, heads=32, kv=8, hd=128, mlp=14336, gated=True, vocab=128256)
MIXTRAL = dict(layers=32, embed=4096, heads=32, kv=8, hd=128, mlp=2 * 14336, gated=True, vocab=32000)
QWEN3_30B_A3B = dict(layers=48, embed=2048, heads=32, kv=4, hd=128, mlp=8 * 768, gated=True, vocab=151936)
GPT_177B = dict(layers=96, embed=12288, heads=96, kv=96, hd=128, mlp=49152, gated=False, vocab=131072)


@pytest.mark.parametrize(
    "config, batch, seq, recorded",
    [
        (LLAMA3_8B, 128, 8192, 5.397063e16),
        (MIXTRAL, 256, 4096, 8.357828e16),  # two experts a token
        (QWEN3_30B_A3B, 512, 4096, 4.824767e16),  # eight experts a token
        (GPT_177B, 1152, 4096, 5.107082e18),
    ],
)
def test_equals_megatron_lm(config: dict[str, Any], batch: int, seq: int, recorded: float) -> None:
    assert train_step_flops(**config, batch=batch, seq=seq) == pytest.approx(recorded, rel=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_equals_what_torch_counts(gated: bool) -> None:
    """One layer's matrix products forward and backward; torch computes both halves of the scores, we count one."""
    batch, seq, embed, heads, kv, hd, mlp, vocab = 2, 8, 12, 3, 1, 4, 20, 17
    x = torch.randn(batch * seq, embed, requires_grad=True)
    weights = {
        name: torch.randn(shape, requires_grad=True)
        for name, shape in dict(
            q=(embed, heads * hd), k=(embed, kv * hd), v=(embed, kv * hd), o=(heads * hd, embed),
            up=(embed, mlp), gate=(embed, mlp), down=(mlp, embed), head=(embed, vocab),
        ).items()
    }  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        split = [(x @ weights[n]).view(batch, seq, -1, hd).transpose(1, 2).expand(-1, heads, -1, -1) for n in "qkv"]
        q, k, v = (part.reshape(batch * heads, seq, hd) for part in split)
        mixed = (q.bmm(k.transpose(1, 2)).softmax(-1)).bmm(v)
        y = mixed.view(batch, heads, seq, hd).transpose(1, 2).reshape(batch * seq, heads * hd) @ weights["o"]
        h = y @ weights["up"]
        h = h * (y @ weights["gate"]) if gated else h
        ((h @ weights["down"]) @ weights["head"]).sum().backward()
    ours = train_step_flops(
        layers=1, embed=embed, heads=heads, kv=kv, hd=hd, mlp=mlp, gated=gated, vocab=vocab, seq=seq, batch=batch
    )
    other_half = 3 * 2 * batch * seq * seq * heads * hd
    assert counter.get_total_flops() == ours + other_half


def test_peaks_by_device_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA GB200") == 2.5e15 and peak_flops("NVIDIA B200") == 2.25e15
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12 and peak_flops("NVIDIA A10") == 125e12
    assert peak_flops("cpu") is None and peak_flops("Intel(R) Xeon(R)") is None
    with pytest.raises(ValueError, match="fp12"):
        peak_flops("NVIDIA H200", "fp12")


def test_mfu_needs_a_peak() -> None:
    assert mfu(1e14, None) is None
    assert mfu(989.4e12, peak_flops("NVIDIA H200"), devices=2) == pytest.approx(0.5)
