"""Logits and gradients of every family equal transformers' own, from its folders and, in it, from ours; bits go round."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fmegatron import tree
from fmegatron.models import Config, from_hf, gpt, hf, to_hf
from fmegatron.models.hf_configs import config_of, describe
from fmegatron.models.presets import FAMILIES as PRESETS
from fmegatron.models.presets import config
from fmegatron.sharding import RULES, SINGLE, Sharding, abstract_mesh, shard, thread_mesh, unshard, virtual_mesh
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
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
LATENT = {**SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 3,
          "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5,
          "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}}  # fmt: skip
del LATENT["head_dim"]
CASES = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **{**SMALL, "head_dim": 8}, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "qwen3-moe-some": lambda: transformers.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[1], attention_bias=True
    ),
    "deepseek-v2-lite": lambda: transformers.DeepseekV2Config(**LATENT, q_lora_rank=None, first_k_dense_replace=1),
    "deepseek-v2": lambda: transformers.DeepseekV2Config(
        **LATENT, q_lora_rank=7, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=3.0
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **LATENT, q_lora_rank=7, n_group=4, topk_group=2, first_k_dense_replace=1, num_nextn_predict_layers=0
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, rope_parameters=YARN, swiglu_limit=0.1
    ),
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-3.1": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama-yarn": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=YARN),
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
    config._attn_implementation = config._experts_implementation = "eager"  # which knows fp64
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms and biases that do something
        for name, x in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                x.add_(0.2 * torch.randn_like(x))
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
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(tmp_path)
    _, wanted = from_hf(tmp_path, dtype=torch.float64)  # their gradients are a folder too
    grads = torch.func.grad(lambda p: (model.logits(p, tokens) * weight).sum())(params)
    for path, grad in to_paths(grads).items():
        if path.endswith("router.balance"):
            assert not grad.any()
            continue
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
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type = 'dynamic' is not supported"),
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
    file, single, index = (tmp_path / name for name in ("config.json", "model.safetensors", "model.safetensors.index.json"))
    good = file.read_text()
    for hurt, text, message in (
        (file, good[:90], "config.json is damaged: "),
        (file, "[]", "config.json is damaged: it holds no table"),
        (file, json.dumps({k: v for k, v in config.items() if k != "hidden_size"}), "config.json lacks hidden_size"),
        (file, json.dumps(config | {"rope_parameters": 3}), "config.json is not a llama's: "),
        (single, "", "model.safetensors is damaged: "),
        (index, '{"metadata":', "index.json is damaged: "),
        (index, '{"metadata": {}}', "index.json is damaged: it holds no weight_map"),
    ):
        hurt.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            from_hf(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
        file.write_text(good)


# -- out ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    """Their tensors come out of our folder bit for bit, and transformers' logits from it are ours."""
    theirs = saved(tmp_path / "theirs", CASES[name]())
    model, params = from_hf(tmp_path / "theirs")
    to_hf(model, params, tmp_path / "ours", file_bytes=4096)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    want = load_file(tmp_path / "theirs" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in want.values())
    files = [load_file(file) for file in (tmp_path / "ours").glob("*.safetensors")]
    assert all(len(file) == 1 or sum(x.nbytes for x in file.values()) <= 4096 for file in files)
    got = {k: v for file in files for k, v in file.items()}
    assert got.keys() == want.keys() and [k for k in want if not torch.equal(got[k], want[k])] == []

    again, loaded = from_hf(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(params), tree.leaves(loaded), strict=True))
    tokens = torch.randint(1, 53, (2, 11))
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert type(back) is type(theirs) and not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = back.double().eval()(tokens).logits
    assert torch.equal(logits, theirs(tokens).logits)  # the same config too, to the last bit
    assert_close(again.logits(tree.map(torch.Tensor.double, loaded), tokens), logits, "logits")


THEIRS = [f"{family}:{size}" for family, (_, sizes) in PRESETS.items() for size in sizes if family != "gpt"]  # Megatron's own


@pytest.mark.parametrize("name", THEIRS)
def test_every_preset_has_a_config(name):
    plain = describe(config(name))
    text = json.dumps(plain)
    assert describe(config_of(json.loads(text))) == plain
    known = transformers.AutoConfig.for_model(**json.loads(text))  # changes what it is given
    [architecture] = plain["architectures"]
    assert transformers.AutoModelForCausalLM._model_mapping[type(known)].__name__ == architecture


def test_own_settings_are_refused_by_name(tmp_path):
    small = dict(layers=2, embed=8, heads=2, mlp=12, vocab=11)
    for change, message in (
        ({"no_rope": 2}, "no_rope"),
        ({"sink": "one"}, "sink"),
        ({"qk_norm": "l2"}, "qk_norm"),
        ({"logit_softcap": 3.0}, "logit_softcap"),
        ({"activation": "relu2"}, "activation = 'relu2' has no counterpart in a Hugging Face llama"),
        ({"rope_fraction": 0.5}, "rope_fraction = 0.5 has no counterpart in a Hugging Face llama: its config can only say 1.0"),
    ):
        model = gpt(Config(**(small | change)))
        with pytest.raises(ValueError, match=message) as error:
            to_hf(model, model.init(), tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_folder_is_whole_or_absent(tmp_path, monkeypatch):
    model = gpt(Config(layers=2, embed=8, heads=2, mlp=12, vocab=11, vocab_pad=8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        to_hf(model, model.init(), tmp_path / "full")
    params = model.init()
    params["norm"]["weight"] = torch.zeros(5)  # a torn model: fails in the middle of the writing
    with pytest.raises(RuntimeError):
        to_hf(model, params, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    to_hf(model, model.init(), tmp_path / "new", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].shape == (11, 8)  # no pads
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}


MESHES = {
    "fsdp": lambda: Sharding(virtual_mesh(dp=4), RULES["fsdp"]),
    "tp": lambda: Sharding(virtual_mesh(tp=4), RULES["tp"]),  # fewer KV heads than ranks
    "both": lambda: Sharding(thread_mesh(dp=2, tp=2), RULES["fsdp_tp_sp"]),
}


@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
@pytest.mark.parametrize("mesh", MESHES)
def test_from_and_to_a_mesh(mesh, name, tmp_path):
    saved(tmp_path / "theirs", CASES[name]())
    model, whole = from_hf(tmp_path / "theirs", vocab_pad=8)  # 53 tokens in 56 rows
    sh = MESHES[mesh]()
    _, pieces = from_hf(tmp_path / "theirs", sh, vocab_pad=8)
    for path, p in to_paths(model.declare).items():
        here = sh.bind(model.sizes).bind({"layers": p.layers} if p.layers else {})
        true = unshard(SINGLE.bind(here.sizes), to_paths(whole)[path], p.names)
        want = shard(here, true, p.names, "storage")  # the other way to the same pieces
        assert torch.equal(to_paths(pieces)[path], want), path
    to_hf(model, pieces, tmp_path / "ours", sh)
    want, got = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert [k for k in want if not torch.equal(got[k], want[k])] == []


def test_a_rank_reads_its_own_bytes_only(tmp_path, monkeypatch):
    """Rank 1 of an 8-way mesh: what it reads, and what it ever holds, is an eighth of the model and one tensor's slice."""
    model = gpt(Config(layers=4, embed=128, heads=8, mlp=512, vocab=512))
    to_hf(model, model.init(), tmp_path / "hf")
    alone = replace(abstract_mesh(dp=8), kind="device", rank=1, device="cpu")  # loading needs no peers
    read, alive, peak, plain = [], weakref.WeakSet(), [0], hf.Files.read

    def watched(self, name, slices):
        x = plain(self, name, slices)
        read.append(x.nbytes)
        alive.add(x)
        peak[0] = max(peak[0], sum(y.nbytes for y in alive))
        return x

    monkeypatch.setattr(hf.Files, "read", watched)
    _, params = from_hf(tmp_path / "hf", Sharding(alone, RULES["fsdp"]))
    held, total = sum(x.nbytes for x in tree.leaves(params)), 4 * model.count()
    assert sum(read) == held and held == total / 8  # every dim divides; nothing is read twice
    assert peak[0] <= 2 * max(read) < total / 40  # beside the shards: a slice of one tensor, and the one before it
