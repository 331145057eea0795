"""One Case a kernel and set of options, what the shared tests run: inputs, and the same function in every form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmegatron.kernels import activation, cross_entropy, grouped_matmul, norm, permute, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = torch.float64


@dataclass(frozen=True)
class Case:
    """call(form, *inputs) of inputs [rows, ...] drawn in fp64; `fixed` inputs keep their dtype and have no gradient."""

    name: str
    inputs: Callable[[int], list[Tensor | None]]
    call: Callable[..., Any]
    fixed: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()  # inputs without rows of their own: weights, tables
    moves: bool = False  # rows of the result are not those of the input

    def draw(self, rows: int, dtype: torch.dtype = D, seed: int = 0) -> list[Tensor | None]:
        torch.manual_seed(seed)
        made = self.inputs(rows)
        return [x if x is None else x.to(DEVICE) if i in self.fixed else x.to(DEVICE, dtype) for i, x in enumerate(made)]

    def moving(self, inputs: list[Tensor | None]) -> list[int]:
        return [i for i, x in enumerate(inputs) if x is not None and i not in self.fixed]

    def run(self, form: str, inputs: list[Tensor | None], seed: int = 1) -> list[Tensor]:
        """Outputs, then the gradients of their sum with random weights."""
        at = self.moving(inputs)
        given = [x.detach().requires_grad_() if i in at else x for i, x in enumerate(inputs)]
        out = self.call(form, *given)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(seed)
        seeds = [torch.randn(y.shape, dtype=D).to(y) for y in out]
        return [y.detach() for y in out] + list(torch.autograd.grad(out, [given[i] for i in at], seeds))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


def norms() -> list[Case]:
    def case(name: str, kind: str, centred: bool, added: bool, weights: str) -> Case:
        def inputs(rows: int) -> list[Tensor | None]:
            w = normal(37) if "w" in weights else None
            b = normal(37) if "b" in weights else None
            return [normal(rows, 37), w, b, normal(rows, 37) if added else None]

        def call(form: str, x: Tensor, w: Any, b: Any, residual: Any) -> Any:
            options: Any = {"kind": kind, "centred": centred, "form": form}
            return norm.add_norm(x, residual, w, b, **options) if added else norm.norm(x, w, b, **options)

        return Case(name, inputs, call, whole=(1, 2))

    return [case("rms", "rms", False, False, "w"), case("rms_centred_added", "rms", True, True, "w"),
            case("l2", "rms", False, False, ""), case("layer", "layer", False, False, "wb"),
            case("layer_centred_added", "layer", True, True, "w")]


def activations() -> list[Case]:
    def gated(act: str, clamp: float | None, offset: float, biased: bool) -> Case:
        def inputs(rows: int) -> list[Tensor | None]:
            extra = [normal(21), normal(21), normal(rows)] if biased else [None] * 3
            return [*normal(rows, 42).chunk(2, -1), *extra]

        def call(form: str, *xs: Any) -> Tensor:
            return activation.glu(*xs, act=act, clamp=clamp, offset=offset, form=form)

        return Case(f"glu_{act}" + "_full" * biased, inputs, call, whole=(2, 3))

    def plain(act: str) -> Case:
        return Case(act, lambda rows: [normal(rows, 21), normal(21), normal(rows)],
                    lambda form, x, b, w: activation.activate(x, b, w, act=act, form=form), whole=(1,))

    return [gated("silu", None, 0.0, False), gated("quick_gelu", 0.7, 1.0, True), gated("gelu", None, 0.0, False),
            plain("relu2"), plain("gelu_tanh")]


def ropes() -> list[Case]:
    def case(name: str, pairs: int, interleaved: bool) -> Case:
        def inputs(rows: int) -> list[Tensor | None]:
            angles = normal(1, rows, 1, pairs) * 9
            return [normal(1, rows, 5, 10), normal(1, rows, 2, 10), angles.cos(), angles.sin()]

        return Case(name, inputs, lambda form, *xs: rope.rotate(*xs, interleaved=interleaved, form=form), (2, 3))

    return [case("rope", 5, False), case("rope_interleaved", 5, True), case("rope_partial", 3, False)]


def losses() -> list[Case]:
    def case(name: str, valid: int | None, multiplier: float, softcap: float | None) -> Case:
        def inputs(rows: int) -> list[Tensor | None]:
            return [normal(rows, 35) * 3, torch.randint(-4, 40, (rows,)), None if valid is None else torch.tensor(valid)]

        options: Any = {"multiplier": multiplier, "softcap": softcap}
        return Case(name, inputs, lambda form, *xs: cross_entropy.stats(*xs, form=form, **options), (1, 2))

    def linear(rows: int) -> list[Tensor | None]:
        return [normal(rows, 6), normal(35, 6), torch.randint(0, 35, (rows,)), torch.tensor(33)]

    def call(form: str, h: Tensor, table: Tensor, t: Tensor, v: Tensor) -> Any:
        return cross_entropy.linear(h, table, t, v, softcap=4.0, form=form, rows=4)

    return [case("cross_entropy", None, 1.0, None), case("cross_entropy_full", 30, 1.3, 5.0),
            Case("linear", linear, call, (2, 3), (1,))]


def experts() -> list[Case]:
    def slots(rows: int) -> Tensor:
        slot = torch.randperm(3 * rows + 4)[:2 * rows].reshape(rows, 2)
        return torch.where(slot >= 2 * rows + 2, 2 * rows + 2, slot)  # dropped, several of them

    def counts(rows: int) -> Tensor:
        return torch.tensor([rows // 3, 0, rows - rows // 3 - rows // 4])  # the rest belongs to nobody

    def product(form: str, x: Tensor, w: Tensor, n: Tensor) -> Tensor:
        return grouped_matmul.grouped_matmul(x, w, n, form=form)

    return [Case("permute", lambda rows: [normal(rows, 19), slots(rows)],
                 lambda form, x, slot: permute.permute(x, slot, 2 * slot.shape[0] + 2, form=form), (1,), moves=True),
            Case("unpermute", lambda rows: [normal(2 * rows + 2, 19), slots(rows), normal(rows, 2)],
                 lambda form, *xs: permute.unpermute(*xs, form=form), (1,), (0,), moves=True),
            Case("grouped_matmul", lambda rows: [normal(rows, 21), normal(3, 21, 19), counts(rows)], product, (2,), (1,))]


CASES = [*norms(), *activations(), *ropes(), *losses(), *experts()]
