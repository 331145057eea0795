"""Logits and gradients of every family, as read from a folder that transformers wrote, equal transformers' own."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fmegatron.models import from_hf
from fmegatron.sharding import RULES, Sharding, unshard, virtual_mesh
from fmegatron.tree import to_paths

SMALL = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=53,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    head_dim=6,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-3.1": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama-linear": lambda: transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    ),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**{**SMALL, "head_dim": 8}, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, sliding_window=4, query_pre_attn_scalar=7),
    "gpt2": lambda: transformers.GPT2Config(n_embd=24, n_layer=3, n_head=4, vocab_size=53, n_positions=64),
    "gpt2-depth": lambda: transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=4, vocab_size=53, n_positions=64, scale_attn_by_inverse_layer_idx=True
    ),
}


def saved(folder, config, **options):
    """A random model of a config, in fp64, and the folder that it was saved to in fp32."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms and biases that do something
    theirs.save_pretrained(folder, **options)
    return theirs.double()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    theirs = saved(tmp_path, CASES[name]())
    model, params = from_hf(tmp_path, dtype=torch.float64)
    tokens = torch.randint(1, 53, (2, 11))  # 0 is their padding: without gradient
    want = theirs(tokens).logits
    assert_close(model.logits(params, tokens), want, "logits")

    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    save_file({name: p.grad.contiguous() for name, p in theirs.named_parameters()}, tmp_path / "model.safetensors")
    _, wanted = from_hf(tmp_path, dtype=torch.float64)  # their gradients are a folder too
    grads = torch.func.grad(lambda p: (model.logits(p, tokens) * weight).sum())(params)
    for path, grad in to_paths(grads).items():
        assert_close(grad, to_paths(wanted)[path], path)


def assert_close(ours, theirs, what):
    """To 1e-5 of the largest entry: transformers has norms and rotations in fp32. Some gradients are truly 0."""
    error = (ours - theirs).abs().max().item()
    assert error <= 1e-5 * theirs.abs().max().item() + 1e-12, what


def test_files_in_parts_and_a_mesh(tmp_path):
    saved(tmp_path, CASES["llama-biases"](), max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, whole = from_hf(tmp_path)
    sh = Sharding(virtual_mesh(dp=2), RULES["fsdp"])
    model, pieces = from_hf(tmp_path, sh)
    sh = sh.bind(model.sizes)
    for path, p in to_paths(model.declare).items():
        assert torch.equal(unshard(sh, to_paths(pieces)[path], p.names, "storage"), to_paths(whole)[path]), path


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no config.json here"):
        from_hf(tmp_path)
    saved(tmp_path, CASES["llama"]())
    config = json.loads((tmp_path / "config.json").read_text())

    def with_config(**changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))

    for changes, message in (
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"hidden_act": "tanh"}, "hidden_act = 'tanh' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn' is not supported"),
        ({"vocab_size": 54}, r"has shape \[53, 24\], but this config asks for \[54, 24\]"),
        ({"attention_bias": True}, "k_proj.bias is missing"),
        ({"num_hidden_layers": 2}, "9 tensors have no place in this model, the first is model.layers.2."),
    ):
        with_config(**changes)
        with pytest.raises(ValueError, match=message):
            from_hf(tmp_path)
    with_config()
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is missing"):
        from_hf(tmp_path)
