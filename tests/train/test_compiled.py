"""Compiled blocks on one device: fp64 equals eager to 1e-10, and a kind of layer is compiled once at any depth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from functorch.compile import aot_function, nop
from torch._dynamo.utils import counters

from fmegatron.compiled import Compiled
from fmegatron.models.gpt import Config, gpt
from fmegatron.nn.attention import Attention
from fmegatron.nn.core import attend
from fmegatron.sharding import SINGLE
from fmegatron.testing import assert_max_traces, assert_trees_all_close
from fmegatron.tracing import products_of_bf16
from fmegatron.train.planned import plan_step
from fmegatron.train.step import value_and_grad
from fmegatron.transforms import why_not_compile

torch.set_num_threads(1)


@pytest.mark.long
@pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))
def test_compiled_is_eager_and_traced_once():
    model = gpt(Config(layers=4, embed=16, heads=4, kv=2, mlp=16, vocab=24))
    traced = {node.fn: assert_max_traces(node.fn, 4) for node in model.chain}
    counted = replace(model, chain=tuple(replace(node, fn=traced[node.fn]) for node in model.chain))
    batch = {"tokens": torch.arange(64).reshape(4, 16) % 23}
    params = model.init(0, torch.float64)
    eager, compiled = plan_step(model, SINGLE), plan_step(counted, SINGLE, compile=True, microbatches=2)
    with torch.no_grad():
        expected = value_and_grad(eager, SINGLE.bind(model.sizes), params, batch)
        for watch in (frozenset(), frozenset({"norms", "optimizer"})):  # which no block looks for
            got = value_and_grad(compiled, compiled.sh.watching(watch), params, batch)
    assert_trees_all_close(got[0], expected[0], 1e-10)
    assert compiled.compiled is not None and len(compiled.compiled.graphs) <= 4  # embed, layer, final, loss


@pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))
def test_a_graph_compiled_before_is_found_on_disk():
    def block(wrt, rest):
        return {"y": (wrt["x"] * rest["scale"]).sin()}

    def run():
        out, _, pullback = Compiled().vjp(block, wrt, rest, kind="sine")
        return out["y"], pullback({"y": torch.ones(3, 5)})["x"]

    wrt, rest = {"x": torch.randn(3, 5)}, {"scale": torch.full((5,), 0.3)}
    first = run()
    before = counters["inductor"]["fxgraph_cache_hit"]
    again = run()
    assert counters["inductor"]["fxgraph_cache_hit"] == before + 2  # forward and backward
    assert_trees_all_close(list(again), list(first), 0.0)


@pytest.mark.skipif(not products_of_bf16(), reason="this CPU multiplies bf16 itself: nothing is decomposed")
@pytest.mark.parametrize("attn, masked", [(Attention(0.3), True), (Attention(0.3), False), (Attention(0.3, sink="one"), True)])
def test_attention_in_bf16_as_a_compiled_block_decomposes_it(attn, masked):
    """Windows, documents and narrow values come with a mask, which torch wants in the queries' dtype."""
    q, k, v = (torch.randn(2, 6, 2, 8).bfloat16().requires_grad_() for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)[None, None] if masked else None

    def run(q, k, v, mask=mask):
        return attend(attn, q, k, v, mask)

    traced = aot_function(run, fw_compiler=nop, bw_compiler=nop, decompositions=products_of_bf16())
    found = [(y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))) for y in (traced(q, k, v, mask), run(q, k, v))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02 * b.detach().abs().max().item())
