"""All graphs of a step compiled before it runs: the C++ of each while the next is traced.

A step that compiles what it comes across waits for the C++ of every graph before it comes to the next. So it is run first on
abstract tensors, which have shapes and no values: its blocks are traced and given to the compiler, nothing is computed or sent,
and nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.compiled import Compiled
from fmegatron.sharding import Sharding
from fmegatron.train.garbage import paused
from fmegatron.tree import Tree


def compile_ahead(engine: Compiled, step: Callable[..., Any], sh: Sharding, *args: Tree) -> None:
    """Compile in the background all that `step(sh, *args)` will ask `engine` for.

    Nothing where it was compiled, here or by an earlier process, and on GPUs, whose compiler is not waited for so long.
    """
    if engine.graphs or sh.mesh.device != "cpu":
        return
    name, programs = name_of(sh, list(args)), engine.programs
    if programs is not None and programs.find(name) is not None:
        return
    with paused(), torch.no_grad():  # it would look through the compiler's millions of objects again and again
        from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # as much to import as all of sympy

        mode = FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False))

        def abstract(x: Any) -> Any:
            return mode.from_tensor(x.detach(), static_shapes=True) if isinstance(x, Tensor) else x

        here = sh if sh.rank is None else sh.at(abstract(sh.rank))
        given = [tree.map(abstract, x) for x in args]
        try:
            with mode:
                step(here, *given)
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass  # an optimizer that reads a value, which nothing has here: what comes after it is compiled when it runs
    if programs is not None:
        programs.keep(name, [], None)


def name_of(sh: Sharding, args: Tree) -> str:
    """What a step's graphs depend on, of what it is called with."""
    leaves, spec = tree.flatten(args)
    return f"step {sorted(sh.watch)} {spec} {[(x.shape, x.stride(), x.dtype) for x in leaves if isinstance(x, Tensor)]}"
