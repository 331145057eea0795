"""What sharding costs the host in eager mode: the same block on one device, on a mesh of axes of size 1, and without `sh`.

    python benchmarks/overhead.py [--rounds 400]

none      the block in plain torch functions
single    SINGLE: names, plans, no mesh
mesh      a mesh dp = cp = tp = 1 with rules fsdp_tp_sp: plans looked up, empty chains of collectives

Each round runs each of them once, forward and backward, in turn; the shape is small, so that the host is what is measured.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from report import ratio  # noqa: E402
from torch import Tensor  # noqa: E402

from fmegatron import tree  # noqa: E402
from fmegatron.models.config import Config, kinds  # noqa: E402
from fmegatron.models.gpt import declare_layer, layer  # noqa: E402
from fmegatron.nn import param, rope  # noqa: E402
from fmegatron.sharding import RULES, SINGLE, Sharding, virtual_mesh  # noqa: E402

CONFIG = Config(layers=1, embed=64, heads=4, kv=2, mlp=176, vocab=256)
BATCH, SEQ = 2, 64


def by_hand(p: dict, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The layer in plain torch, operation for operation."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def rotate(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -2).flatten(-2)

    x, a, m, e = norm(h, p["attn_norm"]["weight"]), p["attn"], p["mlp"], CONFIG.embed
    q, k, v = ((x @ a[n].reshape(e, -1)).reshape(BATCH, SEQ, -1, CONFIG.head_dim) for n in "qkv")
    q, k, v = rotate(q).transpose(1, 2), rotate(k).transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    h = h + y.flatten(2) @ a["o"].reshape(-1, e)
    x = norm(h, p["mlp_norm"]["weight"])
    return h + (F.silu(x @ m["gate"]) * (x @ m["up"])) @ m["down"]


def contestants() -> dict[str, Callable[[], Tensor]]:
    """{name: forward pass}, all on the same tensors."""
    attn = kinds(CONFIG)[0]
    p = param.init(declare_layer(CONFIG, attn), CONFIG.sizes, 0)
    p = tree.map(lambda x: x.requires_grad_(), p)
    h = torch.randn(BATCH, SEQ, CONFIG.embed)
    assert attn.rope is not None
    cos, sin = rope.tables(attn.rope, CONFIG.head_dim, torch.arange(SEQ)[None])
    values = {"h": h, "rope.cos": cos, "rope.sin": sin}
    mesh = Sharding(virtual_mesh(dp=1, cp=1, tp=1), RULES["fsdp_tp_sp"]).bind(CONFIG.sizes).at(torch.tensor(0))
    single = SINGLE.bind(CONFIG.sizes)
    return {
        "none": lambda: by_hand(p, h, cos, sin),
        "single": lambda: layer(CONFIG, attn, None, single, p, values, None)["h"],
        "mesh": lambda: layer(CONFIG, attn, None, mesh, p, values, None)["h"],
    }


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """The command; returns {comparison: (ratio, low, high)}."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rounds", type=int, default=400)
    rounds = args.parse_args(argv).rounds
    torch.set_num_threads(1)
    runs = contestants()
    same = [run() for run in runs.values()]
    assert all(torch.allclose(x, same[0], atol=1e-5) for x in same), "the contestants compute different things"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds + 5):
        for name in names[i % 3 :] + names[: i % 3]:
            begin = time.perf_counter()
            runs[name]().sum().backward()
            if i >= 5:
                seconds[name].append(time.perf_counter() - begin)
    pairs = [("single", "none"), ("mesh", "none"), ("mesh", "single")]
    found = {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in pairs}
    for name, (middle, low, high) in found.items():
        print(f"{name:<16} {middle:.3f} [{low:.3f}, {high:.3f}]")
    for name, times in seconds.items():
        print(f"{name:<16} {sorted(times)[len(times) // 2] * 1e3:.2f} ms, forward and backward of one layer")
    return found


if __name__ == "__main__":
    main()
