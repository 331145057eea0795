"""What a train step of a model with experts, latent attention or modules that look ahead sends, all of it, as closed forms.

`formula.py` says it of a Llama. Here are the parts that differ: what leads into attention, which blocks have a feed-forward
of their own, the exchanges of experts (`formula_moe.py`), a router's loss along the sequence, the modules' lookups, layers and
judges, and leaves that lie over ep. Sizes divide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES
from fmegatron.testing.formula import DATA_AXES, F32, Case, Leaf, context
from fmegatron.testing.formula_moe import I64, Exchange, Traffic, expert_traffic

ROWS = ("dp", "fsdp", "ep")  # axes that cut the batch


@dataclass(frozen=True)
class Part:
    """A leaf on its tp and ep ranks: how it lies, the axes that have cut it, and elements beside each that no axis cuts."""

    leaf: Leaf
    over: tuple[str, ...] = ()
    beside: int = 1


def model_traffic(case: Case, form: Literal["padded", "gather", "ragged"] = "padded") -> Traffic:
    """{(collective, axis): (count, bytes)} of one rank's step; ragged: where the load is even."""
    c = case.c
    sp = case.rules.endswith("_sp") or case.rules.startswith("cp_")
    with_experts = [] if c.moe is None else [*map(c.moe.at, range(c.layers)), *[c.moe.at(c.layers - 1)] * c.mtp]
    routed, numbers, terms = sum(with_experts), 0, len(c.head.terms) + c.mtp
    _blocks(case, sp, with_experts or [False] * (c.layers + c.mtp))
    _ends(case, sp)
    _sequences(case, sp)
    if c.moe is not None:
        numbers, terms = routed * (c.moe.experts + 2), terms + len(c.moe.coefficients)
        _experts(case, c.moe, form, sp, routed)
    _parameters(case)
    for axis in case.sizes:  # denominators; terms, the loss, and each expert's load, tokens and entropy; norm
        for each in (8 * terms, 8 * (terms + 1 + numbers), F32):
            case.add("all_reduce", axis, 1, each)
    return {key: (case.count[key], case.bytes[key]) for key in case.count}


def _experts(case: Case, moe: Moe, form: Literal["padded", "gather", "ragged"], sp: bool, layers: int) -> None:
    """A router's losses, and the exchanges of rows."""
    tokens, forward, backward = case.tokens // (case.ranks("tp") if sp else 1), case.m * (1 + case.again), case.m
    if moe.switch_loss or moe.sequence_loss or moe.global_loss:  # a sequence's loads are counted over its pieces
        rows = case.batch[0] // (math.prod(map(case.ranks, ROWS)) * case.m)
        for axis in ("cp", "cpa", "tp") if sp else ("cp", "cpa"):
            case.add("all_reduce", axis, layers * forward, rows * moe.experts * F32)
    for axis in ROWS if moe.global_loss else ():
        case.add("all_reduce", axis, layers * forward, moe.experts * F32)
    moved, cut = ({axis: n} if n > 1 else {} for axis, n in (("ep", case.ranks("ep")), ("tp", case.ranks("tp"))))
    wide, partial = (cut, ()) if sp else ({}, tuple(cut))
    layer = Exchange(form, moe.experts, moe.top_k, tokens, case.c.embed, moved, wide, partial)
    for key, (n, size) in expert_traffic(layer, layers * forward, layers * backward).items():
        case.count[key] += n
        case.bytes[key] += size


def _blocks(case: Case, sp: bool, with_experts: list[bool]) -> None:
    """Attention, feed-forward or shared experts, forward and backward."""
    c, stream = case.c, case.tokens * case.c.embed * F32
    forward, backward = case.m * (1 + case.again), case.m
    shared = c.moe is not None and c.moe.shared > 0
    wide = sum(not routed or shared for routed in with_experts)  # with a block whose width tp cuts
    if not sp:
        return case.add("all_reduce", "tp", (len(with_experts) + wide) * (forward + backward), stream)
    latents = (c.embed if c.q_lora is None else c.q_lora, c.kv_lora, c.rope_hd)
    widths = (c.embed,) if c.kv_lora is None else tuple(int(w or 0) for w in latents)
    for blocks, into in ((len(with_experts), widths), (wide, (c.embed,))):
        for width in into:
            case.add("all_gather", "tp", blocks * forward, case.tokens * width * F32)
            case.add("reduce_scatter", "tp", blocks * backward, case.tokens * width * F32)
        case.add("reduce_scatter", "tp", blocks * forward, stream)
        case.add("all_gather", "tp", blocks * backward, stream)


def _ends(case: Case, sp: bool) -> None:
    """Lookups, the way to the loss, and the loss: the model's own and each module's, which run again with their layers."""
    c, m, stream, ids = case.c, case.m, case.tokens * case.c.embed * F32, case.tokens * I64
    modules = m * c.mtp
    again = modules * (1 + case.again)
    case.add("all_reduce", "tp", 5 * (m + modules) * c.loss_chunks, case.tokens * F32 // c.loss_chunks)
    if not sp:
        return case.add("all_reduce", "tp", (m + again) + (m + modules), stream)
    case.add("reduce_scatter", "tp", m + again, stream)  # lookups, and back
    case.add("all_gather", "tp", m + modules, stream)
    case.add("all_gather", "tp", m + again, stream)  # to the loss, and back
    case.add("reduce_scatter", "tp", m + modules, stream)
    case.add("all_gather", "tp", 4 * m + 2 * again, ids)  # tokens, positions, documents, labels; a module's tokens and labels
    case.add("all_gather", "tp", m + again, ids // 2)  # weights


def _sequences(case: Case, sp: bool) -> None:
    """What attention sends along cp and cpa; whole sequences of documents and, once a step, of what stands ahead."""
    context(case)
    ids = case.tokens * I64
    for axis in ("tp", "cpa", "cp") if sp else ("cpa", "cp"):
        ids *= case.ranks(axis) if axis != "tp" else 1
        case.add("all_gather", axis, case.m if axis != "tp" else 0, ids)  # over tp they are among the ends
        if case.c.mtp:  # tokens, labels and documents; weights
            case.add("all_gather", axis, 3, case.m * ids)
            case.add("all_gather", axis, 1, case.m * ids // 2)


def _layer(case: Case, routed: bool) -> Iterator[Part]:
    c, tp, ep = case.c, case.ranks("tp"), case.ranks("ep")

    def part(*dims: int, cut: int | None = None) -> Part:
        sizes = tuple(n // tp if i == cut else n for i, n in enumerate(dims))
        return Part(Leaf(sizes), ("tp",) if cut is not None and tp > 1 else ())

    if c.kv_lora is None:
        kv = c.kv or c.heads
        yield from (part(c.embed, c.heads, c.head_dim, cut=1), part(c.heads, c.head_dim, c.embed, cut=0))
        yield from [part(c.embed, kv, c.head_dim, cut=1 if kv % tp == 0 else None)] * 2
    else:
        rope_hd, v_hd = int(c.rope_hd or 0), int(c.v_hd or 0)
        if c.q_lora is not None:
            yield from (part(c.embed, c.q_lora), part(c.q_lora))
        yield part(c.q_lora or c.embed, c.heads, c.head_dim, cut=1)
        yield from (part(c.embed, c.kv_lora + rope_hd), part(c.kv_lora))
        yield part(c.kv_lora, c.heads, c.head_dim - rope_hd + v_hd, cut=1)
        yield part(c.heads, v_hd, c.embed, cut=0)
    yield from [part(c.embed)] * 2
    width = c.moe.shared if routed and c.moe is not None else c.mlp
    if width:
        yield from (part(c.embed, width, cut=1), part(c.embed, width, cut=1), part(width, c.embed, cut=0))
    if routed and c.moe is not None:
        own, over = (c.moe.mlp or c.mlp) // tp, tuple(axis for axis in ("ep", "tp") if case.ranks(axis) > 1)
        dims = (c.embed, own), (c.embed, own), (own, c.embed)
        yield from (Part(Leaf((c.moe.experts // ep, *each)), over) for each in dims)
        yield Part(Leaf((c.embed,)), beside=c.moe.experts)  # a router's experts are never cut
        if c.moe.balance_bias:
            yield Part(Leaf(()), beside=c.moe.experts)


def _nodes(case: Case) -> Iterator[tuple[list[Part], int]]:
    """Each node's leaves, and how often they are gathered in a microbatch."""
    c, tp = case.c, case.ranks("tp")
    at = [c.moe is not None and c.moe.at(i) for i in range(c.layers)]
    table = Part(Leaf((c.vocab // tp, c.embed)), ("tp",) if tp > 1 else ())
    norm, twice = Part(Leaf((c.embed,))), 1 if case.keeps and not case.again else 2
    yield [table], 1
    for routed in at:
        yield list(_layer(case, routed)), twice
    yield [norm], 2 - case.keeps
    for _ in range(c.mtp):
        yield [*_layer(case, at[-1]), norm, norm, norm, Part(Leaf((2 * c.embed, c.embed))), table], twice
    for _ in range(1 + c.mtp):
        yield [table], 1


def _parameters(case: Case) -> None:
    """Parameters in use, gradients, updates; each leaf over the axes that have not cut it."""
    m, nodes, rules = case.m, list(_nodes(case)), RULES[case.rules]
    store = "ddp" if case.rules.startswith("tp") else case.rules.split("_")[0]
    storage = {"fsdp": DATA_AXES, "zero3": DATA_AXES, "cp": DATA_AXES, "hsdp": ("fsdp",)}.get(store, ())
    optimizer = DATA_AXES if store in ("zero1", "zero2") else storage

    def along(part: Part, among: tuple[str, ...]) -> tuple[int, dict[str, int]]:
        free = [(axis, case.ranks(axis)) for axis in among if case.ranks(axis) > 1 and axis not in part.over]
        local, carried = part.leaf.along(free)
        return local * part.beside, {axis: n * part.beside for axis, n in carried.items()}

    def carried(parts: list[Part], axis: str, among: tuple[str, ...]) -> int:
        return sum(along(part, among)[1].get(axis, 0) for part in parts) * F32

    # each leaf once: a module's table is the decoder's own
    ends = case.c.layers + 2
    held = [parts for parts, _ in nodes[:ends]] + [parts[:-1] for parts, _ in nodes[ends : ends + case.c.mtp]]
    held += [] if case.c.tied else [nodes[-1][0]]
    for axis in storage:
        for parts, visits in nodes:
            if each := carried(parts, axis, storage):
                case.add("all_gather", axis, m * visits, each)
    for axis in optimizer:
        if rules.reduce == "microbatch":
            for parts, _ in nodes:
                if each := carried(parts, axis, optimizer):
                    case.add("reduce_scatter", axis, m, each)
        else:
            case.add("reduce_scatter", axis, 1, sum(carried(parts, axis, optimizer) for parts in held))
        if optimizer is not storage:
            case.add("all_gather", axis, 1, sum(carried(parts, axis, optimizer) for parts in held))
    for axis in (*DATA_AXES, "tp"):  # what is whole there is added up at the end
        left = 0
        for part in (part for parts in held for part in parts):
            local, home = along(part, optimizer)
            left += local * (axis not in part.over and axis not in home)
        case.add("all_reduce", axis, int(left > 0), left * F32)
