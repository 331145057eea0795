"""A list of tensors that computes like one tensor: operators and torch functions go to torch._foreach_* or leaf by leaf.

    mu = Leaves(mus).lerp(Leaves(grads), 0.1)          # one launch for all leaves where torch has one

Other operands: a Leaves of as many tensors, a tuple of as many floats, a number, a 0-D tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FOREACH = frozenset({"add", "mul", "div", "lerp", "sqrt", "neg", "abs", "sign", "reciprocal"})


class Leaves:
    """A sequence of tensors under one name; see the module."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Leaves:
        """torch.f(leaves, ...): by torch._foreach_f if there is one for these operands, else leaf by leaf."""
        name, kwargs = func.__name__, kwargs or {}
        if name in FOREACH and isinstance(args[0], Leaves):
            return Leaves(getattr(torch, f"_foreach_{name}")(*map(_plain, args), **kwargs))
        width = next(len(a.tensors) for a in (*args, *kwargs.values()) if isinstance(a, Leaves))
        return Leaves([func(*[_at(a, i) for a in args], **{k: _at(a, i) for k, a in kwargs.items()})
                       for i in range(width)])

    def __getattr__(self, name: str) -> Callable[..., Leaves]:
        """leaves.f(...) is torch.f(leaves, ...)."""
        function = getattr(torch, name)
        return lambda *args, **kwargs: Leaves.__torch_function__(function, (), (self, *args), kwargs)

    def __add__(self, other: Any) -> Leaves:
        return Leaves.__torch_function__(torch.add, (), (self, other))

    def __mul__(self, other: Any) -> Leaves:
        return Leaves.__torch_function__(torch.mul, (), (self, other))

    def __truediv__(self, other: Any) -> Leaves:
        return Leaves.__torch_function__(torch.div, (), (self, other))

    def __sub__(self, other: Any) -> Leaves:
        return Leaves.__torch_function__(torch.sub, (), (self, other))

    def __rsub__(self, other: Any) -> Leaves:
        return Leaves.__torch_function__(torch.rsub, (), (self, other))

    def __neg__(self) -> Leaves:
        return Leaves.__torch_function__(torch.neg, (), (self,))

    __radd__, __rmul__ = __add__, __mul__


def _plain(operand: Any) -> Any:
    return operand.tensors if isinstance(operand, Leaves) else operand


def _at(operand: Any, i: int) -> Any:
    """The i-th leaf's part of an operand."""
    if isinstance(operand, Leaves):
        return operand.tensors[i]
    return operand[i] if isinstance(operand, tuple) else operand
