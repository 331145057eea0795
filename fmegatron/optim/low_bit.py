"""Optimizers with their moments in fewer bits, see formats.py.

    tx = in_formats(adamw(1e-3), first="fp8", second="bf16")
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fmegatron import tree
from fmegatron.optim.base import Transform, Tree, chain
from fmegatron.optim.elementwise import Elementwise, elementwise
from fmegatron.optim.formats import format_of
from fmegatron.optim.groups import Groups, multi


def in_formats(tx: Transform, first: str = "fp32", second: str = "fp32") -> Transform:
    """tx with its means of gradients (mu, trace) and of their squares (nu) in fp32, bf16, fp16 or fp8, see formats.py.

    Raises ValueError where it has none of a kind that is to lie in another format.
    """
    found: set[str] = set()

    def change(link: Transform) -> Transform:
        form = link.form
        if isinstance(form, tuple):
            return chain(*map(change, form))
        if isinstance(form, Groups):
            return multi({label: change(inner) for label, inner in form.transforms.items()}, form.labels)
        if not isinstance(form, Elementwise) or not form.slots:
            return link
        squares = {slot: slot.startswith("nu") for slot in form.slots}
        found.update("second" if square else "first" for square in squares.values())
        kinds = {slot: format_of(second if square else first, square) for slot, square in squares.items()}
        stored = tuple((slot, kind) for slot, kind in kinds.items() if kind is not None)
        return elementwise(replace(form, stored=stored)) if stored else link

    done = change(tx)
    for which, name in (("first", first), ("second", second)):
        if name != "fp32" and which not in found:
            raise ValueError(f"{which} moments in {name}: this optimizer keeps none element by element, use fp32")
    return done


def decoded(state: Tree) -> Tree:
    """An optimizer's state with its slots in fp32 where they lie in blocks (bf16 as it is)."""
    if isinstance(state, tuple):
        return tuple(map(decoded, state))
    if not isinstance(state, dict):
        return state
    out = {}
    for name, values in state.items():
        if f"{name}_shift" in state:
            fp8 = tree.leaves(values)[0].dtype == torch.uint8
            kind = format_of("fp8" if fp8 else "fp16", name.startswith("nu"))
            assert kind is not None
            out[name] = tree.map(kind.load, values, state[f"{name}_shift"])
        elif not name.endswith("_shift"):
            out[name] = decoded(values)
    return out
