"""Folders of families with experts: weights in few bits, modules that look ahead, meshes of experts, generation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_layers import MtpModel

from fmegatron import tree
from fmegatron.inference import generate
from fmegatron.models import Config, from_hf, gpt, run_chain, to_hf
from fmegatron.models.hf_configs import describe
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, unshard, virtual_mesh
from fmegatron.testing import assert_mesh_invariant

SIZES = {"layers": 2, "embed": 64, "heads": 4, "kv": 2, "hd": 16, "mlp": 32, "vocab": 40, "init_std": 0.2, "context": 64}
OSS = Config(**SIZES, moe=Moe(4, 2, logit_bias=True), sink="learned", window=8, no_window=2, attention_bias=True,
             attention_out_bias=True, activation="quick_geglu", glu_limit=7.0, glu_offset=1.0, mlp_bias=True)  # fmt: skip
V3 = Config(**{**SIZES, "kv": None, "hd": 24}, rope_hd=8, v_hd=16, kv_lora=24, q_lora=20, rope_interleaved=True, norm_eps=1e-6,
            moe=Moe(8, 3, score="sigmoid", scale=2.5, groups=4, group_top_k=2, group_best=2, balance_bias=True, mlp=20,
                    shared=20, first_dense=1), mtp=1)  # fmt: skip
MIXTRAL = Config(**SIZES, moe=Moe(4, 2), rope_base=1e6)
QWEN3 = Config(**SIZES, moe=Moe(4, 2, mlp=24, layers=(False, True)), qk_norm="norm")
FAMILIES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3, "deepseek_v3": V3, "gpt_oss": OSS}


def random(config, dtype=torch.float32):
    model = gpt(config)
    torch.manual_seed(0)
    return model, tree.map(lambda x: x + 0.1 * torch.randn_like(x), model.init(0, dtype))


def test_mxfp4(tmp_path):
    """As gpt-oss is published: experts packed and transposed; whole, and in the slices that a mesh asks for."""
    model, params = random(OSS)
    to_hf(model, params, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(115, 130, (experts, outer, inner // 32), dtype=torch.uint8)
    save_file(stored, tmp_path / "model.safetensors")
    _, whole = from_hf(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    wanted = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32)
    experts = whole["layers"]["0"]["mlp"]["experts"]
    assert torch.equal(experts["gate"][1], wanted[..., ::2]) and torch.equal(experts["up"][1], wanted[..., 1::2])
    sh = Sharding(virtual_mesh(dp=2, ep=2), RULES["fsdp_tp_sp"])
    _, pieces = from_hf(tmp_path, sh)
    here = sh.bind(model.sizes).bind({"layers": 2})
    for (path, p), x in zip(tree.to_paths(model.declare).items(), tree.leaves(pieces), strict=True):
        assert torch.equal(unshard(here, x, p.names, "storage"), tree.to_paths(whole)[path]), path


def test_fp8(tmp_path):
    """As DeepSeek-V3 is published: a factor for each block of 128 x 128."""
    model, params = random(Config(**{**SIZES, "embed": 192, "mlp": 136}))
    to_hf(model, params, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    packed, factors = stored[name].to(torch.float8_e4m3fn), torch.rand(2, 2) + 0.5
    save_file(stored | {name: packed, f"{name}_scale_inv": factors}, tmp_path / "model.safetensors")
    wanted = packed.float() * factors.repeat_interleave(128, 0)[:136].repeat_interleave(128, 1)[:, :192]
    _, whole = from_hf(tmp_path)
    assert torch.equal(whole["layers"]["0"]["mlp"]["up"][1], wanted.T)
    sh = Sharding(virtual_mesh(dp=4), RULES["fsdp"])
    _, pieces = from_hf(tmp_path, sh)
    x = unshard(sh.bind(model.sizes).bind({"layers": 2}), pieces["layers"]["0"]["mlp"]["up"], "layers embed mlp", "storage")
    assert torch.equal(x, whole["layers"]["0"]["mlp"]["up"])


def test_modules_that_look_ahead_there_and_back(tmp_path):
    """They are numbered behind the layers, as in DeepSeek-V3's files; transformers loads them, and computes the same."""
    model, params = random(V3)
    to_hf(model, params, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["num_nextn_predict_layers"] == 1
    again, loaded = from_hf(tmp_path)
    assert again.config.mtp == 1
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(params), tree.leaves(loaded), strict=True))
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.2.eh_proj.weight"].shape == (64, 128)
    assert "model.layers.2.mlp.experts.7.up_proj.weight" in stored
    beside = ("embed_tokens.weight", "shared_head.head.weight")
    copies = {f"model.layers.2.{name}": stored["lm_head.weight"].clone() for name in beside}
    save_file(stored | copies, tmp_path / "model.safetensors")
    from_hf(tmp_path)  # which the published files have beside

    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]  # it knows 61, of the published model
    main.set_experts_implementation("eager")
    theirs, tokens = MtpModel.from_pretrained(main.eval()).eval(), torch.randint(1, 40, (2, 9))
    h = main.model(tokens).last_hidden_state
    wanted = theirs.forward_layer(0, h, torch.arange(9)[None], None, input_ids=tokens.roll(-1, 1))
    nodes = [node for node in model.chain if not any(name.startswith("loss.") for name in node.writes)]
    data = {"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": torch.ones(2, 9)}
    sh = SINGLE.bind(model.sizes)
    ours = run_chain(model, nodes, params, model.inputs(sh, data), sh=sh)["out.1"]
    torch.testing.assert_close(ours[:, :8], wanted[:, :8], rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))

    kept = {name: x for name, x in stored.items() if not name.startswith("model.layers.2.")}
    save_file(kept, tmp_path / "model.safetensors")
    assert from_hf(tmp_path)[0].config.mtp == 0  # as transformers saves it


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_generates_the_same(family, tmp_path):
    model, params = random(FAMILIES[family])
    assert to_hf(model, params, tmp_path).is_dir()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    prompt = torch.randint(1, 40, (2, 5))
    wanted = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(generate(model, params, prompt, 12, temperature=0), wanted)
    sh = Sharding(virtual_mesh(ep=2, tp=2), RULES["fsdp_tp_sp"])
    _, pieces = from_hf(tmp_path, sh)
    one = generate(from_hf(tmp_path)[0], pieces, prompt, 4, sh=sh, temperature=0)
    assert torch.equal(one, wanted[:, :9])


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_every_mesh_is_one_device(family):
    generator = torch.Generator().manual_seed(1)
    data = {name: torch.randint(0, 40, (4, 8), generator=generator) for name in ("tokens", "labels")}
    data["weights"] = torch.rand(4, 8, generator=generator, dtype=torch.float64)
    shardings = [Sharding(virtual_mesh(ep=2, tp=2), RULES["fsdp_tp_sp"]), Sharding(virtual_mesh(cp=2, ep=2), RULES["cp_ring"])]
    assert_mesh_invariant(gpt(FAMILIES[family]), data, shardings)


@pytest.mark.parametrize("config, said", [
    (replace(MIXTRAL, moe=Moe(4, 2, latent=8)), "moe.latent = 8 has no counterpart in a Hugging Face mixtral"),
    (replace(QWEN3, moe=Moe(4, 2, shared=8)), "moe.shared = 8 has no counterpart in a Hugging Face qwen3_moe"),
    (replace(V3, moe=replace(V3.moe, shared=30)), "moe.shared = 30 has no counterpart in a Hugging Face deepseek_v3"),
    (replace(V3, moe=None, mtp=0, rope_interleaved=False), "kv_lora = 24 has no counterpart in a Hugging Face llama"),
])  # fmt: skip
def test_experts_of_ones_own_are_refused_by_name(config, said):
    with pytest.raises(ValueError, match=said):
        describe(config)
