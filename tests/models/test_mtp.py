"""Multi-token prediction: transformers' own modules, masks at ends, one device's on every mesh and every cut of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fmegatron import tree
from fmegatron.inference import generate
from fmegatron.models import Config, from_hf, gpt, mtp
from fmegatron.sharding import RULES, SINGLE, Sharding, virtual_mesh
from fmegatron.testing import assert_mesh_invariant, assert_same, measure
from fmegatron.train.pipeline.layout import parse_layout
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline

CONFIG = Config(layers=2, embed=16, heads=4, kv=2, mlp=24, vocab=29, vocab_pad=8, context=32, mtp=2, init_std=0.2)


def batch(rows=4, length=8):
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 29, (rows, length), generator=g) for _ in range(2))
    documents = torch.stack([(torch.arange(length) >= cut).long() for cut in (5, 3, 8, 6)])[:rows]
    weights = torch.rand(rows, length, generator=g, dtype=torch.float64)
    return {"tokens": tokens, "labels": labels, "weights": weights, "documents": documents}


def test_what_stands_ahead():
    data = batch()
    values = mtp.inputs(CONFIG, SINGLE.bind(CONFIG.sizes), data)
    for row in range(4):
        for i in range(8):
            for k in (1, 2):
                inside = i + k < 8 and data["documents"][row, i + k] == data["documents"][row, i]
                want = {name: x[row, i + k] if inside else None for name, x in data.items()}
                assert values[f"weights.{k}"][row, i] == (want["weights"] if inside else 0)
                if inside:
                    assert all(values[f"{name}.{k}"][row, i] == want[name] for name in ("tokens", "labels"))
    order = torch.tensor([0, 7, 1, 6, 2, 5, 3, 4])
    mixed = {name: x[:, order] for name, x in data.items()} | {"order": order.expand(4, 8)}
    for name, x in mtp.inputs(CONFIG, SINGLE.bind(CONFIG.sizes), mixed).items():
        if name[-1].isdigit():
            assert torch.equal(x, values[name][:, order]), name


CASES = {
    "tp": ({"tp": 2}, "tp"),
    "fsdp_tp_sp": ({"dp": 2, "tp": 2}, "fsdp_tp_sp"),
    "zigzag": ({"cp": 2, "tp": 2}, "cp_ring"),
    "cp": ({"cp": 4}, "fsdp"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_mesh_is_one_device(case):
    mesh, rules = CASES[case]
    config = replace(CONFIG, tied=case == "tp", loss_chunks=2, layers=1)
    sharding = Sharding(virtual_mesh(**mesh), RULES[rules])
    assert_mesh_invariant(gpt(config), batch(), [sharding], microbatches=2 if case == "cp" else 1)


@pytest.mark.parametrize("layout", [None, "Et|tmmL", "Ett|mmL", "E|tt|mm|L"])
def test_pipelines(layout):
    stages = 2 if layout is None else layout.count("|") + 1
    pipeline = Pipeline(make_schedule("1f1b", stages, None, 4), layout and parse_layout(layout))
    model, whole = gpt(CONFIG), measure(gpt(CONFIG), SINGLE, batch())
    got = measure(model, SINGLE, batch(), expected=whole, pipeline=pipeline, remat="full")
    assert_same(replace(got, activations=whole.activations), whole, 1e-12)
    with pytest.raises(ValueError, match="layout Et|tmL has 1 m, and the model 2 layers of multi-token prediction"):
        measure(model, SINGLE, batch(), pipeline=Pipeline(make_schedule("1f1b", 2, None, 4), parse_layout("Et|tmL")))


def test_transformers_has_the_same_modules(tmp_path):
    """Module 2 reads what module 1 made; theirs are given ours' weights, and both the whole sequence."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_layers import MtpLayer
    from transformers.models.llama import modeling_llama as llama

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 29}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2)
    config._attn_implementation = "eager"
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    theirs.save_pretrained(tmp_path)
    base, main = from_hf(tmp_path, dtype=torch.float64)
    model = gpt(replace(base.config, mtp=2))
    params = {**model.init(3, torch.float64), **main}
    data = {name: x for name, x in batch().items() if name != "documents"}
    terms, _ = model.loss(params, data)

    h = theirs.model(data["tokens"]).last_hidden_state
    for k in (1, 2):
        layer = MtpLayer(config, llama.LlamaDecoderLayer, llama.LlamaRMSNorm, 0).double()
        own = tree.map(lambda x, k=k: x[k - 1], params["mtp"]["0"])
        attn, forward = own["layer"]["attn"], own["layer"]["mlp"]
        with torch.no_grad():
            for there, here in {
                layer.eh_proj: own["proj"].T,
                layer.mtp_block.self_attn.q_proj: attn["q"].flatten(1).T,
                layer.mtp_block.self_attn.k_proj: attn["k"].flatten(1).T,
                layer.mtp_block.self_attn.v_proj: attn["v"].flatten(1).T,
                layer.mtp_block.self_attn.o_proj: attn["o"].flatten(0, 1).T,
                layer.mtp_block.mlp.gate_proj: forward["gate"].T,
                layer.mtp_block.mlp.up_proj: forward["up"].T,
                layer.mtp_block.mlp.down_proj: forward["down"].T,
            }.items():
                there.weight.copy_(here)
        ahead, places = theirs.model.embed_tokens(data["tokens"].roll(-k, 1)), torch.arange(8)[None] + k
        mask = torch.full((8, 8), float("-inf")).triu(1)[None, None]
        h = layer(ahead, h, theirs.model.rotary_emb(h, places), mask, places, None)
        nats = torch.nn.functional.cross_entropy(theirs.lm_head(h).flatten(0, 1), data["labels"].roll(-k, 1).flatten(),
                                                 reduction="none").reshape(4, 8)  # fmt: skip
        weights = data["weights"].roll(-k, 1)
        weights[:, 8 - k :] = 0
        torch.testing.assert_close(terms[f"mtp_{k}"][0], 0.1 / 2 * (nats * weights).sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(terms[f"mtp_{k}"][1], weights.sum())


def test_generation_leaves_it_out():
    model, plain = gpt(CONFIG), gpt(replace(CONFIG, mtp=0))
    params = model.init(0)
    without = {name: x for name, x in params.items() if name != "mtp"}
    tokens = torch.randint(0, 29, (2, 5))
    assert torch.equal(generate(model, params, tokens, 4, temperature=0), generate(plain, without, tokens, 4, temperature=0))
    assert torch.equal(model.logits(params, tokens), plain.logits(without, tokens))
    with pytest.raises(ValueError, match="mtp = 2 with learned positions"):
        replace(CONFIG, positions="learned")
