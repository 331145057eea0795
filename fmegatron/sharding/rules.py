"""Rules: ordered lists that give tensor dims their mesh axes, by name.

    ("heads", "tp")            the dim named heads lies over tp
    ("batch", ("dp", "ep"))    over two axes, outer to inner
    ("kv", "tp?")              optional: skipped (yet taken) where the size does not divide
    ("*", "dp")                wildcard: the largest dim that is still free and divides

First come, first served: in one tensor an earlier rule takes a mesh axis before a later one. An axis that the mesh does
not have counts as size 1. A strategy is a `Rules` value; to swap the strategy is to swap the value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

Rule = tuple[str, tuple[str, ...]]
RuleLike = tuple[str, str | tuple[str, ...]]
Lines = Iterable[RuleLike]


def normalize(rules: Iterable[RuleLike]) -> tuple[Rule, ...]:
    """Every right side as a tuple of axes; raises ValueError on what is not a pair of names."""
    out = []
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise ValueError(f"a rule is a pair (name, mesh axes), like ('heads', 'tp'); got {rule!r}")
        axes = (rule[1],) if isinstance(rule[1], str) else tuple(rule[1])
        out.append((rule[0], axes))
    return tuple(out)


@dataclass(frozen=True)
class Rules:
    """The lists of one strategy; storage and optimizer state extend compute, line by line.

    compute: activations, and parameters while in use.
    storage: more lines for parameters at rest (FSDP, ZeRO-3).
    optimizer: more lines after storage's for optimizer state and updates (ZeRO-1, ZeRO-2).
    decode: the compute list while generating; by default compute without rules on seq.
    reduce: when gradients go to the optimizer's placement: once per "step", or per "microbatch" (reduce-scatter into a
        sharded accumulator; a leaf that is stored whole is reduced once per step in both cases).
    """

    compute: Lines = ()
    storage: Lines = ()
    optimizer: Lines = ()
    decode: Lines | None = None
    reduce: Literal["step", "microbatch"] = "microbatch"
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        for key in ("compute", "storage", "optimizer"):
            object.__setattr__(self, key, normalize(getattr(self, key)))
        object.__setattr__(self, "decode", normalize(self._decode() if self.decode is None else self.decode))
        if self.reduce not in ("step", "microbatch"):
            raise ValueError(f"reduce is 'step' or 'microbatch', not {self.reduce!r}")

    def _decode(self) -> list[RuleLike]:
        """Compute without rules on seq, its batch optional."""
        kept = [(name, axes) for name, axes in normalize(self.compute) if name not in SEQ_NAMES]
        return [(n, tuple(f"{axis.rstrip('?')}?" for axis in axes) if n == "batch" else axes) for n, axes in kept]

    def lines(self, kind: Kind) -> tuple[Rule, ...]:
        """The whole ordered list for one kind of tensor."""
        if kind == "decode":
            return normalize(self.decode or ())
        more = {"compute": (), "storage": (self.storage,), "optimizer": (self.storage, self.optimizer)}[kind]
        return sum((normalize(lines) for lines in more), normalize(self.compute))

    @property
    def axes(self) -> frozenset[str]:
        """Every mesh axis that some rule names."""
        return frozenset(axis.rstrip("?") for _, axes in self.lines("optimizer") for axis in axes)


Kind = Literal["compute", "storage", "optimizer", "decode"]
SEQ_NAMES = ("seq", "loss_seq")

BATCH: RuleLike = ("batch", ("dp", "fsdp", "ep"))
CONTEXT: tuple[RuleLike, ...] = (("seq", "cp"), ("loss_seq", "cp"))
TENSOR: tuple[RuleLike, ...] = (("heads", "tp"), ("kv", "tp?"), ("mlp", "tp"), ("vocab", "tp"), ("expert", "ep"))
SEQUENCE: tuple[RuleLike, ...] = (("seq", ("cp", "tp")), ("loss_seq", "cp"))
SHARDED: RuleLike = ("*", ("dp", "fsdp", "cp"))  # the mesh's order: leaves then share their collectives

_TP = normalize((*TENSOR, BATCH, *CONTEXT))
_TP_SP = normalize((*TENSOR, BATCH, *SEQUENCE))
_DATA = normalize((BATCH, *CONTEXT))


def _presets() -> dict[str, Rules]:
    """Every compute list by every way to store: `ddp`, `fsdp`, …, `tp`, `tp_sp`, `fsdp_tp_sp`, …."""
    stores = {
        "ddp": Rules(reduce="step"),
        "zero1": Rules(optimizer=(SHARDED,), reduce="step"),
        "zero2": Rules(optimizer=(SHARDED,)),
        "fsdp": Rules(storage=(SHARDED,)),
        "hsdp": Rules(storage=(("*", "fsdp"),)),
    }
    computes = {"": _DATA, "tp": _TP, "tp_sp": _TP_SP}
    named = {"single": Rules(), "zero3": replace(stores["fsdp"], compute=_DATA, decode=None)}
    for store, rules in stores.items():
        for compute, lines in computes.items():
            name = f"{store}_{compute}" if compute else store
            named[name] = replace(rules, compute=lines, decode=None)
    named["tp"], named["tp_sp"] = named["ddp_tp"], named["ddp_tp_sp"]
    return {name: replace(rules, name=name) for name, rules in named.items()}


RULES = MappingProxyType(_presets())
