"""What a train step of a Llama sends, as closed forms: docs/communication.md as a function, derived there by hand.

Nothing here looks at the program, so that a program that sends more, less or other bytes is found out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fmegatron.models import Config
from fmegatron.sharding import RULES

DATA_AXES = ("dp", "fsdp", "cp", "cpa")
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
        """Tokens on a rank in a microbatch, over dp, fsdp and the context axes: b s."""
        rows = self.batch[0] // (self.ranks("dp") * self.ranks("fsdp") * self.m)
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
    forward, backward = case.m * c.layers * (1 + case.again), case.m * c.layers
    heads = c.heads // case.ranks("tp")
    queries, keys = (case.tokens * k * c.head_dim * F32 for k in (heads, case.kv))
    kv, length = case.kv, 1  # key/value heads as they lie, and pieces of the sequence
    skipped = (c.kv or c.heads) % case.ranks("tp") != 0  # some axis did not divide the key/value heads

    def move(axis: str, ranks: int, exchanged: bool) -> None:
        """Heads for sequence; where key/value heads do not divide on this or an earlier axis they end up whole on it."""
        nonlocal heads, kv, length, skipped
        length *= ranks
        divides = exchanged and kv % ranks == 0
        if exchanged:
            case.add("all_to_all", axis, 2 * (forward + backward), queries)  # queries there, the output back
            heads //= ranks
        if divides:
            case.add("all_to_all", axis, 2 * (forward + backward), keys * kv // case.kv * length // ranks)
            kv //= ranks
        if skipped or not divides:
            case.add("all_gather", axis, 2 * forward, keys * length)
            case.add("reduce_scatter", axis, 2 * backward, keys * length)
        skipped = skipped or (exchanged and not divides)

    move("cpa", inner, form in ("ulysses", "hierarchical"))
    if form in ("gather", "ulysses"):
        return move("cp", n, form == "ulysses")
    if skipped:  # each rank has taken those that its queries need
        kv = 1 if (c.heads // (c.kv or c.heads)) % heads == 0 else heads
    block = 2 * case.tokens * length * kv * c.head_dim * F32
    case.add("permute", "cp", (n - 1) * (forward + (1 if case.keeps else 2) * backward), block)


def parameters(case: Case) -> None:
    """What parameters, gradients and updates send."""
    c, m, tp = case.c, case.m, case.ranks("tp")
    store = "ddp" if case.rules.startswith("tp") else case.rules.split("_")[0]
    storage: Sequence[str] = {"fsdp": DATA_AXES, "zero3": DATA_AXES, "cp": DATA_AXES, "hsdp": ("fsdp",)}.get(store, ())
    optimizer = DATA_AXES if store in ("zero1", "zero2") else storage
    kv = 2 * c.embed * case.kv * c.head_dim
    layer = (2 * c.embed * c.embed + 3 * c.embed * c.mlp) // tp + kv + 2 * c.embed
    ends = {"embed": c.vocab * c.embed // tp, "final": c.embed, "loss": c.vocab * c.embed // tp}
    every = c.layers * layer + sum(ends.values())

    def outside(axis: str, among: Sequence[str]) -> int:
        return math.prod(case.ranks(other) for other in among[: among.index(axis)])

    visits = 2 if case.again or not case.keeps else 1
    for axis in storage:
        case.add("all_gather", axis, m * c.layers * visits, layer * F32 // outside(axis, storage))
        for node, n in {"embed": 1, "final": 2 - case.keeps, "loss": 1}.items():
            case.add("all_gather", axis, m * n, ends[node] * F32 // outside(axis, storage))
    for axis in optimizer:
        if RULES[case.rules].reduce == "microbatch":
            for n, elements in [(c.layers, layer), *((1, elements) for elements in ends.values())]:
                case.add("reduce_scatter", axis, m * n, elements * F32 // outside(axis, optimizer))
        else:
            case.add("reduce_scatter", axis, 1, every * F32 // outside(axis, optimizer))
        if optimizer is not storage:
            case.add("all_gather", axis, 1, every * F32 // outside(axis, optimizer))
    shards = math.prod(case.ranks(axis) for axis in optimizer)
    for axis in DATA_AXES:
        if axis not in optimizer:
            case.add("all_reduce", axis, 1, every * F32 // shards)
    whole = (2 * c.layers + 1) * c.embed + (c.layers * kv if (c.kv or c.heads) % tp else 0)
    case.add("all_reduce", "tp", 1, whole * F32 // shards)
