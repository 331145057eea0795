"""Rules: ordered lists that give tensor dims their mesh axes, by name.

    ("heads", "tp")            the dim named heads lies over tp
    ("batch", ("dp", "ep"))    over two axes, outer to inner
    ("kv", "tp?")              optional: skipped (yet taken) where the size does not divide
    ("*", "dp")                wildcard: the largest dim that is still free and divides

First come, first served: in one tensor an earlier rule takes a mesh axis before a later one. An axis that the mesh does
not have counts as size 1. A strategy is a `Rules` value; to swap the strategy is to swap the value.

Inside attention the dims of queries, keys and values have names of their own, q_seq, q_heads, q_kv, which lie as seq, heads
and kv do unless a line of their own comes first; kv_seq, the sequence of the keys, has no rule unless it is given one. So a
form of context parallelism is a few lines:

    gather        none                                                   keys and values are gathered over cp
    ring          ("kv_seq", "cp")                                       they stay sharded, and travel around cp
    ulysses       ("q_heads", ("tp", "cp")), ("q_kv", ("tp?", "cp?"))    cp moves from the sequence to the heads
    hierarchical  q_heads and q_kv over cpa, kv_seq over cp              heads inside, a ring outside
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    attention: lines before compute's on names inside attention: a form of context parallelism, written out or by its name
        in CONTEXTS.
    layers: {layer, counted from 1: such lines for it in place of `attention`}.
    dispatch: how tokens travel to experts on other ranks, see nn/dispatch.py; "auto": "ragged" where values can be looked
        at, else (in compiled blocks, on virtual meshes) "padded".
    zigzag: the axes, outermost of seq's, over which a rank holds a chunk of the sequence's head and one of its tail.
    apart: the mesh axis along which parameters and optimizer state are each rank's own, see apart.py; None: there is none.
    """

    compute: Lines = ()
    storage: Lines = ()
    optimizer: Lines = ()
    decode: Lines | None = None
    reduce: Literal["step", "microbatch"] = "microbatch"
    attention: Lines | str = ()
    layers: Mapping[int, Lines | str] | Iterable[tuple[int, Lines | str]] = ()
    zigzag: tuple[str, ...] = ()
    dispatch: Literal["auto", "gather", "padded", "ragged"] = "auto"
    apart: str | None = None
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        for key in ("compute", "storage", "optimizer"):
            object.__setattr__(self, key, normalize(getattr(self, key)))
        object.__setattr__(self, "decode", normalize(self._decode() if self.decode is None else self.decode))
        object.__setattr__(self, "attention", _form(self.attention))
        object.__setattr__(self, "layers", tuple((int(i), _form(lines)) for i, lines in dict(self.layers).items()))
        object.__setattr__(self, "zigzag", (self.zigzag,) if isinstance(self.zigzag, str) else tuple(self.zigzag))
        if self.reduce not in ("step", "microbatch"):
            raise ValueError(f"reduce is 'step' or 'microbatch', not {self.reduce!r}")
        if self.dispatch not in ("auto", "gather", "padded", "ragged"):
            raise ValueError(f"dispatch is 'auto', 'gather', 'padded' or 'ragged', not {self.dispatch!r}")

    def _decode(self) -> list[RuleLike]:
        """Compute without rules on seq, its batch optional."""
        kept = [(name, axes) for name, axes in normalize(self.compute) if name not in SEQ_NAMES]
        return [(n, tuple(f"{axis.rstrip('?')}?" for axis in axes) if n == "batch" else axes) for n, axes in kept]

    def lines(self, kind: Kind) -> tuple[Rule, ...]:
        """The whole ordered list for one kind of tensor."""
        if kind == "decode":
            return _inside(self.decode or ())
        more = {"compute": (), "storage": (self.storage,), "optimizer": (self.storage, self.optimizer)}[kind]
        return sum((normalize(lines) for lines in more), (*_form(self.attention), *_inside(self.compute)))

    def of_layer(self, number: int) -> Rules:
        """The rules inside one layer, counted from 1."""
        own = dict(self.layers)
        return replace(self, attention=own[number], layers=()) if number in own else self

    @property
    def axes(self) -> frozenset[str]:
        """Every mesh axis that some rule names."""
        lines = (*self.lines("optimizer"), *(line for form in dict(self.layers).values() for line in _form(form)))
        return frozenset(axis.rstrip("?") for _, axes in lines for axis in axes)


def _form(lines: Lines | str) -> tuple[Rule, ...]:
    """The lines of a form of context parallelism; raises ValueError on an unknown form, or a name from outside attention."""
    if isinstance(lines, str):
        if lines not in CONTEXTS:
            raise ValueError(f"no form of context parallelism is named {lines!r}: they are {', '.join(CONTEXTS)}")
        lines = CONTEXTS[lines]
    known = (*INSIDE.values(), "kv_seq")
    if wrong := [name for name, _ in normalize(lines) if name not in known]:
        raise ValueError(f"an attention rule names {wrong[0]!r}, but inside attention the dims are {', '.join(known)}")
    return normalize(lines)


def _inside(lines: Lines) -> tuple[Rule, ...]:
    """With each line on seq, heads or kv also for that dim's name inside attention."""
    named = ([(name, axes), *([(INSIDE[name], axes)] if name in INSIDE else [])] for name, axes in normalize(lines))
    return tuple(line for pair in named for line in pair)


Kind = Literal["compute", "storage", "optimizer", "decode"]
INSIDE = MappingProxyType({"seq": "q_seq", "heads": "q_heads", "kv": "q_kv"})  # names of dims inside attention
SEQ_NAMES = ("seq", "loss_seq", "q_seq", "kv_seq", "all_seq")  # dims along the sequence; all_seq never has a rule

CONTEXTS: Mapping[str, Lines] = MappingProxyType({  # forms of context parallelism: what lies otherwise inside attention
    "gather": (),
    "ring": (("kv_seq", "cp"),),
    "ulysses": (("q_heads", ("tp", "cpa", "cp")), ("q_kv", ("tp?", "cpa?", "cp?"))),
    "hierarchical": (("q_heads", ("tp", "cpa")), ("q_kv", ("tp?", "cpa?")), ("kv_seq", "cp")),
})
BATCH: RuleLike = ("batch", ("replica", "dp", "fsdp", "ep"))
CONTEXT: tuple[RuleLike, ...] = (("seq", ("cp", "cpa")), ("loss_seq", ("cp", "cpa")))
EXPERTS: tuple[RuleLike, ...] = (("expert", "ep"), ("expert_mlp", "tp"), ("shared_mlp", "tp"))
TENSOR: tuple[RuleLike, ...] = (("heads", "tp"), ("kv", "tp?"), ("mlp", "tp"), ("vocab", "tp"), *EXPERTS)
SEQUENCE: tuple[RuleLike, ...] = (("seq", ("cp", "cpa", "tp")), ("loss_seq", ("cp", "cpa")))
SHARDED: RuleLike = ("*", ("dp", "fsdp", "ep", "cp", "cpa"))  # the mesh's order: leaves then share their collectives

_TP = normalize((*TENSOR, BATCH, *CONTEXT))
_TP_SP = normalize((*TENSOR, BATCH, *SEQUENCE))
_DATA = normalize((("expert", "ep"), BATCH, *CONTEXT))


def _presets() -> dict[str, Rules]:
    """Every compute list by every way to store: `ddp`, `fsdp`, …, `tp`, `tp_sp`, `fsdp_tp_sp`, …; `cp_ring`, ….

    The `cp_` presets are `fsdp_tp_sp` with a form of context parallelism, zigzag where there is a ring.
    """
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
    for form, zigzag in (("ring", ("cp",)), ("ulysses", ()), ("hierarchical", ("cp",))):
        named[f"cp_{form}"] = replace(named["fsdp_tp_sp"], attention=form, zigzag=zigzag)
    return {name: replace(rules, name=name) for name, rules in named.items()}


class _Presets(dict[str, Rules]):
    def __missing__(self, name: str) -> Rules:
        raise KeyError(f"no rules are named {name!r}: they are {', '.join(self)}")


RULES: Mapping[str, Rules] = MappingProxyType(_Presets(_presets()))
