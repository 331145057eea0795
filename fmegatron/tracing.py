"""Python of blocks and of optimizers as graphs of operators, compiled: what a first step's seconds go into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from functorch.compile import aot_function, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fmegatron import tree
from fmegatron.inductor import compile_graph


@dataclass
class Traced:
    """What is learned of a block while it is compiled: its forward when it is first called, its backward when that is.

    done: called when both are there.
    """

    done: Callable[[Traced], None]
    programs: list[Any] = field(default_factory=list)  # forward, backward
    results: list[Any] = field(default_factory=list)  # of the forward, abstract: outputs, then what it saves
    strides: list[tuple[int, ...]] = field(default_factory=list)  # of what the backward is given: saved, then cotangents

    def compile(self, gm: Any, inputs: Any, backward: bool) -> Callable[..., Any]:
        """`compile_graph`, noted."""
        results = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        if backward:
            self.strides = [tuple(x.stride()) for x in inputs]
        else:
            self.results = [node.meta["val"] for node in results]
        with unset_fake_temporarily():
            self.programs.append(compile_graph(gm, inputs, backward))
        if backward:
            self.done(self)
        return Graph(self.programs[-1], [None if node is None else node.meta["val"] for node in results])


@dataclass(frozen=True)
class Graph:
    """A compiled graph; of abstract tensors it makes abstract tensors, and runs nothing. results: what it makes, abstract."""

    program: Callable[..., Any]
    results: list[Tensor | None]
    _boxed_call: ClassVar[bool] = True  # takes a list, which it empties: so AOTAutograd asks

    def __call__(self, args: list[Any]) -> Any:
        if not any(isinstance(x, FakeTensor) for x in args):
            return self.program(args)
        args.clear()
        like = [x if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                for x in self.results]  # fmt: skip
        return like


def compile_block(
    fn: Callable[..., Any], spec: Any, n: int, rest_spec: Any, traced: Traced
) -> tuple[list[str], Callable[..., Any]]:
    """(names of the outputs, function of flat tensors) with compiled forward and backward.

    spec, n, rest_spec: how a tree of n leaves and that of the rest are made of flat tensors.
    """
    names: list[str] = []

    def flat_fn(*flat: Tensor) -> list[Tensor]:
        out = fn(tree.unflatten(spec, flat[:n]), tree.unflatten(rest_spec, flat[n:]))
        names[:] = list(out)
        return list(out.values())

    def partition(joint: Any, inputs: Any, **options: Any) -> Any:
        simplify(joint)
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)

    graph = aot_function(
        flat_fn,
        fw_compiler=partial(traced.compile, backward=False),
        bw_compiler=partial(traced.compile, backward=True),
        partition_fn=partition,
        decompositions={**decompositions(), **products_of_bf16()},
        num_params_buffers=n + rest_spec.num_leaves,  # inputs of fixed shapes
    )
    return names, graph


def compile_rows(fn: Callable[..., Any], spec: Any, fixed: list[Any], tensors: list[Tensor]) -> Callable[..., Any]:
    """fn as a function of [rows, *tensors], for any number of rows; fixed: leaves of its arguments, None where a tensor is."""
    env = ShapeEnv()
    fake = FakeTensorMode(shape_env=env)

    def flat(rows: Any, *given: Tensor) -> Any:
        left = iter(given)
        return fn(*tree.unflatten(spec, [next(left) if x is None else x for x in fixed]))

    def abstract(x: Tensor, i: int) -> Tensor:
        if isinstance(x, FakeTensor):  # of another mode: memory that is never touched stands for it
            x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        sizes = [DimDynamic.DUCK if x.dim() == 2 and dim == 0 else DimDynamic.STATIC for dim in range(x.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return fake.from_tensor(x.detach(), source=ConstantSource(f"x{i}"), symbolic_context=context)

    with unset_fake_temporarily(), tracing(TracingContext(fake)):
        inputs = [abstract(x, i) for i, x in enumerate(tensors)]
        rows = next(x.shape[0] for x in inputs if x.dim() == 2)
        gm = make_fx(flat, decomposition_table=decompositions())(rows, *inputs)
        compiled = compile_graph(gm, [rows, *inputs], backward=False)
        assert not env.guards, f"a kernel that asks for a number of rows: {env.guards}"
    return compiled


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions of operators.

    That of lerp with a plain number came with torch 2.12 or 2.13; before, the reference's makes a tensor of it that no traced
    graph takes.
    """
    table, scalar = dict(select_decomp_table()), torch.ops.aten.lerp.Scalar
    return {**table, scalar: lerp} if table[scalar].__module__ == "torch._refs" else table


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """start + weight (end - start), by whichever end is nearer, as the operator does."""
    return start + weight * (end - start) if abs(weight) < 0.5 else end - (end - start) * (1 - weight)


def products_of_bf16() -> dict[Any, Callable[..., Any]]:
    """Decompositions for a CPU without bf16 arithmetic: operands to fp32, multiply, round, as such an arithmetic would.

    Torch's own loops for such products are ten to fifty times slower than fp32; the casts fuse into neighbouring kernels.
    """
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return {}

    def widened(op: Any, returns: Sequence[bool]) -> Callable[..., Any]:
        def decomposed(*args: Any, **options: Any) -> Any:
            given = [*args, *options.values()]  # attention's mask is named
            if next((x.device.type for x in given if isinstance(x, Tensor) and x.dtype == torch.bfloat16), "") != "cpu":
                return NotImplemented
            wide = [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in given]
            out = op(*wide[: len(args)], **dict(zip(options, wide[len(args) :], strict=True)))
            if isinstance(out, Tensor):
                return out.bfloat16()
            return tuple(y.bfloat16() if rounds else y for y, rounds in zip(out, returns, strict=True))

        return decomposed

    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    products = {op.default: widened(op.default, ()) for op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)}
    products[attention.default] = widened(attention.default, (True, False))  # the logsumexp stays wide
    products[backward.default] = widened(backward.default, (True, True, True))
    return products


def simplify(joint: Any) -> None:
    """Inductor's passes over a graph of forward and backward, in place.

    Left out are the patterns that find attention in products and a softmax: to make them takes a second of each process.
    """
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.fx_passes.post_grad import remove_noop_ops
    from torch._inductor.fx_passes.replace_random import replace_random_passes

    remove_noop_ops(joint.graph)
    joint_graph.constant_fold_uniform_value(joint)
    for patterns in (joint_graph.early_patterns, *joint_graph.pass_patterns):
        patterns.apply(joint.graph)
    replace_random_passes(joint)
    stable_topological_sort(joint.graph)
    joint.graph.lint()
    joint.recompile()


def cacheable(inputs: Sequence[Tensor] = ()) -> TracingContext:
    """Where graphs are compiled: Inductor asks its cache on disk only where symbolic shapes have a place; ours have none."""
    return TracingContext(detect_fake_mode(inputs) or FakeTensorMode(shape_env=ShapeEnv()))
