"""The residual stream in fp32 while blocks compute in bf16: a reference in plain torch, on one device and on meshes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fmegatron import random, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, thread_mesh, virtual_mesh
from fmegatron.testing.invariance import measure

SMALL = 2.0**-8  # of what a block adds: below half a unit in the last place of a bf16 stream, so that one keeps nothing of it
SIZES = {"layers": 3, "embed": 16, "heads": 4, "mlp": 16, "vocab": 24, "positions": "none", "residual_multiplier": SMALL}
MESHES = {
    "tp": lambda: Sharding(virtual_mesh(tp=2), RULES["fsdp_tp"]),
    "tp sp": lambda: Sharding(thread_mesh(dp=2, tp=2), RULES["fsdp_tp_sp"]),
    "cp tp sp": lambda: Sharding(virtual_mesh(cp=2, tp=2), RULES["fsdp_tp_sp"]),
}


def batch():
    tokens = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": torch.ones(4, 8)}


def normed(p, h):
    return F.rms_norm(h.float(), h.shape[-1:], p["weight"].float(), 1e-5).to(torch.bfloat16)


def reference(net, params, tokens, stream=torch.float32):
    """The stream after the table and after each layer; parameters and blocks in bf16."""
    h = params["embed"]["token"][tokens].to(stream)
    out = [h]
    for i in range(3):
        p = tree.map(lambda x, i=i: x[i], params["layers"]["0"])
        x = normed(p["attn_norm"], h)
        q, k, v = (torch.einsum("bse,ehd->bhsd", x, p["attn"][name]) for name in "qkv")
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + torch.einsum("bhsd,hde->bse", seen, p["attn"]["o"]).to(stream) * SMALL
        x = normed(p["mlp_norm"], h)
        h = h + ((F.silu(x @ p["mlp"]["gate"]) * (x @ p["mlp"]["up"])) @ p["mlp"]["down"]).to(stream) * SMALL
        out.append(h)
    return out


def streams(measured):
    return [x for name, x in measured.activations.items() if name.endswith(" h")]


def added(hs):
    """What all layers have added, in units of SMALL."""
    return (hs[-1].double() - hs[0].double()) / SMALL


@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_small_steps_are_kept_where_bf16_loses_them(mesh):
    sh = MESHES[mesh]() if mesh in MESHES else SINGLE
    net = gpt(Config(fp32_residual=True, **SIZES))
    params = net.init(random.key(0), torch.bfloat16)
    expected, lost = (reference(net, params, batch()["tokens"], dtype) for dtype in (torch.float32, torch.bfloat16))
    found = measure(net, sh, batch(), dtype=torch.bfloat16)
    hs = streams(found)
    assert len(hs) == 4 and all(x.dtype == torch.float32 for x in hs)
    scale = added(expected).abs().max()
    assert (added(hs) - added(expected)).abs().max() < 0.02 * scale  # bf16 of blocks: 2**-8 a product
    assert (added(lost) - added(expected)).abs().max() > 0.5 * scale
    narrow = measure(gpt(Config(**SIZES)), sh, batch(), dtype=torch.bfloat16)
    assert {x.dtype for x in streams(narrow)} == {torch.bfloat16}
    assert (added(streams(narrow)) - added(expected)).abs().max() > 0.5 * scale


@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_gradients_are_those_of_fp64(mesh):
    """Every leaf's, to the products of bf16, against one device's function of the same weights in fp64."""
    net = gpt(Config(fp32_residual=True, **SIZES | {"residual_multiplier": 1.0}))
    found = measure(net, MESHES[mesh]() if mesh in MESHES else SINGLE, batch(), dtype=torch.bfloat16).grads

    def loss(params):
        value, count = net.loss(params, {name: x if name != "weights" else x.double() for name, x in batch().items()})[0]["ce"]
        return value / count

    exact = tree.to_paths(torch.func.grad(loss)(tree.map(torch.Tensor.double, net.init(random.key(0), torch.bfloat16))))
    found = tree.to_paths(found)
    assert found.keys() == exact.keys()
    for path, g in exact.items():
        assert (found[path].double() - g).norm() < 0.03 * g.norm(), (path, (found[path].double() - g).norm() / g.norm())
