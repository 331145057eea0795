"""Compile every launch of every case for an H100, without one: the front end, Triton's passes and ptxas see each kernel.

Run as a process of its own without TRITON_INTERPRET; prints one line a kernel and shape, or fails.
"""

from __future__ import annotations

import sys

import torch
import triton
from cases import CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fmegatron.kernels import adamw, grad_norm, grouped_matmul, launch, paged

TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
         torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8"}
seen = set()


def compile_launch(kernel, args, options):
    made = kernel.made
    kinds = {p.name: p.is_constexpr for p in made.params}
    given = dict(zip(kinds, args, strict=False)) | {name: x for name, x in options.items() if name in kinds}
    assert given.keys() == kinds.keys(), kinds.keys() - given.keys()
    constants = {name: x for name, x in given.items() if kinds[name] or x is None}
    signature = {name: "constexpr" if name in constants else "*" + TYPES[x.dtype] if isinstance(x, torch.Tensor)
                 else "fp32" if isinstance(x, float) else "i32" for name, x in given.items()}
    key = (made.fn.__qualname__, made.fn.__module__, str(signature), str(constants))
    if key in seen:
        return
    seen.add(key)
    source = ASTSource(made, signature, {(made.arg_names.index(name),): x for name, x in constants.items()})
    extra = {name: x for name, x in options.items() if name not in kinds}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=extra)
    assert binary.asm["ptx"]
    print(made.fn.__module__.rsplit(".", 1)[1], made.fn.__name__, len(binary.asm["cubin"]), "bytes", flush=True)


def ahead(kernel, grid):
    return lambda *args, **options: compile_launch(kernel, args, options)


launch.Jit.__getitem__ = ahead
on_gpu = grouped_matmul.tile(True, 2)
grouped_matmul.tile = lambda cuda, itemsize: on_gpu
for case in CASES:
    if len(sys.argv) == 1 or case.name in sys.argv[1:]:
        case.run("triton", case.draw(3, torch.bfloat16))
if len(sys.argv) == 1:
    p, g, word = torch.ones(32), torch.ones(32).bfloat16(), torch.zeros((), dtype=torch.int64)
    kept = {"bf16": g, "fp16": g.half(), "fp8": g.to(torch.uint8), "fp8 root": g.to(torch.uint8)}
    places = {"rows": word[None], "columns": torch.arange(32), "first_key": word, "second_key": word}
    shifts = {f"{name}_shift": torch.zeros(1, dtype=torch.int8) for name in ("first", "second")}
    adamw.adamw(adamw.Adam(), [adamw.Leaf(g, p, p, p, p)], form="triton")
    for kind, moment in kept.items():
        leaf = adamw.Leaf(g, g, moment, moment, p, low=torch.zeros(32, dtype=torch.int16), **places, **shifts)
        adamw.adamw(adamw.Adam(kinds=(kind, kind)), [leaf], form="triton")
    grad_norm.norm([g], form="triton")
    pool, table = torch.ones(4, 16, 2, 128).bfloat16(), torch.zeros(2, 3, dtype=torch.int32)
    paged.append(pool, pool, pool[0], pool[0], torch.zeros(16, dtype=torch.int64), form="triton")
    q, options = torch.ones(2, 8, 128).bfloat16(), {"window": 9, "softcap": 3.0}
    paged.decode(q, pool, pool, table, table[:, 0], scale=0.1, form="triton", **options)
print(len(seen), "kernels")
