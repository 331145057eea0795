"""FLOPs against Megatron-LM's own recorded numbers, and against torch's counter on a decoder written in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fmegatron import tree
from fmegatron.models import Config, gpt
from fmegatron.models.presets import config
from fmegatron.nn.moe import Moe
from fmegatron.train.flops import mfu, peak_flops, step_flops


@pytest.mark.parametrize(
    "name, batch, seq, recorded",
    [
        ("llama3:8b", 128, 8192, 5.397063e16),
        ("mixtral:8x7b", 256, 4096, 8.357828e16),
        ("qwen3:30b-a3b", 512, 4096, 4.824767e16),
        ("gpt:177b", 1152, 4096, 5.107082e18),
        ("deepseek:v3", 4096, 4096, 4.361958e18),
    ],
)
def test_equals_megatron_lm(name: str, batch: int, seq: int, recorded: float) -> None:
    assert step_flops(config(name), seq, batch) == pytest.approx(recorded, rel=1e-6)


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
    activation = "swiglu" if gated else "gelu"
    ours = Config(layers=1, embed=embed, heads=heads, kv=kv, hd=hd, mlp=mlp, activation=activation, vocab=vocab)
    other_half = 3 * 2 * batch * seq * seq * heads * hd
    assert counter.get_total_flops() == step_flops(ours, seq, batch) + other_half == step_flops(ours, seq, batch, causal=False)


def test_equals_what_torch_counts_of_latents_and_experts() -> None:
    """A whole model, without the norms, the embedding's lookup, the router and the masked half."""
    moe = Moe(4, 2, mlp=20, shared=12, forced=True)
    ours = Config(layers=2, embed=24, heads=4, hd=12, rope_hd=4, v_hd=6, kv_lora=8, q_lora=10, mlp=32, vocab=40, moe=moe, mtp=1)
    model, batch, seq = gpt(ours), 2, 8
    params = tree.map(lambda x: x.requires_grad_(), model.init(0))
    tokens = torch.zeros(batch, seq, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        terms, _ = model.loss(params, {"tokens": tokens})
        sum(value for value, _ in terms.values()).backward()
    routers = 3 * 3 * 2 * batch * seq * ours.embed * moe.experts
    norms = 3 * 2 * batch * seq * (3 * (8 + 10) + 3 * ours.embed)  # which Megatron-LM counts, as weights
    weights = 3 * 2 * batch * seq * moe.top_k * 20  # the gradient of each choice's weight, if it is taken as a product
    counted = counter.get_total_flops() - (step_flops(ours, seq, batch, causal=False) + routers - norms)
    assert counted in (0, weights)


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
