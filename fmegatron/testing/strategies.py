"""Hypothesis strategies: meshes, rules, configs and batches that fit together, and a case of all four.

    @given(cases())
    def test_my_block(case):
        assert_mesh_invariant(case.model, case.batch, [case.sharding()], **case.settings)

The simplest example of each is not the empty one: it has two ranks on two axes, so that a short run tests something.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fmegatron.models.config import Config
from fmegatron.models.gpt import gpt
from fmegatron.models.model import Model
from fmegatron.sharding import RULES, Rules, Sharding, virtual_mesh

AXES = ("dp", "tp", "fsdp", "cp", "cpa")
DATA, MODEL = ("batch", "seq", "loss_seq"), ("heads", "mlp", "vocab")
Draw = Any


@st.composite
def meshes(draw: Draw, max_ranks: int = 8, axes: tuple[str, ...] = AXES, least: int = 1) -> dict[str, int]:
    """Sizes of a mesh, {axis: ranks}, in any order; size-1 axes and three axes or more are among them."""
    chosen = draw(st.permutations(axes)) if axes else []
    chosen = chosen[: draw(st.sampled_from([n for n in (2, 3, 1, 4) if least <= n <= len(chosen)] or [len(chosen)]))]
    sizes: dict[str, int] = {}
    for axis in chosen:
        left = max_ranks // math.prod(sizes.values())
        sizes[axis] = draw(st.sampled_from([n for n in (2, 1, 4, 3, 8) if n <= left]))
    return sizes or {"dp": 1}


@st.composite
def own_rules(draw: Draw, axes: tuple[str, ...]) -> Rules:
    """Lists of one's own: names in any order over any axes in any order, storage and optimizer on any line.

    What a decoder asks of its rules holds: lines of its weights' names come first and share no axis with batch; kv goes
    with heads; vocab shares no axis with loss_seq.
    """
    weights = tuple(a for a in axes if draw(st.booleans()))
    data = tuple(a for a in axes if a not in weights)

    def over(among: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(draw(st.permutations(among))[: draw(st.integers(0, len(among)))]) if among else ()

    heads, batch, loss = over(weights), over(data), over(axes)
    seq, loss = (tuple(a for a in on if a not in batch) for on in (over(axes), loss))
    first = [("heads", heads), ("kv", tuple(f"{a}?" for a in heads)), ("mlp", over(weights))]
    first.append(("vocab", tuple(a for a in over(weights) if a not in loss)))
    then = [("batch", batch), ("seq", seq), ("loss_seq", loss)]
    compute = tuple((name, on) for name, on in (*draw(st.permutations(first)), *draw(st.permutations(then))) if on)
    named = {axis.rstrip("?") for _, on in compute for axis in on}
    rest = tuple(a for a in axes if a not in named)
    storage = draw(st.sampled_from([(("*", axes),), (), (("embed", tuple(f"{a}?" for a in axes)),)]))
    optimizer = draw(st.sampled_from([(("*", tuple(reversed(axes))),), ()]))
    compute += (("batch", rest),) if rest else ()  # a rule for every axis: none may idle
    return Rules(compute, storage, optimizer, reduce=draw(st.sampled_from(["microbatch", "step"])), name="own")


def shards(rules: Rules, mesh: Mapping[str, int], name: str) -> int:
    """The most ranks that a name may lie over."""
    axes = {axis.rstrip("?") for n, on in rules.lines("compute") if n == name for axis in on}
    return math.prod(mesh.get(axis, 1) for axis in axes)


@st.composite
def configs(draw: Draw, rules: Rules, mesh: Mapping[str, int], few_kv: bool = False, pad: bool = False) -> Config:
    """A decoder that fits: odd sizes, padded vocabularies, fewer KV heads than ranks, layers of several kinds, tied or not."""
    heads_over, mlp_over, vocab_over = (shards(rules, mesh, name) for name in MODEL)
    heads_over = max(heads_over, shards(rules, mesh, "q_heads"))
    heads = heads_over * draw(st.sampled_from((2, 1, 3) if heads_over < 4 else (1,)))
    groups = [n for n in range(heads, 0, -1) if heads % n == 0 and (not few_kv or n < heads_over)]
    hd = draw(st.sampled_from((4, 6, 2)))
    layers = draw(st.sampled_from((2, 1, 3)))
    padded = pad or draw(st.booleans())
    vocab = draw(st.sampled_from((19, 24, 31)))
    positions, window = draw(st.sampled_from(("rope", "learned", "none"))), draw(st.sampled_from((None, 3)))
    turns = positions == "rope"  # a config refuses what would do nothing
    softcap = draw(st.sampled_from((None, 5.0)))
    return Config(
        layers=layers,
        embed=draw(st.sampled_from((12, 8, 15, 18))),
        heads=heads,
        kv=draw(st.sampled_from(groups)),
        hd=hd,
        mlp=mlp_over * draw(st.sampled_from((3, 2, 5))),
        vocab=vocab if padded else vocab_over * math.ceil(vocab / vocab_over),
        vocab_pad=draw(st.sampled_from((8, 2, 5))) if padded else 1,
        context=64,
        positions=positions,
        rope_fraction=draw(st.sampled_from((1.0, 0.5) if hd == 4 and turns else (1.0,))),
        rope_interleaved=turns and draw(st.booleans()),
        window=window,
        no_window=draw(st.sampled_from((0, 2) if window else (0,))),
        no_rope=draw(st.sampled_from((0, 2) if turns else (0,))),
        qk_norm=draw(st.sampled_from(("norm", "none", "l2"))),
        qk_layer_scaling=softcap is None and draw(st.booleans()),
        attention_softcap=softcap,
        attention_bias=draw(st.booleans()),
        attention_out_bias=draw(st.booleans()),
        sink=draw(st.sampled_from(("none", "learned", "one"))),
        activation=draw(st.sampled_from(("swiglu", "gelu_tanh", "geglu", "relu2"))),
        mlp_bias=draw(st.booleans()),
        norm=draw(st.sampled_from(("rms", "layer"))),
        norm_centred=draw(st.booleans()),
        norm_at=draw(st.sampled_from(("pre", "peri", "post", "out"))),
        embed_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        logit_multiplier=draw(st.sampled_from((1.0, 0.5))),
        logit_softcap=draw(st.sampled_from((None, 8.0))),
        label_smoothing=draw(st.sampled_from((0.1, 0.0))),
        z_loss=draw(st.sampled_from((1e-3, 0.0))),
        loss_chunks=draw(st.sampled_from((1, 2, 3))),
        init_std=0.2,
    )


@st.composite
def batches(draw: Draw, vocab: int, rows: int, length: int) -> dict[str, Tensor]:
    """tokens, labels and weights (some zero); documents, positions and an order of the sequence, or not; sample ids."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (rows, length)
    tokens, labels = (torch.randint(0, vocab, shape, generator=generator) for _ in range(2))
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) * (torch.rand(shape, generator=generator) > 0.3)
    batch = {"tokens": tokens, "labels": labels, "weights": weights, "sample": torch.randperm(rows, generator=generator) + 7}
    if draw(st.booleans()):
        batch["documents"] = (torch.rand(shape, generator=generator) > 0.7).long().cumsum(1)
    if draw(st.booleans()):
        batch["positions"] = torch.randint(0, 64, shape, generator=generator)
    if draw(st.booleans()):
        batch["order"] = torch.stack([torch.randperm(length, generator=generator) for _ in range(rows)])
    return batch


@dataclass(frozen=True)
class Case:
    """A mesh, rules, a config and a batch that fit together, and settings of the step."""

    mesh: Mapping[str, int]
    rules: Rules
    config: Config
    batch: Mapping[str, Tensor] = field(repr=False)
    settings: Mapping[str, Any]
    dtype: torch.dtype = torch.float64

    @cached_property
    def model(self) -> Model:
        """The config's model."""
        return gpt(self.config)

    def sharding(self, make: Any = virtual_mesh) -> Sharding:
        """The rules on a mesh made by `make`."""
        return Sharding(make(**self.mesh), self.rules)

    @property
    def features(self) -> frozenset[str]:
        """What is special about it, to count: size-1, three axes, two axes on a name, padding, kv < tp."""
        heads = shards(self.rules, self.mesh, "heads")
        place = [self.rules.lines("optimizer")]
        several = any(sum(self.mesh.get(a.rstrip("?"), 1) > 1 for a in axes) > 1 for _, axes in place[0])
        found = {
            self.rules.name: True,
            "size-1 axis": 1 in self.mesh.values(),
            "three axes": sum(n > 1 for n in self.mesh.values()) > 2,
            "a name over two axes": several,
            "padding": self.config.vocab % self.config.vocab_pad != 0,
            "kv < tp": (self.config.kv or heads) < heads,
        }
        return frozenset(name for name, true in found.items() if true)


@st.composite
def cases(
    draw: Draw,
    rules: str | None = None,
    max_ranks: int = 8,
    few_kv: bool = False,
    pad: bool = False,
    idle: bool = False,
    dropout: bool = False,
) -> Case:
    """A whole case. rules: a preset's name, or "own"; None draws one.

    few_kv, pad, idle, dropout: always with fewer KV heads than ranks, a padded vocabulary, a size-1 axis, dropout.
    """
    name = rules or draw(st.sampled_from(["fsdp_tp_sp", "own", *sorted(RULES)]))
    named = AXES if name == "own" else tuple(a for a in AXES if a in RULES[name].axes)
    mesh: dict[str, int] = draw(meshes(max_ranks, named))
    if few_kv:
        mesh = {"tp": draw(st.sampled_from((4, 2))), **({} if draw(st.booleans()) else {"dp": 2})}
    if idle:
        mesh = {**mesh, draw(st.sampled_from([a for a in named if mesh.get(a, 1) == 1] or ["idle"])): 1}
    lists: Rules = draw(own_rules(tuple(mesh))) if name == "own" else RULES[name]
    config: Config = draw(configs(lists, mesh, few_kv, pad))
    if dropout:
        rates = {f"{site}_dropout": draw(st.sampled_from((0.2, 0.0, 0.5))) for site in ("embed", "attention")}
        config = Config(**{**vars(config), **rates, "hidden_dropout": 0.25})
    microbatches = draw(st.sampled_from((1, 2)))
    over_rows, over_seq = (shards(lists, mesh, name) for name in ("batch", "seq"))
    halves = 2 * math.prod(mesh.get(axis, 1) for axis in lists.zigzag)
    unit = math.lcm(over_seq, shards(lists, mesh, "loss_seq"), halves if lists.zigzag else 1)
    length = unit * draw(st.sampled_from((3, 2) if over_seq < 4 else (1, 2)))
    batch = draw(batches(config.vocab, over_rows * microbatches * draw(st.sampled_from((1, 2))), max(length, 2)))
    remat = draw(st.sampled_from(("none", "full", "every-2", "selective")))
    settings = {"microbatches": microbatches, "remat": remat, "prefetch": draw(st.sampled_from((1, 0, 2)))}
    # a norm of what a block puts out divides by what may be small: there fp32 on one device is itself off by up to 4e-5
    exact = config.norm_at in ("peri", "out") or draw(st.sampled_from((True, True, False)))
    return Case(mesh, lists, config, batch, settings, torch.float64 if exact else torch.float32)
