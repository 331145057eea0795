"""What routed experts send in a train step, as closed forms of each way to dispatch: docs/moe.md as a function.

Over axes that carry tokens and experts rows are exchanged, over those that carry tokens and the width of an expert they are
gathered, and over those of experts or their width alone results are added up. All in fp32, without a capacity.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from fmegatron.testing.formula import F32

I64 = 8
Traffic = dict[tuple[str, str], tuple[int, int]]


@dataclass(frozen=True)
class Exchange:
    """Of one layer: axes {name: ranks} in the order of the rules. moved: of experts and tokens; wide: of an expert's width and
    tokens; partial: of experts or their width, not of tokens. tokens: on a rank, of `embed` features, each to k experts."""

    form: Literal["padded", "gather", "ragged"]
    experts: int
    k: int
    tokens: int
    embed: int
    moved: dict[str, int]
    wide: dict[str, int]
    partial: tuple[str, ...] = ()


def expert_traffic(layer: Exchange, forward: int, backward: int) -> Traffic:
    """{(collective, axis): (count, bytes)} of so many passes forward, those that run again among them, and backward.

    ragged: where the load is even, so that every exchange keeps the number of rows.
    """
    count: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()

    def add(collective: str, axis: str, n: int, each: int) -> None:
        if n:
            count[collective, axis] += n
            sent[collective, axis] += n * each

    both = forward + backward
    if layer.moved or layer.wide or layer.partial:
        {"padded": _padded, "gather": _gather, "ragged": _ragged}[layer.form](layer, forward, backward, add)
        for axis in layer.partial:
            add("all_reduce", axis, both, layer.tokens * layer.embed * F32)
    return {key: (count[key], sent[key]) for key in count}


def _padded(layer: Exchange, forward: int, backward: int, add: Any) -> None:
    rows = layer.experts * layer.tokens * layer.embed * F32  # a slot for every token and expert
    for axis in layer.moved:
        add("all_to_all", axis, 2 * (forward + backward), rows)
    for axis, ranks in layer.wide.items():
        rows *= ranks
        add("all_gather", axis, forward + backward, rows)  # there, and the way back's transpose
        add("reduce_scatter", axis, forward + backward, rows)


def _gather(layer: Exchange, forward: int, backward: int, add: Any) -> None:
    tokens = layer.tokens
    for axis, ranks in {**layer.moved, **layer.wide}.items():
        tokens *= ranks
        add("all_gather", axis, forward + backward, tokens * layer.embed * F32)
        add("reduce_scatter", axis, forward + backward, tokens * layer.embed * F32)
        add("all_gather", axis, forward, tokens * layer.k * I64)  # which experts
        add("all_gather", axis, forward, tokens * layer.k * F32)  # with what weights
        add("reduce_scatter", axis, backward, tokens * layer.k * F32)


def _ragged(layer: Exchange, forward: int, backward: int, add: Any) -> None:
    rows, groups = layer.tokens * layer.k * layer.embed * F32, layer.experts
    for axis, ranks in layer.moved.items():
        add("all_to_all", axis, forward, groups * I64)
        add("all_to_all", axis, 2 * (forward + backward), rows)
        groups //= ranks
    for axis, ranks in layer.wide.items():
        rows *= ranks
        add("all_gather", axis, forward, ranks * groups * I64)
        add("all_to_all", axis, 2 * (forward + backward), rows)


def difference(a: Traffic, b: Traffic) -> Traffic:
    """Of two steps, what a sends beyond b; negative where b sends more."""
    keys = {key: tuple(x - y for x, y in zip(a.get(key, (0, 0)), b.get(key, (0, 0)), strict=True)) for key in {*a, *b}}
    return {key: (n, size) for key, (n, size) in keys.items() if n or size}
