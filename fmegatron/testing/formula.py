"""What a train step of a Llama sends, as closed forms: docs/communication.md as a function, derived there by hand.

Nothing here looks at the program, so that a program that sends more, less or other bytes is found out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fmegatron.models import Config
from fmegatron.sharding import RULES

DATA_AXES = ("dp", "fsdp", "ep", "cp", "cpa")
F32 = 4  # bytes of an element of parameters at rest, of activations and of gradients


@dataclass(frozen=True)
class Case:
    """A step: `rules` on a mesh of `sizes`, `batch` = (samples in a step, tokens in a sample), m microbatches, all in fp32.

    keeps: the engine cannot free what was gathered (a virtual mesh).
    """

    rules: str
    sizes: Mapping[str, int]
    c: Config
    batch: tuple[int, int]
    m: int = 1
    remat: str = "none"
    keeps: bool = False
    count: Counter[tuple[str, str]] = field(default_factory=Counter, repr=False)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter, repr=False)

    def ranks(self, axis: str) -> int:
        """The axis's size."""
        return self.sizes.get(axis, 1)

    def add(self, collective: str, axis: str, n: int, each: int) -> None:
        """n collectives of `each` bytes, where the axis has several ranks."""
        if self.ranks(axis) > 1 and n:
            self.count[collective, axis] += n
            self.bytes[collective, axis] += n * each

    @property
    def again(self) -> int:
        """1 where layers run again."""
        return int(self.remat not in ("none", "selective"))

    @property
    def kv(self) -> int:
        """Key/value heads on a rank: all of them where tp does not divide them."""
        whole, tp = self.c.kv or self.c.heads, self.ranks("tp")
        return whole if whole % tp else whole // tp

    @property
    def tokens(self) -> int:
        """Tokens on a rank in a microbatch, over dp, fsdp, ep and the context axes: b s."""
        rows = self.batch[0] // (self.ranks("dp") * self.ranks("fsdp") * self.ranks("ep") * self.m)
        return rows * self.batch[1] // (self.ranks("cp") * self.ranks("cpa"))


def step_traffic(case: Case) -> dict[tuple[str, str], tuple[int, int]]:
    """{(collective, axis): (count, bytes)} of one rank's step."""
    activations(case)
    parameters(case)
    for axis in case.sizes:
        for each in (8, 8 * 2, F32):  # denominators; metrics: one term and the loss; norm
            case.add("all_reduce", axis, 1, each)
    return {key: (case.count[key], case.bytes[key]) for key in case.count}


def activations(case: Case) -> None:
    """What blocks send, forward and backward."""
    c, m, again, layers = case.c, case.m, case.again, case.c.layers
    stream, ids = case.tokens * c.embed * F32, case.tokens * 8
    if case.rules.endswith("_sp") or case.rules.startswith("cp_"):
        case.add("all_gather", "tp", m * layers * (4 + 2 * again), stream)
        case.add("reduce_scatter", "tp", m * layers * (4 + 2 * again), stream)
        case.add("reduce_scatter", "tp", 2 * m, stream)  # lookup forward, end backward
        case.add("all_gather", "tp", 2 * m, stream)  # lookup backward, end forward
        case.add("all_gather", "tp", 4 * m, ids)  # tokens, positions, documents, labels
        case.add("all_gather", "tp", m, ids // 2)  # weights
    else:
        case.add("all_reduce", "tp", m * (layers * (4 + 2 * again) + 2), stream)
    context(case)
    case.add("all_gather", "cpa", m, ids * case.ranks("cpa"))  # documents
    case.add("all_gather", "cp", m, ids * case.ranks("cpa") * case.ranks("cp"))
    case.add("all_reduce", "tp", 5 * m * c.loss_chunks, case.tokens * F32 // c.loss_chunks)


def context(case: Case) -> None:
    """What attention sends along cp and cpa, in each form; a causal window does not end the ring early here."""
    c, n, inner = case.c, case.ranks("cp"), case.ranks("cpa")
    form = case.rules.removeprefix("cp_") if case.rules.startswith("cp_") else "gather"
    backward = case.m * (c.layers + c.mtp)
    forward = backward * (1 + case.again)
    heads, group = c.heads // case.ranks("tp"), c.heads // (c.kv or c.heads)
    skipped = (c.kv or c.heads) % case.ranks("tp") != 0  # some axis did not divide the key/value heads
    kv = 1 if skipped and group % heads == 0 else case.kv  # one serves all queries of a rank: it is taken at once
    taken, length = skipped and kv == 1, 1  # length: pieces of the sequence
    key, value = (case.tokens * n * F32 for n in (c.head_dim, c.v_hd or c.head_dim))  # of one head
    both = key + value

    def move(axis: str, ranks: int, exchanged: bool) -> None:
        """Heads for sequence; where key/value heads do not divide on this or an earlier axis they end up whole on it."""
        nonlocal heads, kv, length, skipped
        length *= ranks
        skipped = skipped or (exchanged and kv % ranks != 0)
        if exchanged:
            for each in (key, value):  # queries; the output back
                case.add("all_to_all", axis, forward + backward, each * heads * length // ranks)
            heads //= ranks
        if exchanged and not skipped:
            case.add("all_to_all", axis, forward + backward, both * kv * length // ranks)
            kv //= ranks
        else:
            case.add("all_gather", axis, forward, both * kv * length)
            case.add("reduce_scatter", axis, backward, both * kv * length)

    move("cpa", inner, form in ("ulysses", "hierarchical"))
    if form in ("gather", "ulysses"):
        return move("cp", n, form == "ulysses")
    if skipped and not taken:  # each rank has taken those that its queries need
        kv = 1 if group % heads == 0 else heads
    case.add("permute", "cp", (n - 1) * (forward + (1 if case.keeps else 2) * backward), both * kv * length)


@dataclass(frozen=True)
class Leaf:
    """A parameter on a tp rank: the sizes of its dims there, `cut` the one that tp has cut, if any."""

    dims: tuple[int, ...]
    cut: int | None = None

    def along(self, axes: Sequence[tuple[str, int]]) -> tuple[int, dict[str, int]]:
        """Over data axes, outer to inner: (its elements on a rank, {axis: those that its collective along it carries}).

        Each axis cuts the largest dim that it divides; where none does, the largest that tp leaves alone, zeros at its end;
        where that has fewer elements than the axis ranks, none. An axis whose dim is whole again carries no pads any further.
        """
        pieces, home = [1] * len(self.dims), list[tuple[str, int, int]]()
        for axis, ranks in axes:
            here = [size // n for size, n in zip(self.dims, pieces, strict=True)]
            divides = [i for i, (size, n) in enumerate(zip(self.dims, pieces, strict=True)) if size % (n * ranks) == 0]
            fits = divides or [i for i, n in enumerate(here) if n >= ranks and i != self.cut]
            if fits:
                dim = max(fits, key=lambda i: here[i])
                pieces[dim] *= ranks
                home.append((axis, dim, ranks))
        now = [-(-size // n) for size, n in zip(self.dims, pieces, strict=True)]
        local, carried = math.prod(now), dict[str, int]()
        for i, (axis, dim, ranks) in reversed(list(enumerate(home))):
            now[dim] *= ranks
            carried[axis] = math.prod(now)
            if all(other != dim for _, other, _ in home[:i]):
                now[dim] = self.dims[dim]
        return local, carried


def leaves(case: Case) -> dict[str, list[Leaf]]:
    """Of a Llama's nodes, by node; "layer" is one of them."""
    c, tp = case.c, case.ranks("tp")
    narrow = (c.embed, case.kv, c.head_dim)
    wide = [Leaf((c.embed, c.heads // tp, c.head_dim), 1), Leaf((c.heads // tp, c.head_dim, c.embed), 0)]
    keys = [Leaf(narrow, 1 if (c.kv or c.heads) % tp == 0 else None)] * 2
    mlp = [Leaf((c.embed, c.mlp // tp), 1)] * 2 + [Leaf((c.mlp // tp, c.embed), 0)]
    norm, table = Leaf((c.embed,)), Leaf((c.vocab // tp, c.embed), 0)
    if tp == 1:
        wide, keys, mlp, table = *([replace(x, cut=None) for x in part] for part in (wide, keys, mlp)), replace(table, cut=None)
    return {"embed": [table], "layer": [*wide, *keys, *mlp, norm, norm], "final": [norm], "loss": [table]}


def parameters(case: Case) -> None:
    """What parameters, gradients and updates send."""
    c, m, nodes = case.c, case.m, leaves(case)
    store = "ddp" if case.rules.startswith("tp") else case.rules.split("_")[0]
    storage: Sequence[str] = {"fsdp": DATA_AXES, "zero3": DATA_AXES, "cp": DATA_AXES, "hsdp": ("fsdp",)}.get(store, ())
    optimizer = DATA_AXES if store in ("zero1", "zero2") else storage
    times = {"layer": c.layers, "embed": 1, "final": 1, "loss": 1}
    visits = {"layer": 2 if case.again or not case.keeps else 1, "embed": 1, "final": 2 - case.keeps, "loss": 1}

    def spread(leaf: Leaf, among: Sequence[str]) -> tuple[int, dict[str, int]]:
        return leaf.along([(axis, case.ranks(axis)) for axis in among if case.ranks(axis) > 1])

    def carried(node: str, axis: str, among: Sequence[str]) -> int:
        return sum(spread(leaf, among)[1].get(axis, 0) for leaf in nodes[node])

    def every(axis: str) -> int:
        return sum(times[node] * carried(node, axis, optimizer) for node in nodes)

    for axis in storage:
        for node in nodes:
            if each := carried(node, axis, storage):
                case.add("all_gather", axis, m * times[node] * visits[node], each * F32)
    for axis in optimizer:
        if RULES[case.rules].reduce == "microbatch":
            for node in nodes:
                if each := carried(node, axis, optimizer):
                    case.add("reduce_scatter", axis, m * times[node], each * F32)
        else:
            case.add("reduce_scatter", axis, 1, every(axis) * F32)
        if optimizer is not storage:
            case.add("all_gather", axis, 1, every(axis) * F32)
    for axis in (*DATA_AXES, "tp"):  # what is whole there is added up at the end
        left = 0
        for node, here in nodes.items():
            for leaf in here:
                local, home = spread(leaf, optimizer)
                left += times[node] * local * (leaf.cut is None if axis == "tp" else axis not in home)
        case.add("all_reduce", axis, int(left > 0), left * F32)
