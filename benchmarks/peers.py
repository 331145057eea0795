"""The participants: each is a function (shape, dtype) -> step, where step() trains once and returns the loss as a float.

fmegatron       make_step: compiled without remat, with full remat, and eager
module          a plain nn.Module; torch.compile of the model with its loss; fused AdamW; clip_grad_norm_
transformers    LlamaForCausalLM, compiled and eager; the same optimizer
jax             jit over everything, scan over layers, optax.adamw, donated buffers

bf16 is, for all, bf16 copies of fp32 master weights made once a step, gradients brought back to fp32, an fp32 AdamW.
In torch, where a module owns its weights, that is a bf16 module beside the masters, as Megatron-LM keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

from shapes import ADAMW as A
from shapes import Shape, tokens, weights

Step = Callable[[], float]


# -- fmegatron ------------------------------------------------------------------------------------------------------
def fmegatron(shape: Shape, dtype: str, compile: bool, remat: str) -> Step:
    """This library."""
    import torch

    from fmegatron import optim
    from fmegatron.models.config import Config
    from fmegatron.models.gpt import gpt
    from fmegatron.programs import Programs
    from fmegatron.sharding import SINGLE
    from fmegatron.train.state import init
    from fmegatron.train.step import make_step

    s, w = shape, {name: torch.from_numpy(x) for name, x in weights(shape).items()}
    chunks = max(1, s.batch * s.seq // 2048)  # shorter pieces cost a pass over the table's gradient each: a tenth of the step
    config = Config(s.layers, s.embed, s.heads, s.mlp, s.vocab, kv=s.kv, norm_eps=1e-5, loss_chunks=chunks)
    model = gpt(config)
    n, e, hd = s.layers, s.embed, s.hd
    attn = {"q": w["q"].view(n, e, -1, hd), "k": w["k"].view(n, e, -1, hd), "v": w["v"].view(n, e, -1, hd)}
    layers = {
        "attn": attn | {"o": w["o"].view(n, -1, hd, e)},
        "attn_norm": {"weight": w["attn_norm"]},
        "mlp": {name: w[name] for name in ("gate", "up", "down")},
        "mlp_norm": {"weight": w["mlp_norm"]},
    }
    params = {"embed": {"token": w["embed"]}, "layers": {"0": layers}, "norm": {"weight": w["norm"]}}
    params["head"] = {"weight": w["head"]}
    adamw = optim.adamw(A["lr"], (A["b1"], A["b2"]), A["eps"], A["decay"], mask=lambda path, leaf: True)
    tx = optim.chain(optim.clip_by_global_norm(A["clip"]), adamw)
    state = init(model, tx, SINGLE, params=params)
    compute = torch.bfloat16 if dtype == "bf16" else None
    programs = Programs.of(config, A, remat, dtype)
    train = make_step(model, tx, SINGLE, donate=True, compile=compile, remat=remat, dtype=compute, programs=programs)
    batch = {name: torch.from_numpy(x) for name, x in zip(("tokens", "labels"), tokens(shape), strict=True)}

    def step() -> float:
        nonlocal state
        state, metrics = train(state, batch)
        return float(metrics["loss"])

    return step


# -- torch modules --------------------------------------------------------------------------------------------------
def module(shape: Shape, dtype: str) -> Step:
    """A Llama as one writes it by hand (llama.py), compiled whole."""
    import torch
    from llama import Llama

    s = shape
    sizes: Any = SimpleNamespace(
        layers=s.layers, embed=s.embed, heads=s.heads, kv=s.kv, head_dim=s.hd, mlp=s.mlp, vocab=s.vocab, norm_eps=1e-5,
        rope_base=10000.0, tied=False, moe=None, block_mlp=SimpleNamespace(gated=True),
    )  # fmt: skip
    places = {name: name for name in ("attn_norm", "mlp_norm", "q", "k", "v", "o")}
    places |= {name: f"mlp.{name}" for name in ("gate", "up", "down")}
    llama = Llama(sizes)
    fill(llama, shape, "layers.{i}.{name}.weight", places, {"embed": "embed", "norm": "norm", "head": "head"})
    return with_adamw(llama, torch.compile, lambda model, ids, labels: model(ids, labels), shape, dtype)


def transformers(shape: Shape, dtype: str, compile: bool) -> Step:
    """LlamaForCausalLM."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.embed, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv, rms_norm_eps=1e-5, attn_implementation="sdpa",
        max_position_embeddings=shape.seq, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    inner = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    inner |= {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    ends = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    fill(llama, shape, "model.layers.{i}.{name}.weight", inner, ends)

    def loss(model: Any, ids: Any, labels: Any) -> Any:
        return model(input_ids=ids, labels=labels, shift_labels=labels).loss

    return with_adamw(llama, torch.compile if compile else lambda model: model, loss, shape, dtype)


def fill(model: Any, shape: Shape, pattern: str, inner: dict[str, str], ends: dict[str, str]) -> None:
    """Copy the common weights into a module whose matrices are [out, in]."""
    import torch

    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, w in weights(shape).items():
            x = torch.from_numpy(w)
            if name in ends:
                own.pop(f"{ends[name]}.weight").copy_(x)
                continue
            for i in range(shape.layers):
                own.pop(pattern.format(i=i, name=inner[name])).copy_(x[i].t() if x.dim() == 3 else x[i])
    assert not own, f"weights without a value: {list(own)}"


def with_adamw(model: Any, compile: Callable[[Any], Any], loss_of: Callable[..., Any], shape: Shape, dtype: str) -> Step:
    """torch's own optimizer around a module: fused AdamW, gradients clipped by foreach, masters in fp32."""
    import torch

    ids, labels = (torch.from_numpy(x) for x in tokens(shape))
    working = list(model.parameters())
    masters = working
    if dtype == "bf16":
        masters = [torch.nn.Parameter(p.detach().clone()) for p in working]
        model.to(torch.bfloat16)
    compiled = compile(model)
    betas, decay = (A["b1"], A["b2"]), A["decay"]
    opt = torch.optim.AdamW(masters, lr=A["lr"], betas=betas, eps=A["eps"], weight_decay=decay, fused=True)

    def step() -> float:
        if masters is not working:
            with torch.no_grad():
                torch._foreach_copy_(working, masters)
        loss = loss_of(compiled, ids, labels)
        loss.backward()
        if masters is not working:
            for master, p in zip(masters, working, strict=True):
                master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, A["clip"], foreach=True)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


# -- jax ------------------------------------------------------------------------------------------------------------
def jax(shape: Shape, dtype: str) -> Step:
    """The same in jax and optax."""
    import os

    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_compilation_cache_dir", os.environ["TORCHINDUCTOR_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    s, compute = shape, jnp.bfloat16 if dtype == "bf16" else jnp.float32
    angles = jnp.arange(s.seq)[:, None, None] / 10000.0 ** (jnp.arange(0, s.hd, 2, dtype=jnp.float32) / s.hd)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def norm(x: Any, weight: Any) -> Any:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5) * weight).astype(x.dtype)

    def rotate(x: Any) -> Any:
        a, b = jnp.split(x.astype(jnp.float32), 2, -1)
        return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1).astype(x.dtype)

    def layer(h: Any, p: Any) -> Any:
        x = norm(h, p["attn_norm"])
        q, k, v = ((x @ p[name]).reshape(s.batch, s.seq, -1, s.hd) for name in "qkv")
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        h = h + y.reshape(s.batch, s.seq, -1) @ p["o"]
        x = norm(h, p["mlp_norm"])
        return h + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

    def loss_of(params: Any, ids: Any, labels: Any) -> Any:
        p = jax.tree.map(lambda x: x.astype(compute), params)
        h, _ = jax.lax.scan(layer, p["embed"][ids], {name: x for name, x in p.items() if name not in ENDS})
        logits = (norm(h, p["norm"]) @ p["head"].T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    adamw = optax.adamw(A["lr"], A["b1"], A["b2"], A["eps"], weight_decay=A["decay"])
    tx = optax.chain(optax.clip_by_global_norm(A["clip"]), adamw)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(params: Any, opt: Any, ids: Any, labels: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, ids, labels)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    params = jax.tree.map(jnp.array, weights(shape))
    opt = tx.init(params)
    ids, labels = map(jnp.array, tokens(shape))

    def step() -> float:
        nonlocal params, opt
        params, opt, loss = train(params, opt, ids, labels)
        jax.block_until_ready(params)
        return float(loss)

    return step


ENDS = ("embed", "norm", "head")
PEERS = MappingProxyType(
    {
        "fmegatron": partial(fmegatron, compile=True, remat="none"),
        "fmegatron remat": partial(fmegatron, compile=True, remat="full"),
        "fmegatron eager": partial(fmegatron, compile=False, remat="none"),
        "module compiled": module,
        "transformers compiled": partial(transformers, compile=True),
        "transformers eager": partial(transformers, compile=False),
        "jax": jax,
    }
)
TORCH = ("module compiled", "transformers compiled", "transformers eager")
