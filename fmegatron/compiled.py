"""The engine whose blocks are compiled, and elementwise functions of any number of rows that are.

A graph is found in memory, or among the programs of an earlier process (`programs`), or traced and compiled (`inductor`), which
alone takes the compiler's seconds to import.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import tracing as inside
from torch._subclasses import FakeTensor

from fmegatron import tree
from fmegatron.programs import Call, Programs, Text, foreign
from fmegatron.transforms import Autograd, Kind, Values
from fmegatron.tree import Tree


@dataclass(frozen=True)
class Compiled(Autograd):
    """Autograd over graphs that AOTAutograd traces and Inductor compiles, once per kind of block and its shapes.

    The block's Python runs on abstract tensors, two or three times: it may do anything but look at values. programs: where
    graphs are kept for later processes, whose blocks then run no Python at all; kinds are then `Kind`s.
    """

    programs: Programs | None = None
    graphs: dict[Any, Any] = field(default_factory=dict, compare=False)

    def call(self, fn: Callable[..., Values], spec: Any, leaves: list[Tensor], rest: Tree, kind: Hashable) -> Values:
        """The forward pass of the compiled joint graph."""
        assert kind is not None, "a compiled block needs a kind"
        others, rest_spec = tree.flatten(rest)
        flat = [*leaves, *others]
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in flat)
        key = (kind, spec, rest_spec, shapes)
        if key in self.graphs:
            names, graph = self.graphs[key]
            return dict(zip(names, graph(*flat), strict=True))
        name = ""
        if self.programs is not None:
            assert isinstance(kind, Kind), f"a kind without a name: {kind}"
            name = f"{kind.name} {spec} {rest_spec} {shapes}"
            pair = find_pair(self.programs, name)
            if pair is not None:
                self.graphs[key] = pair.names, pair
                return dict(zip(pair.names, pair(*flat), strict=True))
        from fmegatron import inductor

        if all(isinstance(graph, Pair) for _, graph in self.graphs.values()):  # the first that is compiled here
            inductor.warm_up()
        from fmegatron import tracing

        context = tracing.cacheable(flat)

        def done(traced: tracing.Traced) -> None:
            if self.programs is not None:
                keep_pair(self.programs, name, names, traced, context.fw_metadata)

        self.graphs[key] = names, graph = tracing.compile_block(fn, spec, len(leaves), rest_spec, tracing.Traced(done))
        with inside(context):
            return dict(zip(names, graph(*flat), strict=True))


def abstract(tensors: Sequence[Any]) -> bool:
    """Whether these are abstract: a step that is compiled before it runs, see `train.ahead`."""
    return any(isinstance(x, FakeTensor) for x in tensors)


# -- a block found --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Out:
    """An output of a block: its shape, dtype, whether gradients flow through it, and then its cotangent's strides."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None

    def cotangent(self, given: Tensor | None, device: torch.device) -> Tensor:
        """What arrived, laid out as the backward was compiled for."""
        assert self.stride is not None
        if given is not None and given.stride() == self.stride:
            return given
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return made.zero_() if given is None else made.copy_(given)


@dataclass(frozen=True)
class Pair:
    """A block's forward and backward as programs; called with the block's flat tensors, it is one node of autograd's graph."""

    names: list[str]
    outputs: list[Out]
    forward: Call
    backward: Call

    def __call__(self, *flat: Tensor) -> Sequence[Tensor]:
        made: Sequence[Tensor] = _Pair.apply(self, *flat)
        return made


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: Pair, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.pair, ctx.device, ctx.abstract = pair, flat[0].device, None
        if abstract(flat):
            ctx.abstract = flat
            made = tuple(torch.empty(kind.shape, dtype=kind.dtype, device=ctx.device) for kind in pair.outputs)
        else:
            made = tuple(pair.forward(list(flat)))
        out, saved = made[: len(pair.outputs)], made[len(pair.outputs) :]
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for y, kind in zip(out, pair.outputs, strict=True) if kind.stride is None))
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if ctx.abstract is not None:
            return None, *(torch.empty_like(x) if x.requires_grad else None for x in ctx.abstract)
        args = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # the program frees what it has read
        outputs = zip(cotangents, ctx.pair.outputs, strict=True)
        args += [kind.cotangent(x, ctx.device) for x, kind in outputs if kind.stride is not None]
        return None, *ctx.pair.backward(args)


def find_pair(programs: Programs, name: str) -> Pair | None:
    """A block's pair that an earlier process kept: the inverse of `keep_pair`."""
    found = programs.find(name)
    if found is None:
        return None
    (forward, backward), facts = found
    outputs = [Out(tuple(shape), getattr(torch, dtype), None if stride is None else tuple(stride))
               for shape, dtype, stride in facts["outputs"]]  # fmt: skip
    return Pair(facts["names"], outputs, forward, backward)


def keep_pair(programs: Programs, name: str, names: list[str], traced: Any, meta: Any) -> None:
    """Keep a block's forward and backward, where AOTAutograd does around them what `Pair` does and no more.

    traced: `tracing.Traced`; meta: AOTAutograd's own words on what the block returns.
    """
    plain = all(out.output_type.name in ("non_alias", "unsafe_view_alias") for out in meta.output_info)
    plain &= not any(x.mutates_data or x.mutates_metadata for x in meta.input_info) and not meta.tokens
    if not plain:
        return
    results = traced.results[: len(names)]
    saved = len(traced.results) - len(names)
    strides = iter(traced.strides[saved:])
    outputs = [(list(y.shape), str(y.dtype).removeprefix("torch."), next(strides) if out.requires_grad else None)
               for y, out in zip(results, meta.output_info, strict=True)]  # fmt: skip
    assert next(strides, None) is None, f"{name}: cotangents of no output"
    keep(programs, name, traced.programs, {"names": list(names), "outputs": outputs})


def keep(programs: Programs, name: str, graphs: Sequence[Any], facts: Any) -> None:
    """Keep compiled graphs for later processes, in the background; nothing where one of them needs Inductor to run."""
    from fmegatron.inductor import in_background

    texts = [written(graph) for graph in graphs]
    if all(texts):
        in_background(lambda: programs.keep(name, [text() for text in texts if text], facts))


def written(graph: Any) -> Callable[[], Text] | None:
    """What Inductor wrote of a graph, once its library is built; None where that needs Inductor, constants or a GPU."""
    kernels = getattr(graph.current_callable, "__globals__", {}).get("kernels")
    if kernels is None or graph.constants or graph.frozen_param_names or graph.torchbind_constants or graph.inputs_to_check:
        return None
    whole = ast.parse(graph.source_code)
    call = next(node for node in ast.walk(whole) if isinstance(node, ast.FunctionDef) and node.name == "call")
    call.args.args = call.args.args[-1:]  # without self
    python = ast.unparse(call)
    return None if foreign(python, kernels.names) else lambda: Text(python, kernels.file(), kernels.names)


# -- functions of rows ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """`fn` of constants and trees of tensors, compiled once for any number of rows, from two up, that its matrices have.

    Traced as it is, without Dynamo, which would cost a start as much as the compiler does. name: of fn, among `programs`.
    """

    fn: Callable[..., Any]
    programs: Programs | None = None
    name: str = ""
    graphs: dict[Any, Any] = field(default_factory=dict, compare=False)

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        given: tree.Tree = list(args)
        leaves, spec = tree.flatten(given)
        tensors = [x.contiguous() for x in leaves if isinstance(x, Tensor)]
        rows = next(len(x) for x in tensors if x.dim() == 2)
        assert rows > 1 and all(len(x) == rows for x in tensors if x.dim() == 2), [x.shape for x in tensors]
        fixed = [None if isinstance(x, Tensor) else x for x in leaves]
        key = (spec, *fixed, *((x.shape[x.dim() == 2 :], x.dtype, x.device) for x in tensors))
        if key not in self.graphs:
            self.graphs[key] = self._graph(f"{self.name} {key}", spec, fixed, tensors)
        if abstract(tensors):
            return tuple(self.fn(*args))
        return tuple(self.graphs[key]([rows, *tensors]))

    def _graph(self, name: str, spec: Any, fixed: list[Any], tensors: list[Tensor]) -> Call:
        found = self.programs.find(name) if self.programs is not None else None
        if found is not None:
            return found[0][0]
        from fmegatron import tracing

        graph = tracing.compile_rows(self.fn, spec, fixed, tensors)
        if self.programs is not None:
            keep(self.programs, name, [graph], None)
        return graph
