"""Your own model, loss, optimizer and data as plain functions: they train on any mesh, and no line here names one.

    fmegatron train experiments/own_model.toml --mesh.virtual true --mesh.dp 2 --mesh.tp 2

The model reads bytes and has no attention: each hidden unit averages what it saw, and forgets at a rate of its own.
"""

import heapq
import inspect
from types import SimpleNamespace

import numpy as np
import torch

from fmegatron import optim, tree
from fmegatron.models import Model, Node
from fmegatron.models.model import count_tokens, next_token
from fmegatron.nn.param import Param, normal, ones, stack


def embed(sh, p, v, key):
    return {"h": sh.lookup("batch seq, vocab embed -> batch seq embed", v["tokens"], p["table"])}


def layer(sh, p, v, key):
    x = torch.nn.functional.rms_norm(v["h"], v["h"].shape[-1:], p["norm"], eps=1e-5)
    up, gate = sh.einsum("batch seq embed, (embed mlp | embed mlp) -> (batch seq mlp | batch seq mlp)", x, p["up"], p["gate"])
    past = sh.relayout(up, "batch seq mlp -> batch kv_seq mlp")  # kv_seq has no rule: every rank sees all of the past
    age = sh.index("seq", "batch seq mlp", up)[:, None] - sh.index("kv_seq", "batch kv_seq mlp", past)  # [seq, kv_seq]

    def remember(past, rate):
        keep = torch.exp(-age.clamp(min=0)[..., None] * rate.exp()) * (age >= 0)[..., None]  # [seq, kv_seq, mlp]
        return torch.einsum("bkm,skm->bsm", past, keep / keep.sum(1, keepdim=True))

    y = sh.local(remember, "batch kv_seq mlp, mlp -> batch seq mlp")(past, p["rate"]) * torch.nn.functional.silu(gate)
    return {"h": v["h"] + sh.einsum("batch seq mlp, mlp embed -> batch seq embed", y, p["down"])}


def loss(sh, p, v, key):
    x = sh.einsum("batch seq embed, vocab embed -> batch seq vocab", v["h"], p["table"])
    labels = sh.align(v["labels"], "batch seq", within="batch seq vocab")
    right = torch.where(labels[..., None] == sh.index("vocab", "batch seq vocab", x), x, 0.0)
    nats = [sh.reduce("batch seq vocab -> batch seq", y, op) for y, op in ((x, "logsumexp"), (right, "sum"))]
    return {"loss.bits": sh.total((nats[0] - nats[1]) / np.log(2) * v["weights"], "batch seq")}  # bits per byte


def model(layers=2, embed_size=64, mlp=128):
    w, out = normal(0.1), normal(0.1 / layers)
    block = {"up": Param("embed mlp", w), "gate": Param("embed mlp", w), "down": Param("mlp embed", out)}
    block |= {"rate": Param("mlp", lambda key, i: -(i % mlp % 8) / 1.5, decay=False), "norm": Param("embed", ones)}
    declare = {"table": Param("vocab embed", w), "layers": {"0": stack(block, layers)}}
    chain = [Node(embed, (("table", "table"),), ("tokens",), ("h",))]
    chain += [Node(layer, (("", "layers.0"),), ("h",), ("h",), layer=i) for i in range(layers)]
    chain += [Node(loss, (("table", "table"),), ("h", "labels", "weights"), ("loss.bits",))]
    return Model(declare, {"vocab": 256, "embed": embed_size, "mlp": mlp}, tuple(chain), next_token, count_tokens(("bits",)))


def lion(rate, beta1=0.9, beta2=0.99):
    def update(grads, momentum, params, *, over=optim.LOCAL):
        signs = tree.map(lambda m, g: torch.sign(beta1 * m + (1 - beta1) * g), momentum, grads)
        return signs, tree.map(lambda m, g: beta2 * m + (1 - beta2) * g, momentum, grads)

    signs = optim.Transform(lambda params: tree.map(torch.zeros_like, params), update)
    return optim.chain(signs, optim.scale_by_learning_rate(rate))


def data(seq=64):
    text = np.frombuffer(inspect.getsource(heapq).encode(), np.uint8).astype(np.int64)

    def row(number):
        start, place = number * seq % (len(text) - seq), np.arange(seq)
        ones, one = np.ones(seq, np.float32), np.zeros(seq, np.int64)
        tokens, labels = text[start : start + seq], text[start + 1 : start + seq + 1]
        return dict(tokens=tokens, labels=labels, weights=ones, positions=place, documents=one, sample=np.array(number))

    return SimpleNamespace(row=row)
