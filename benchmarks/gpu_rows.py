"""What one GPU trains, and who trains it: rows of models, and participants that may sleep between their turns.

A participant wakes up with the same parameters as all others, steps, and sleeps: its state goes, what it compiled stays, so
that models that fill a GPU are raced in turns. bf16 is, for all, bf16 copies of fp32 masters made once a step, gradients
brought back to fp32, an fp32 AdamW behind a clip of the global norm.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import llama
import torch
from shapes import ADAMW as A
from torch import Tensor

from fmegatron import optim, random
from fmegatron.kernels.quantize import recipe
from fmegatron.models import Config, Model
from fmegatron.models.gpt import gpt
from fmegatron.models.lower import lower
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, Sharding, make_mesh
from fmegatron.train.graphs import CudaGraphs, Graphed
from fmegatron.train.leaves import plan_leaves
from fmegatron.train.state import init, init_params
from fmegatron.train.step import make_step


@dataclass(frozen=True)
class Row:
    """A model and a batch of it, by whom; the first named is what others are held against. seconds: that it may well take.

    grows: layers are added to it, as many as fit. whole: the module is compiled whole, not by the layer. piece: tokens whose
    logits exist at once, for all.
    """

    name: str
    config: Config
    batch: int
    seq: int
    who: tuple[str, ...]
    seconds: float
    grows: bool = False
    whole: bool = False
    piece: int = 2048

    @property
    def pieces(self) -> int:
        """Of the sequence, whose logits exist one after the other."""
        return max(1, self.batch * self.seq // self.piece)

    @property
    def tiny(self) -> Row:
        """The same, too small to measure anything."""
        c = self.config
        moe = None if c.moe is None else replace(c.moe, experts=4, top_k=2, mlp=16)
        kv = None if c.kv is None else 2
        small = replace(c, layers=2, embed=32, heads=4, kv=kv, mlp=64, vocab=256, moe=moe)
        return replace(self, config=small, batch=2, seq=32, grows=False, piece=32)


def rows() -> list[Row]:
    """In order of worth: what does not fit into the time is left out from the end."""
    ours, triton, graphs, low = (f"fmegatron{kind}" for kind in ("", " triton", " graphs", " fp8"))
    peers = ("module", "transformers")
    # Megatron-LM's published row; 12 layers embed^2 and two tables of the vocabulary are 1.7B without a gate
    c1700 = Config(24, 2048, 16, 8192, 131072, activation="gelu")
    c8000 = Config(1, 4096, 32, 14336, 128256, kv=8)  # Llama 3 8B's layers
    c1100 = Config(22, 2048, 32, 5632, 32000, kv=4)  # TinyLlama
    c125 = Config(12, 768, 12, 2048, 50304, tied=True)
    few = Config(12, 1024, 16, 4096, 32768, kv=4, moe=Moe(32, 4, mlp=768))
    return [
        Row("1.7B", c1700, 4, 4096, (ours, "module", triton, graphs, low), 170),
        Row("8B stack", c8000, 2, 4096, (ours, triton, low, *peers), 130, grows=True),
        Row("MoE 1B, 32 experts top 4", few, 8, 2048, (ours, "module"), 60),
        Row("1B", c1100, 8, 2048, (ours, *peers), 70),
        Row("125M", c125, 32, 1024, (ours, *peers, graphs), 80, whole=True),
    ]


@dataclass(frozen=True)
class Participant:
    """wake: the state before the first step; step: one step, the loss as a 0-D tensor; sleep: the state goes."""

    wake: Callable[[], None]
    step: Callable[[], Tensor]
    sleep: Callable[[], None]


def tokens(row: Row, device: str) -> tuple[Tensor, Tensor]:
    """Tokens and the labels of each position, int64 [batch, seq]."""
    text = torch.randint(row.config.vocab, (row.batch, row.seq + 1), generator=torch.Generator().manual_seed(1))
    return text[:, :-1].contiguous().to(device), text[:, 1:].contiguous().to(device)


def draw(model: Model, device: str) -> Any:
    """fp32 parameters, the same on every call."""
    sh = sharding(device).bind(model.sizes)
    with torch.no_grad():
        return init_params(model, sh, plan_leaves(model, sh), random.key(0).to(device), torch.float32)


def sharding(device: str) -> Sharding:
    """One device."""
    return Sharding(make_mesh(device), RULES["fsdp_tp_sp"])


# -- this library ---------------------------------------------------------------------------------------------------
def fmegatron(
    row: Row, device: str, compile: bool, fp8: bool = False, kernels: str = "reference", graphs: bool = False
) -> Participant:
    """make_step, its state donated; graphs: recorded after two steps. Raises ValueError for what a device has not."""
    if graphs and device != "cuda":
        raise ValueError(f"graphs are CUDA's, not for {device}")
    model = plain = gpt(replace(row.config, loss_chunks=row.pieces))
    if fp8:
        model = lower(model, {"layers.*": recipe("tensorwise")})
        kernels = "triton" if device == "cuda" else kernels  # scaled_mm is one of them
    adamw = optim.adamw(A["lr"], (A["b1"], A["b2"]), A["eps"], A["decay"], mask=lambda path, leaf: True)
    tx = optim.chain(optim.clip_by_global_norm(A["clip"]), adamw)
    sh = sharding(device)
    train: Any = make_step(model, tx, sh, donate=True, compile=compile, dtype=torch.bfloat16, kernels=kernels)
    batch = dict(zip(("tokens", "labels"), tokens(row, device), strict=True))
    held: dict[str, Any] = {}

    def wake() -> None:
        held["state"] = init(model, tx, sh, params=draw(plain, device))
        held["train"] = Graphed(train, CudaGraphs(), warm_up=2) if graphs else train

    def step() -> Tensor:
        held["state"], metrics = held["train"](held["state"], batch)
        return metrics["loss"]

    return Participant(wake, step, held.clear)


# -- torch modules --------------------------------------------------------------------------------------------------
def module(row: Row, device: str, compile: bool) -> Participant:
    """A plain nn.Module under torch.compile."""
    with torch.device(device):
        model = llama.Llama(row.config, row.pieces)
    run: Any = model
    if compile and row.whole:
        run = torch.compile(model)
    elif compile:
        model.compile_parts()
    return with_adamw(model, run, lambda name: name, row, device)


def transformers(row: Row, device: str, compile: bool) -> Participant:
    """LlamaForCausalLM, its layers compiled. Raises ValueError for what it is not, ImportError where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("the package is not installed")
    c = row.config
    if c.moe is not None or not c.block_mlp.gated:
        raise ValueError("its Llama has a gated block and no experts")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.embed, intermediate_size=c.mlp, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv or c.heads, rms_norm_eps=c.norm_eps, attn_implementation="sdpa",
        max_position_embeddings=row.seq, use_cache=False, tie_word_embeddings=c.tied,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers if compile else ():
        layer.compile()

    def name(ours: str) -> str:
        if not ours.startswith("layers."):
            return {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(ours, f"lm_{ours}")
        _, number, place, *rest = ours.split(".")
        place = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.get(place, place)
        place = f"self_attn.{place}_proj" if place in ("q", "k", "v", "o") else place
        rest = [f"{rest[0]}_proj", *rest[1:]] if place == "mlp" else rest
        return ".".join(["model.layers", number, place, *rest])

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, labels=labels, shift_labels=labels).loss

    return with_adamw(model, loss, name, row, device)


def with_adamw(
    model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], name: Callable[[str], str], row: Row, device: str
) -> Participant:
    """torch's own optimizer around a module: fused AdamW, gradients clipped by foreach, masters in fp32.

    name: the module's name of a parameter of `llama.Llama`.
    """
    own, (ids, labels) = dict(model.named_parameters()), tokens(row, device)
    masters = {path: torch.nn.Parameter(p.detach()) for path, p in own.items()}
    for p in own.values():
        p.data = p.data.to(torch.bfloat16)  # the parameters alone: transformers keeps its table of frequencies in fp32
    storages = [(x.untyped_storage(), x.untyped_storage().nbytes()) for x in (*own.values(), *masters.values())]
    opt = torch.optim.AdamW(
        masters.values(), lr=A["lr"], betas=(A["b1"], A["b2"]), eps=A["eps"], weight_decay=A["decay"], fused=True
    )

    def wake() -> None:
        for storage, size in storages:
            storage.resize_(size)
        drawn = llama.matrices(draw(gpt(row.config), device))
        llama.fill(masters, {name(path): x for path, x in drawn.items()})

    def step() -> Tensor:
        with torch.no_grad():
            torch._foreach_copy_(list(own.values()), list(masters.values()))
        loss = loss_of(ids, labels)
        loss.backward()
        for path, p in own.items():
            masters[path].grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), A["clip"], foreach=True)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.detach()

    def sleep() -> None:
        opt.zero_grad(set_to_none=True)
        opt.state.clear()
        for p in own.values():
            p.grad = None
        for storage, _ in storages:
            storage.resize_(0)

    sleep()
    return Participant(wake, step, sleep)


def make(name: str, row: Row, device: str, compile: bool) -> Participant:
    """A participant by name."""
    made = {
        "fmegatron": fmegatron,
        "fmegatron triton": partial(fmegatron, kernels="triton"),
        "fmegatron graphs": partial(fmegatron, graphs=True),
        "fmegatron fp8": partial(fmegatron, fp8=True),
        "module": module,
        "transformers": transformers,
    }
    return made[name](row, device, compile)
