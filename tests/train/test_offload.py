"""Residuals that wait in host memory: the same bits, no more blocks on the device than said, copies ahead of their use."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch

from fmegatron import offload, optim, tree
from fmegatron.models import Config, gpt
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, shard
from fmegatron.sharding.mesh import thread_mesh, virtual_mesh
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.planned import plan_step
from fmegatron.train.remat import Remat, parse_remat
from fmegatron.train.state import init
from fmegatron.train.step import make_step, value_and_grad
from fmegatron.transforms import Autograd

torch.set_num_threads(1)
LAYERS = 5
C = Config(layers=LAYERS, embed=16, heads=2, kv=1, mlp=32, vocab=32)
MODELS = {
    "dense": C,
    "softcap": replace(C, attention_softcap=9.0, norm="layer", activation="gelu"),
    "experts": replace(C, moe=Moe(4, 2, mlp=16, shared=8)),
}


def batch(rows=2, length=8):
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(0, 32, (rows, length), generator=generator)}


def trained(c=C, sh=SINGLE, steps=2, tx=None, **settings):
    """Everything that two steps return."""
    model, tx = gpt(c), tx or optim.adamw(1e-3)
    state, step = init(model, tx, sh), make_step(model, tx, sh, **settings)
    tokens = batch(4)["tokens"]
    local = {"tokens": shard(sh, tokens, "batch seq"), "labels": shard(sh, tokens, "batch seq")}
    for _ in range(steps):
        state, metrics = step(state, local)
    return tree.leaves([state, metrics])


def same(one, other):
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


class Late:
    """Copies that are made when they are waited for, and not before: until then the target is garbage."""

    def out(self, xs):
        return self._later(xs)

    def back(self, xs, device):
        return self._later(xs)

    def _later(self, xs):
        made = [torch.full_like(x, float("nan") if x.is_floating_point() else 1) for x in xs]
        return made, lambda: [y.copy_(x) for x, y in zip(xs, made, strict=True)]


POLICIES = ["offload", "offload-1", "full+offload", "every-2+offload-1", "selective+offload-3", "offload-9"]


@pytest.mark.parametrize("remat", POLICIES)
def test_the_same_bits(remat):
    plain = trained(remat=remat.split("+")[0] if "+" in remat else "none", microbatches=2)
    assert same(trained(remat=remat, microbatches=2), plain)
    assert same(trained(remat=replace(parse_remat(remat), copies=Late()), microbatches=2), plain)


@pytest.mark.parametrize("kind", ["softcap", "experts"])
def test_the_same_bits_of_other_models(kind):
    assert same(trained(MODELS[kind], remat=Remat(held=1, copies=Late())), trained(MODELS[kind]))


class Forgetful(Late):
    """Nobody can wait for these."""

    def _later(self, xs):
        return super()._later(xs)[0], lambda: None


def test_the_residuals_that_are_used_are_those_that_came_back():
    assert not same(trained(remat=Remat(held=2, copies=Forgetful())), trained())


@pytest.mark.parametrize("mesh", [thread_mesh, virtual_mesh])
def test_the_same_bits_on_a_mesh(mesh):
    sh = Sharding(mesh(dp=2, tp=2), RULES["fsdp_tp_sp"])
    assert same(trained(sh=sh, remat="offload-1", steps=1), trained(sh=sh, steps=1))


@pytest.mark.parametrize("sh", [SINGLE, Sharding(thread_mesh(dp=2), RULES["zero1"])], ids=["one device", "zero1"])
def test_the_same_bits_with_the_optimizer_in_host_memory_too(sh):
    tx = optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-3))
    both = trained(sh=sh, tx=optim.in_host_memory(tx), donate=True, remat="offload")
    assert same(both, trained(sh=sh, tx=tx, donate=True))


def test_the_same_bits_in_a_pipeline():
    pipeline = Pipeline(make_schedule("1f1b", 2, None, 4))
    late = Remat(held=1, copies=Late())
    c = replace(C, layers=6)
    assert same(trained(c, steps=1, pipeline=pipeline, remat=late), trained(c, steps=1, pipeline=pipeline))
    with pytest.raises(ValueError, match="zb_h1 splits backwards, offload cannot"):
        plan_step(gpt(c), SINGLE, pipeline=Pipeline(make_schedule("zb_h1", 2, None, 4)), remat="offload")


@pytest.mark.long
def test_compiled_blocks_give_theirs_too():
    copies = Recording()
    assert same(trained(remat=Remat(held=2, copies=copies), compile=True), trained(compile=True))
    assert copies.log.count("out") == 2 * (LAYERS - 2)


@dataclass(frozen=True)
class Recording(offload.Plain):
    """Notes copies, and what they left alive on the device. A block's number is that of its copy out."""

    log: list = field(default_factory=list)
    blocks: list = field(default_factory=list)
    hosts: dict = field(default_factory=dict)

    def out(self, xs):
        made, wait = super().out(xs)
        self.hosts.update({id(x): len(self.blocks) for x in made})
        self.log.append("out")
        self.blocks.append([weakref.ref(x.untyped_storage()) for x in xs])
        return made, wait

    def back(self, xs, device):
        made, wait = super().back(xs, device)
        self.log.append(("back", number := self.hosts[id(xs[0])]))
        self.blocks[number] = [weakref.ref(x.untyped_storage()) for x in made]
        return made, wait

    def alive(self):
        """The numbers of the blocks that have something on the device."""
        return {i for i, refs in enumerate(self.blocks) if any(ref() is not None for ref in refs)}


@dataclass(frozen=True)
class Watched(Autograd):
    """Notes when a layer runs, and which blocks are on the device then."""

    copies: Recording
    layer: object
    held: dict = field(default_factory=dict)

    @property
    def light(self):
        return self

    def vjp(self, fn, wrt, rest, kind=None):
        out, moving, back = super().vjp(fn, wrt, rest)
        if kind.fn is not self.layer:
            return out, moving, back
        number = sum(key[0] == "forward" for key in self.held)
        self.held["forward", number] = self.copies.alive()

        def pullback(cotangents):
            self.copies.log.append(("backward", number))
            self.held["backward", number] = self.copies.alive()
            return back(cotangents)

        return out, moving, pullback


def watched(held):
    copies = Recording()
    plan = plan_step(gpt(C), SINGLE, remat=Remat(held=held, copies=copies))
    plan = replace(plan, compiled=Watched(copies, plan.model.chain[1].fn))
    with torch.no_grad():
        value_and_grad(plan, plan.sh, plan.model.init(0), batch())
    return copies, plan.compiled.held


@pytest.mark.parametrize("held", [1, 2, 3])
def test_no_more_blocks_are_on_the_device_than_said(held):
    copies, alive = watched(held)
    assert len(copies.blocks) == LAYERS - held
    for (way, number), blocks in alive.items():
        here = blocks | {number} | set(range(LAYERS - held, LAYERS if way == "backward" else 0))  # those that never leave
        here = {block for block in here if block <= number}
        assert len(here) <= held, (way, number, here)
        assert blocks <= here


@pytest.mark.parametrize("held", [2, 3])
def test_a_block_is_on_its_way_back_before_the_backward_of_the_one_behind_it(held):
    log = watched(held)[0].log
    for block in range(LAYERS - held):
        assert log.index(("back", block)) < log.index(("backward", block + 1)) < log.index(("backward", block))


def test_names():
    assert parse_remat("offload") == Remat(held=2) == parse_remat("none+offload")
    assert parse_remat("every-2+offload-3") == Remat(every=2, held=3)
    with pytest.raises(ValueError, match="K >= 1 layers' residuals"):
        parse_remat("full+offload-0")
    for wrong in ("offload+offload", "offload+full", "fulloffload"):
        with pytest.raises(ValueError, match="remat is none"):
            parse_remat(wrong)
