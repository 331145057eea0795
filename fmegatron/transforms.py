"""Derivatives of blocks, by three engines behind one function.

    values, moving, pullback = engine.vjp(fn, wrt, rest)       grads = pullback(cotangents)

    FUNC       torch.func: nests under vmap and grad; for virtual meshes, per-example gradients, second derivatives
    AUTOGRAD   torch.autograd: eager, lean in memory
    Compiled   AOTAutograd and Inductor: a joint graph of forward and backward, partitioned once per kind of block and shape;
               in compiled.py

A block is a pure function `fn(wrt, rest) -> {name: tensor}` of two trees of tensors; derivatives are taken with respect to
the floating tensors of `wrt`. All engines return the same numbers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd.graph import get_gradient_edge

from fmegatron import tree
from fmegatron.tree import Tree

Values = dict[str, Tensor]
Block = Callable[[Tree, Tree], Values]


# cotangents of (some of) the outputs -> gradients, a tree like `wrt`
Pullback = Callable[[Mapping[str, Tensor]], Tree]
# a block's values, the names among them that may depend on `wrt`, its pullback
Derivative = tuple[Values, frozenset[str], Pullback]


@dataclass(frozen=True)
class Kind:
    """What is compiled once: a block's function and its settings. name: says both, the same in every process of a program."""

    fn: Hashable
    settings: tuple[Hashable, ...]
    name: str = field(compare=False)


class Engine(Protocol):
    """One way to differentiate a block; `kind` names what is compiled once. light: the engine for blocks that cost little."""

    @property
    def light(self) -> Engine: ...

    def vjp(self, fn: Block, wrt: Tree, rest: Tree, kind: Hashable = None) -> Derivative: ...


def inside_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) is running around the caller."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def compiling() -> bool:
    """Whether the caller's Python is being traced into a compiled graph."""
    return torch.compiler.is_compiling() or detect_fake_mode() is not None


# -- torch.func -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Func:
    """torch.func.vjp."""

    @property
    def light(self) -> Engine:
        """Itself."""
        return self

    def vjp(self, fn: Block, wrt: Tree, rest: Tree, kind: Hashable = None) -> Derivative:
        leaves, spec = tree.flatten(wrt)
        moving = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]

        def on_moving(*values: Tensor) -> tuple[Values, Values]:
            now = list(leaves)
            for i, value in zip(moving, values, strict=True):
                now[i] = value
            both = fn(tree.unflatten(spec, now), rest)
            smooth = {name: y for name, y in both.items() if y.is_floating_point()}
            return smooth, {name: y for name, y in both.items() if name not in smooth}

        results: Any = torch.func.vjp(on_moving, *(leaves[i] for i in moving), has_aux=True)
        out, pull, others = results

        def pullback(cotangents: Mapping[str, Tensor]) -> Tree:
            full = {
                name: cotangents[name].to(y.dtype) if name in cotangents else torch.zeros_like(y) for name, y in out.items()
            }
            grads = dict(zip(moving, pull(full), strict=True))
            return tree.unflatten(spec, [grads.get(i, torch.zeros_like(leaf)) for i, leaf in enumerate(leaves)])

        return {**out, **others}, frozenset(out), pullback


# -- torch.autograd -------------------------------------------------------------------------------------------------
class _Enter(torch.autograd.Function):
    """Tensors as the inputs of a graph whose gradients are asked for at their edges: a leaf would keep their memory."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise AssertionError("gradients stop at the edges")


@dataclass(frozen=True)
class Autograd:
    """A graph recorded on aliases of the tensors given. It keeps the memory of none but those that its operators save."""

    @property
    def light(self) -> Engine:
        """Plain autograd."""
        return AUTOGRAD

    def vjp(self, fn: Block, wrt: Tree, rest: Tree, kind: Hashable = None) -> Derivative:
        leaves, spec = tree.flatten(wrt)
        moving = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
        like: list[tuple[Any, dict[str, Any]]] = [(x.shape, {"dtype": x.dtype, "device": x.device}) for x in leaves]
        inside = [leaf.detach() for leaf in leaves]
        with torch.enable_grad():
            aliases = _Enter.apply(torch.empty(0, requires_grad=True), *(inside[i] for i in moving))
            entered = dict(zip(moving, aliases, strict=True))
            out = self.call(fn, spec, [entered.get(i, x) for i, x in enumerate(inside)], rest, kind)
        asked = [get_gradient_edge(alias) for alias in aliases]
        outputs = {name: (get_gradient_edge(y), y.dtype) for name, y in out.items() if y.requires_grad}

        def pullback(arrived: Mapping[str, Tensor]) -> Tree:
            given = [(*outputs[name], arrived[name]) for name in outputs if name in arrived]
            edges, cotangents = [edge for edge, _, _ in given], [x.to(dtype) for _, dtype, x in given]
            found = torch.autograd.grad(edges, asked, cotangents, allow_unused=True)
            grads = {i: x for i, x in zip(moving, found, strict=True) if x is not None}
            return tree.unflatten(spec, [grads[i] if i in grads else torch.zeros(n, **of) for i, (n, of) in enumerate(like)])

        return {name: y.detach() for name, y in out.items()}, frozenset(outputs), pullback

    def call(self, fn: Block, spec: Any, leaves: list[Tensor], rest: Tree, kind: Hashable) -> Values:
        """The forward pass."""
        return fn(tree.unflatten(spec, leaves), rest)


def why_not_compile() -> str | None:
    """One line on what this machine lacks to compile; None where nothing is missing."""
    if torch.cuda.is_available():
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "Python.h is missing (install the Python headers, e.g. python3-dev)"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "no C++ compiler (g++ or clang++) is installed"
    return None


FUNC, AUTOGRAD = Func(), Autograd()


def checkpoint(fn: Callable[..., Any], *tensors: Tensor) -> Any:
    """`fn(*tensors)` whose residuals are dropped: backward runs `fn` again. Eager engines; differentiable many times."""
    return _Checkpoint.apply(fn, *tensors)


class _Checkpoint(torch.autograd.Function):
    """Its backward is a checkpoint too, of fn's pullback: so the vjp is taken in a forward, where vmap has a rule for it."""

    @staticmethod
    def forward(fn: Callable[..., Any], *tensors: Tensor) -> Any:
        return fn(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.fn = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        fn, tensors = ctx.fn, ctx.saved_tensors
        moving = [i for i, t in enumerate(tensors) if t.is_floating_point()]

        def pull(*given: Tensor) -> tuple[Tensor, ...]:
            cts, now = given[: len(cotangents)], list(given[len(cotangents) :])

            def on_moving(*values: Tensor) -> Any:
                for i, value in zip(moving, values, strict=True):
                    now[i] = value
                return fn(*now)

            out, back = torch.func.vjp(on_moving, *(now[i] for i in moving))[:2]
            return back(cts if isinstance(out, tuple) else cts[0])

        grads = dict(zip(moving, _Checkpoint.apply(pull, *cotangents, *tensors), strict=True))
        return None, *(grads.get(i) for i in range(len(tensors)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], fn: Callable[..., Any], *tensors: Tensor) -> Any:
        mapped = torch.vmap(fn, in_dims[1:], randomness=info.randomness)
        out = _Checkpoint.apply(lambda *xs: mapped(*xs), *tensors)
        return out, (0,) * len(out) if isinstance(out, tuple) else 0
