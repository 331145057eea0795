"""Latent attention: one device's on every mesh, absorbed equals naive, what is kept while training and generating."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from functorch.compile import aot_function, nop

from fmegatron import tree
from fmegatron.inference import generate
from fmegatron.inference.decode import Decoder
from fmegatron.models import Config, gpt
from fmegatron.models.config import kinds
from fmegatron.models.model import node_params, run_chain
from fmegatron.nn import attention
from fmegatron.nn.rope import Yarn
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, virtual_mesh
from fmegatron.testing import assert_mesh_invariant, assert_same, measure
from fmegatron.train.planned import plan_step
from fmegatron.train.remat import Remat

YARN = Yarn(factor=4.0, context=8, mscale=0.7, mscale_all=0.9)
CONFIG = Config(layers=2, embed=16, heads=4, hd=12, rope_hd=4, v_hd=6, kv_lora=8, q_lora=10, mlp=24, vocab=29, vocab_pad=8,
                context=32, init_std=0.3, rope_interleaved=True, rope_scaling=YARN)  # fmt: skip
CASES = {
    "tp": ({"tp": 2}, "tp", CONFIG),
    "fsdp_tp_sp": ({"dp": 2, "tp": 2}, "fsdp_tp_sp", replace(CONFIG, q_lora=None)),
    "ring": ({"cp": 2, "tp": 2}, "cp_ring", CONFIG),
    "ulysses": ({"cp": 2}, "cp_ulysses", CONFIG),
}


def batch(rows=4, length=8):
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 29, (rows, length), generator=g) for _ in range(2))
    documents = (torch.arange(length) >= 5).long().expand(rows, length)
    weights = torch.rand(rows, length, generator=g, dtype=torch.float64)
    return {"tokens": tokens, "labels": labels, "weights": weights, "documents": documents}


@pytest.mark.parametrize("case", CASES)
def test_every_mesh_is_one_device(case):
    mesh, rules, config = CASES[case]
    assert_mesh_invariant(gpt(config), batch(), [Sharding(virtual_mesh(**mesh), RULES[rules])])


def parameters(config, dtype=torch.float64):
    model = gpt(config)
    return model, tree.map(lambda x: x + 0.1 * torch.randn(x.shape, dtype=dtype), model.init(0, dtype))


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, q_lora=None, attention_softcap=2.0)])
def test_generating_from_latents_is_the_models_own(config):
    model, params = parameters(config)
    prompt = torch.randint(0, 29, (2, 6))
    decoder = Decoder(model, params, SINGLE.bind(model.sizes).decoding(), 16)
    tokens, logits = prompt, decoder(prompt)
    for _ in range(5):  # the first from keys and values, the others absorbed
        torch.testing.assert_close(logits, model.logits(params, tokens)[:, -1], rtol=1e-12, atol=1e-12)
        new = logits.argmax(-1, keepdim=True)
        tokens, logits = torch.cat([tokens, new], 1), decoder(new)
    assert torch.equal(generate(model, params, prompt, 5, temperature=0), tokens)
    held = [sum(x[0].numel() for x in cache.held) for cache in decoder.caches]
    assert held[1:3] == [16 * (8 + 4)] * 2  # kv_lora + rope_hd a token, whatever the heads


def test_generating_on_a_mesh():
    model, params = parameters(CONFIG)
    prompt = torch.randint(0, 29, (2, 6))
    sh = Sharding(virtual_mesh(dp=2, tp=2), RULES["fsdp_tp_sp"]).bind({**model.sizes, "layers": 2})
    shards = tree.map(lambda p, x: shard(sh, x[: p.true_shape(model.sizes)[0]], p.names, "storage"), model.declare, params)
    one = generate(model, params, prompt, 5, temperature=0)
    assert torch.equal(one, generate(model, shards, prompt, 5, sh=sh, temperature=0))


def test_the_up_projection_again():
    """remat mla_up: the same numbers on a mesh, and nothing as wide as heads is kept."""
    wide = replace(CONFIG, heads=16, layers=1, rope_scaling=None)
    model, params = parameters(wide, torch.float32)
    whole = batch() | {"weights": torch.ones(4, 8)}
    sh = Sharding(virtual_mesh(cp=2, tp=2), RULES["cp_ring"])
    assert_same(measure(model, sh, whole, remat="selective:mla_up"), measure(model, sh, whole), 1e-6)

    def kept(remat):
        plan, seen = plan_step(model, SINGLE, remat=remat), {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x
            return x

        sh, own = plan.sh, model.chain[1]
        values = run_chain(model, model.chain[:1], params, model.inputs(sh, whole), sh=sh)
        p = tree.map(lambda x: x.requires_grad_(), node_params(own, model.declare, params)["attn"])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention.apply(sh, kinds(wide)[0], p, values["h"].requires_grad_(), values, None)
        inputs = {x.untyped_storage().data_ptr() for x in (*tree.leaves(p), *values.values())}
        return sum(x.untyped_storage().nbytes() for at, x in seen.items() if at not in inputs)

    heads = 4 * 8 * 16 * 4  # bytes of one feature of all heads
    assert kept("none") >= heads * (2 * 12 + 2 * 6)  # queries, keys, values, output
    assert kept("selective:mla_up") <= heads * 6 + 4 * 8 * 4 * (10 + 2 * 12 + 12 + 12 + 8)  # output, latents, norms


def test_a_latent_refuses_what_it_has_not():
    for change, said in (({"qk_norm": "norm"}, "qk_norm = 'norm' is of plain attention"), ({"kv": 2}, "kv = 2 is of plain"),
                         ({"rope_hd": 12}, "rope_hd = 12 features of hd = 12 turn")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            replace(CONFIG, **change)


@pytest.mark.parametrize("parts", [("mla_up",), pytest.param((), marks=pytest.mark.long)])
def test_a_traced_layer_equals_the_eager_one(parts):
    """Under the tracer of transforms.Compiled, in a module that looks ahead: nothing looks at values."""
    model, params = parameters(replace(CONFIG, mtp=1))
    sh = SINGLE.bind(model.sizes).recomputing(Remat(parts=parts).recompute)
    data = batch()
    values = run_chain(model, model.chain[:1], params, model.inputs(sh, data), sh=sh)
    for node in (node for node in model.chain if node.mtp):
        values = run_chain(model, model.chain[1 : model.chain.index(node)], params, values, sh=sh)
        own = node_params(node, model.declare, params)
        reads = {name: values[name] for name in node.reads if name in values}

        def run(own, reads, node=node):
            return sum(x.sin().sum() for x in node.fn(sh, own, reads, None).values() if x.is_floating_point())

        first, second = (tree.map(lambda x: x.detach().clone().requires_grad_(), own) for _ in range(2))
        a, b = aot_function(run, fw_compiler=nop, bw_compiler=nop)(first, reads), run(second, reads)
        torch.testing.assert_close(a, b)
        for x, y in zip(torch.autograd.grad(a, tree.leaves(first)), torch.autograd.grad(b, tree.leaves(second)), strict=True):
            torch.testing.assert_close(x, y)
