"""Optimizer state in host memory: the same bits as on the device, three pieces at most on the way, refusals."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from fmegatron import offload, optim, tree
from fmegatron.optim.host import arrays_of
from fmegatron.optim.stream import Piece, cuts, in_turn

torch.set_num_threads(1)
PIECE = 256


class Late(offload.Plain):
    """Copies that are made when they are waited for, and not before; until then the target is garbage."""

    def out(self, xs, into=None):
        return [], lambda: [y.copy_(x) for x, y in zip(xs, into, strict=True)]

    def back(self, xs, device):
        made = [torch.full_like(x, 100) for x in xs]
        return made, lambda: [y.copy_(x) for x, y in zip(xs, made, strict=True)]


def tensors(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"stack": (3, 5, 64), "matrix": (9, 64), "odd": (7, 5), "vector": (70,), "one": ()}
    return {name: scale * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def optimizers():
    adamw = optim.adamw(optim.constant(1e-2))
    yield "adamw", adamw
    yield "clipped", optim.chain(optim.clip_by_global_norm(1.0), adamw)
    yield "lion", optim.lion(1e-2)
    yield "bf16", optim.in_formats(adamw, "bf16", "bf16")
    yield "fp8", optim.in_formats(optim.adamw(1e-2), "fp8", "fp16")
    yield "groups", optim.multi({"a": adamw, "b": optim.sgd(1e-1, momentum=0.9)}, [("*o*", "a"), ("*", "b")])


def run(tx, copies=None, compile=False, halves=False):
    step = optim.FusedStep(tx, copies, PIECE)
    params = tensors(0)
    if halves:
        params = optim.packed.halved(params)
    state = tx.init(optim.packed.joined(params))
    for i in range(4):
        ok = torch.tensor(i != 2)
        params, state = step(tensors(i + 1, 0.1), state, params, ok=ok, donate=True, compile=compile)
    return tree.leaves([params, state])


def same(one, other):
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("tx", [pytest.param(tx, id=name) for name, tx in optimizers()])
def test_the_same_bits(tx):
    there = optim.in_host_memory(tx)
    assert same(run(there, Late()), run(tx)) and same(run(there), run(tx))


def test_the_same_bits_with_parameters_in_halves():
    tx = optim.in_formats(optim.adamw(1e-2), "bf16", "bf16")
    assert same(run(optim.in_host_memory(tx), Late(), halves=True), run(tx, halves=True))


@pytest.mark.long
def test_the_same_bits_compiled():
    tx = optim.adamw(1e-2)
    assert same(run(optim.in_host_memory(tx), Late(), compile=True), run(tx, compile=True))


class Watched(offload.Plain):
    """Notes the pieces that are on the device when one arrives."""

    def __init__(self):
        self.refs, self.most, self.log = [], 0, []

    def back(self, xs, device):
        made = super().back(xs, device)
        self.refs.append(weakref.ref(made[0][0]))
        self.most = max(self.most, sum(ref() is not None for ref in self.refs))
        self.log.append("back")
        return made


def test_one_piece_arrives_while_another_is_updated_and_a_third_leaves():
    held = [torch.zeros(8) for _ in range(6)]
    copies = Watched()

    def add(xs):
        copies.log.append("run")
        xs[0].add_(1)

    in_turn(copies, torch.device("cpu"), [Piece(add, (x,)) for x in held])
    assert all(torch.equal(x, torch.ones(8)) for x in held)
    assert copies.most <= 3 and copies.log == ["back", *["back", "run"] * 5, "run"]


@pytest.mark.parametrize("shape", [(10, 64), (3, 5, 128), (7, 5), (70,), (), (0, 64), (1, 1024)])
def test_cuts_cover_a_leaf_once(shape):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    parts = [x[part] for part in cuts(x.shape, PIECE)]
    assert torch.equal(torch.cat([p.reshape(-1) for p in parts]), x.reshape(-1))
    assert len(parts) == 1 or all(p.numel() <= max(PIECE, x[0].numel()) for p in parts)


def test_state_that_nothing_streams_is_refused():
    declare = {"w": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="optimizer.offload: 1.0.v|is of a rule that is not elementwise"):
        optim.in_host_memory(optim.adafactor(1e-2)).init(declare)
    tx = optim.in_host_memory(optim.adamw(1e-2))
    with pytest.raises(ValueError, match="updated in place: use donate=True"):
        optim.fuse(tx)(declare, tx.init(declare), declare, compile=False)


def test_arrays_are_the_moments():
    tx = optim.chain(optim.clip_by_global_norm(1.0), replace(optim.adamw(1e-2)))
    state = tx.init(tensors(0))
    assert sum(x.numel() for x in arrays_of(tx, state)) == 2 * sum(x.numel() for x in tensors(0).values())
