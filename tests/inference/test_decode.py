"""Generation: cached equals uncached for every option of the decoder, transformers agrees, draws have the right odds."""

from __future__ import annotations

import pytest
import torch

from fmegatron import random
from fmegatron.inference import draw, generate, stream
from fmegatron.models import Config, from_hf, gpt
from fmegatron.sharding import RULES, Sharding, virtual_mesh
from fmegatron.sharding.shard_map import spmd
from fmegatron.train.leaves import plan_leaves
from fmegatron.train.state import init_params

SIZES = {"layers": 3, "embed": 24, "heads": 4, "kv": 2, "mlp": 40, "vocab": 50, "context": 64, "init_std": 0.3}
KINDS = {
    "llama": {},
    "gpt2": {"positions": "learned", "norm": "layer", "attention_bias": True, "mlp_bias": True, "kv": 4, "tied": True},
    "window": {"window": 5, "no_window": 2},
    "gemma2": {"window": 4, "no_window": 2, "attention_softcap": 5.0, "logit_softcap": 3.0, "norm_at": "peri"},
    "sink": {"sink": "learned", "qk_norm": "norm"},
    "no rope, padded vocabulary": {"no_rope": 2, "vocab_pad": 16, "kv": 1, "qk_layer_scaling": True},
    "dropout is off": {"hidden_dropout": 0.5, "attention_dropout": 0.5, "rope_interleaved": True, "rope_fraction": 0.5},
}


def model_of(kind: str):
    model = gpt(Config(**{**SIZES, **KINDS[kind]}))
    return model, model.init(3, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_uncached_is_the_models_own_logits(kind):
    model, params = model_of(kind)
    prompt = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    cached = generate(model, params, prompt, 12, temperature=0)
    assert torch.equal(cached, generate(model, params, prompt, 12, temperature=0, cached=False))
    tokens = prompt
    for _ in range(12):
        tokens = torch.cat([tokens, model.logits(params, tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, tokens)
    assert len(set(cached[:, 7:].flatten().tolist())) > 3  # not one token for ever
    drawn = generate(model, params, prompt, 12, seed=5, top_k=20, top_p=0.9)
    assert torch.equal(drawn, generate(model, params, prompt, 12, seed=5, top_k=20, top_p=0.9, cached=False))
    assert not torch.equal(drawn, generate(model, params, prompt, 12, seed=6, top_k=20, top_p=0.9))
    assert torch.equal(torch.stack(list(stream(model, params, prompt, 12, seed=5, top_k=20, top_p=0.9)), 1), drawn[:, 7:])


@pytest.mark.parametrize("kind, tp", [("llama", 2), ("window", 2), ("gpt2", 2), ("no rope, padded vocabulary", 4)])
def test_tensor_parallel(kind, tp):
    model, params = model_of(kind)
    sh = Sharding(virtual_mesh(dp=2, tp=tp), RULES["fsdp_tp_sp"]).bind(model.sizes)
    leaves = plan_leaves(model, sh)
    shards = spmd(sh, lambda here, x: init_params(model, here, leaves, random.key(3), torch.float64))(torch.zeros(2 * tp))
    prompt = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    for settings in ({"temperature": 0}, {"seed": 2}):
        one = generate(model, params, prompt, 6, **settings)
        assert torch.equal(one, generate(model, shards, prompt, 6, sh=sh, **settings))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_generates_the_same(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=60, num_key_value_heads=2, initializer_range=0.3, **sizes)
        )
    else:
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        )
    theirs.save_pretrained(tmp_path)
    model, params = from_hf(tmp_path)
    prompt = torch.randint(1, 60, (2, 5))
    wanted = theirs.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(generate(model, params, prompt, 20, temperature=0), wanted)


def test_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    drawn = draw.draw(logits, random.key(1), temperature=2.0).bincount(minlength=4) / 20000
    assert (drawn - (logits[0] / 2).softmax(0)).abs().max() < 0.015
    top = draw.draw(logits, random.key(1), top_k=2).bincount(minlength=4) / 20000
    wanted = logits[0, :2].softmax(0)
    assert (top[:2] - wanted).abs().max() < 0.015 and top[2:].sum() == 0
    assert set(draw.draw(logits, random.key(1), top_p=0.7).tolist()) == {0, 1}  # 0.64 alone is not enough
    assert set(draw.draw(logits, random.key(1), top_p=0.6).tolist()) == {0}
    assert set(draw.draw(logits, random.key(1), top_p=1e-9).tolist()) == {0}
    assert set(draw.draw(logits, random.key(1), temperature=0).tolist()) == {0}


@pytest.mark.parametrize("settings, said", [
    ({"temperature": -1}, "temperature -1"),
    ({"top_k": 0}, "top_k 0"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"steps": 60}, "7 tokens and 60 more are beyond the model's 64 positions: ask for 57 at most"),
])
def test_mistakes(settings, said):
    model, params = model_of("gpt2")
    with pytest.raises(ValueError, match=said):
        generate(model, params, torch.zeros(1, 7, dtype=torch.int64), **{"steps": 1, **settings})
