"""What all kernels share: how Triton is reached, and how a kernel takes part in torch's transforms.

A kernel's file holds its formula as a few lines of torch (`reference`) and the same as Triton; a caller chooses by `form`:

    reference   torch's operators: any device, dtype and transform; in a compiled block Inductor fuses them
    triton      our kernel: CUDA tensors, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1, slow, for tests)

Triton is imported by the first launch. Under torch.func a kernel's first derivatives are its own, second ones are those of
its reference, and so is everything forward-mode; vmap runs it once for each member of the batch.
"""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Form = Literal["reference", "triton"]
Tensors = tuple[Tensor | None, ...]
Pull = Callable[[Tensors, Tensors], Sequence[Tensor]]  # kept, cotangents -> gradients


def choose(wanted: Literal["reference", "triton", "auto"], device: torch.device) -> Form:
    """The form to run on a device: auto is triton on CUDA where it is installed. ValueError where triton cannot run."""
    if wanted not in ("reference", "triton", "auto"):
        raise ValueError(f"kernels = {wanted!r}: it is reference, triton or auto")
    here = importlib.util.find_spec("triton") is not None
    if wanted == "auto":
        return "triton" if here and device.type == "cuda" else "reference"
    if wanted == "triton" and not here:
        raise ValueError("kernels = triton: the package is not installed, pip install triton, or use kernels = reference")
    if wanted == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"kernels = triton: {device.type} needs TRITON_INTERPRET=1 (slow), or use kernels = reference")
    return wanted


# -- launching ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Jit:
    """A function in Triton's language, compiled (or interpreted) from its first launch on: kernel[grid](...).

    It finds `tl`, and other Jit functions of its file, in a copy of its file's names: importing the file imports no Triton.
    """

    fn: Any

    @cached_property
    def made(self) -> Any:
        """Triton's form of it."""
        import triton
        import triton.language as tl

        used = {name: x.made for name in self.fn.__code__.co_names if isinstance(x := self.fn.__globals__.get(name), Jit)}
        own = types.FunctionType(self.fn.__code__, {**self.fn.__globals__, **used, "tl": tl}, self.fn.__name__)
        for name in ("__annotations__", "__module__", "__qualname__"):
            setattr(own, name, getattr(self.fn, name))
        return triton.jit(own)

    def __call__(self, *args: Any) -> Any:
        """Only inside of another Jit function, which finds Triton's form of this one."""
        raise TypeError(f"{self.fn.__name__} is written in Triton's language: launch it as kernel[grid](...)")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            if all(grid):
                with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
                    self.made[grid](*args, **options)

        return launch


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """[..., n] as rows [m, n] whose features lie side by side: a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def programs(x: Tensor, each: int = 4) -> int:
    """How many programs keep the device of x busy: `each` a multiprocessor; 2 in the interpreter."""
    return each * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def wide(x: Tensor) -> Any:
    """Triton's dtype to compute in: fp64 for fp64, else fp32."""
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


# -- as operators ---------------------------------------------------------------------------------------------------
def op(name: str, schema: str, empty: Callable[..., Any], fill: Callable[..., None]) -> Callable[..., Any]:
    """The operator fmegatron::name, whose results are `empty(*args)`, filled by `fill(results, *args)`.

    `empty` alone is what it does to fake tensors, so tracing and running cannot disagree about shapes.
    """

    def run(*args: Any) -> Any:
        out = empty(*args)
        fill(out, *args)
        return out

    made = torch.library.custom_op(f"fmegatron::{name}", run, mutates_args=(), schema=schema)
    made.register_fake(empty)

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        out = [made(*(pick(x, dim, i) for x, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        if isinstance(out[0], Tensor):
            return torch.stack(out), 0
        return tuple(torch.stack(same) for same in zip(*out, strict=True)), (0,) * len(out[0])

    made.register_vmap(one_by_one)
    return made


def pick(x: Any, dim: Any, i: int) -> Any:
    """Member i of a vmap's argument, or of a list of them."""
    if isinstance(x, list | tuple):
        return [pick(y, d, i) for y, d in zip(x, dim, strict=True)] if isinstance(dim, list | tuple) else x
    return x if dim is None else x.select(dim, i)


# -- derivatives ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)  # the Dynamo of torch 2.11 hashes it before its fields are set
class Kernel:
    """A differentiable kernel of tensors (some may be None).

    reference(*inputs) -> outputs         in torch, a tensor or a tuple
    forward(*inputs) -> (*outputs, *residuals)
    keep(inputs, outputs) -> kept         what the backward needs
    backward(kept, cotangents) -> grads   one for each of `moving`; a cotangent of None is zeros
    pull(kept, cotangents) -> grads       the same in torch, for second derivatives
    """

    reference: Callable[..., Any]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Pull
    outputs: int
    moving: tuple[int, ...]  # inputs with a gradient
    keep: Callable[[Tensors, Tensors], Tensors]
    pull: Pull

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Its outputs."""
        if torch.autograd.forward_ad._current_level >= 0:
            out = self.reference(*inputs)
            return out if isinstance(out, tuple) else (out,)
        done: Any = _Run.apply(self, *inputs) if torch.is_grad_enabled() else self.forward(*inputs)
        return done[: self.outputs]


def pull_of(reference: Callable[..., Any], moving: tuple[int, ...], inputs: int) -> Pull:
    """The `pull` of a kernel that keeps all its inputs first."""

    def pull(kept: Tensors, cotangents: Tensors) -> Sequence[Tensor]:
        given = list(kept[:inputs])

        def on_moving(*values: Tensor) -> tuple[Tensor, ...]:
            now = list(given)
            for i, value in zip(moving, values, strict=True):
                now[i] = value
            out = reference(*now)
            return out if isinstance(out, tuple) else (out,)

        out, back = torch.func.vjp(on_moving, *(given[i] for i in moving))[:2]
        full = tuple(torch.zeros_like(y) if ct is None else ct.to(y.dtype) for y, ct in zip(out, cotangents, strict=True))
        return back(full)

    return pull


class _Run(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: Kernel, *inputs: Any) -> Any:
        return kernel.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.kernel, ctx.inputs = inputs[0], len(inputs) - 1
        ctx.mark_non_differentiable(*output[ctx.kernel.outputs :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*ctx.kernel.keep(inputs[1:], output))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        kernel: Kernel = ctx.kernel
        if all(ct is None for ct in cotangents[: kernel.outputs]):
            return None, *(None for _ in range(ctx.inputs))
        kept = ctx.saved_tensors
        cts = cotangents[: kernel.outputs]
        once = torch.compiler.is_dynamo_compiling()  # which takes no second derivatives, and no Function inside of a backward
        grads = kernel.backward(kept, cts) if once else _Pull.apply(kernel, *kept, *cts)
        found = dict(zip(kernel.moving, grads, strict=True))
        return None, *(found.get(i) for i in range(ctx.inputs))


class _Pull(torch.autograd.Function):
    """A kernel's backward; its own derivative is that of `pull`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: Kernel, *both: Any) -> Any:
        return tuple(kernel.backward(both[: -kernel.outputs], both[-kernel.outputs :]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.kernel = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        both, n = ctx.saved_tensors, -ctx.kernel.outputs
        at = [i for i, x in enumerate(both) if x is not None and x.is_floating_point()]

        def on_moving(*values: Tensor) -> tuple[Tensor, ...]:
            now = list(both)
            for i, value in zip(at, values, strict=True):
                now[i] = value
            return tuple(ctx.kernel.pull(tuple(now[:n]), tuple(now[n:])))

        back = torch.func.vjp(on_moving, *(both[i] for i in at))[1]
        found = dict(zip(at, back(cotangents), strict=True))
        return None, *(found.get(i) for i in range(len(both)))
