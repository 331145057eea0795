"""Optimizers whose state lies in host memory between the steps, and comes to the device piece by piece: see stream.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fmegatron import tree
from fmegatron.optim.base import Transform, Tree
from fmegatron.optim.elementwise import Elementwise
from fmegatron.optim.groups import Groups


def in_host_memory(tx: Transform) -> Transform:
    """tx with the arrays of its state in host memory, pinned beside a CUDA device; counts stay on the device.

    Raises ValueError at `init` where a part that `fuse` does not stream has arrays of its own (Muon, Adafactor).
    """

    def init(params: Tree) -> Tree:
        away = tree.leaves(params)[0].is_cuda
        state = tx.init(tree.map(lambda x: x.cpu(), params) if away else params)
        streamed = {id(x) for x in arrays_of(tx, state)}
        for path, x in tree.to_paths(state).items():
            if x.dim() and id(x) not in streamed:
                raise ValueError(f"optimizer.offload: {path} is of a rule that is not elementwise: use adamw, or no offload")
        device = tree.leaves(params)[0].device
        return tree.map(lambda x: x.pin_memory() if x.dim() else x.to(device), state) if away else state

    return replace(tx, init=init, host=True)


def arrays_of(tx: Transform, state: Tree) -> list[Tensor]:
    """The arrays of a state that the fused pass walks over: those of the last run of elementwise links, group by group."""
    chained = isinstance(tx.form, tuple)
    links: list[Transform] = list(tx.form) if chained else [tx]
    states: list[Any] = list(state) if chained else [state]
    found: list[Tensor] = []
    while links and isinstance(links[-1].form, Elementwise | Groups):
        form, own = links.pop().form, states.pop()
        if isinstance(form, Groups):
            return [x for label, each in form.transforms.items() for x in arrays_of(each, own[label])]
        found += [x for name in form.arrays for x in tree.leaves(own[name])]
    return found
