"""A profile of a training step: its trace, its top kernels, and how far each is from its roofline.

    roofline = max(FLOPs / peak FLOP/s, bytes / memory's bytes a second)          by plan/hardware.py
    gap      = measured / roofline                                                1: as fast as the data sheet allows

A kernel's FLOPs and bytes are told by the operator that launched it and the shapes it was given, as the trace has them: a
product's and an attention's FLOPs by formula; bytes are each operand once. A kernel of Inductor's or ours is given every tensor
that it reads or writes; an operator of torch's hides its result, unless it writes into an operand: as much again as its largest
one. So bytes are what must move at least if nothing stays in a cache, and a kernel that reads a part of an operand may seem to
be faster than its roofline.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import table

from fmegatron.plan.hardware import HARDWARE, Hardware

SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4, "bool": 1,
         "unsigned char": 1, "signed char": 1, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1}  # fmt: skip
TOP = 25
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """A kernel as it ran: seconds, FLOPs and bytes of all its calls. what: the operator and its operands."""

    name: str
    what: str
    calls: int
    seconds: float
    flops: float
    bytes: float

    def roofline(self, device: Hardware) -> tuple[float, str]:
        """(seconds that the data sheet allows, what binds)."""
        kind = "fp8" if "scaled_mm" in self.what and "fp8" in device.flops else "bf16"
        work, moved = self.flops / device.flops[kind], self.bytes / device.bandwidth
        return max(work, moved), "FLOPs" if work > moved else "bytes"


def profiled(step: Callable[[], object], device: str, folder: Path, name: str) -> Path:
    """Write NAME.trace.json.gz and NAME.kernels.md of a step, after warm ones, into a folder; the latter's path."""
    cuda = device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(2):
        step()
    if cuda:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        step()
        if cuda:
            torch.cuda.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    trace, out = folder / f"{name}.trace.json.gz", folder / f"{name}.kernels.md"
    profile.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        found = kernels(json.load(file)["traceEvents"])
    out.write_text(report(found, hardware_of(torch.cuda.get_device_name() if cuda else "cpu")), encoding="utf-8")
    return out


def hardware_of(name: str) -> Hardware:
    """The data sheet of a device by its driver's name; the H100's where there is none."""
    return next((sheet for key, sheet in HARDWARE.items() if key in name.lower()), HARDWARE["h100"])


def kernels(events: Iterable[Event]) -> list[Kernel]:
    """Kernels by name and operands, the one that takes longest first; without a device's events the host's operators."""
    events = [e for e in events if e.get("ph") == "X"]
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    ran = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")] or leaves(ops)
    inner = sorted((e for e in ops if "External id" in e.get("args", {})), key=lambda e: -e["dur"])
    of = {e["args"]["External id"]: e for e in inner}
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    seen: set[Any] = set()
    for e in sorted(ran, key=lambda e: -e["dur"]):
        number = e.get("args", {}).get("External id")
        op = of.get(number)
        what = described(op) if op else ""
        # an operator of several kernels counts its work once, for the longest of them
        flops, moved = work(op) if op and number not in seen else (0.0, 0.0)
        seen.add(number)
        total = sums[e["name"], what]
        for i, x in enumerate((1, e["dur"] / 1e6, flops, moved)):
            total[i] += x
    found = [Kernel(name, what, int(n), s, f, b) for (name, what), (n, s, f, b) in sums.items()]
    return sorted(found, key=lambda kernel: -kernel.seconds)


def leaves(ops: list[Event]) -> list[Event]:
    """Operators inside of which no other runs."""
    found: list[Event] = []
    for e in sorted(ops, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        while found and found[-1]["tid"] == e["tid"] and e["ts"] < found[-1]["ts"] + found[-1]["dur"]:
            found.pop()
        found.append(e)
    return found


def shapes(op: Event) -> list[tuple[list[int], str]]:
    """(shape, type) of an operator's tensors."""
    args = op["args"]
    pairs = zip(args.get("Input Dims", []), args.get("Input type", []), strict=False)
    return [(dims, kind) for dims, kind in pairs if dims and all(isinstance(n, int) for n in dims) and kind in SIZES]


def described(op: Event) -> str:
    """An operator with its tensors."""
    tensors = (f"{'x'.join(map(str, dims))} {kind.removeprefix('c10::')}" for dims, kind in shapes(op))
    return f"{op['name']}({', '.join(tensors)})"


def work(op: Event) -> tuple[float, float]:
    """(FLOPs, bytes) of an operator's call."""
    name, tensors = op["name"], shapes(op)
    if not tensors:
        return 0.0, 0.0
    dims, widths = [shape for shape, _ in tensors], [SIZES[kind] for _, kind in tensors]
    sizes = [float(math.prod(shape) * width) for shape, width in zip(dims, widths, strict=True)]
    if "attention" in name and len(dims) > 2:
        backward = "backward" in name  # of (cotangent, q, k, v, result); forward of (q, k, v)
        moved = sum(sizes[:5]) + sum(sizes[1:4]) if backward else sum(sizes[:3]) + sizes[0]
        return attention(name, dims[1:3] if backward else dims[:2], 5 if backward else 2), moved
    found = product(name, dims)
    if found is not None:
        flops, result = found
        first = 1 if "add" in name or "badd" in name else 0
        return flops, sum(sizes[first : first + 2]) + result * max(widths[first], 2)
    own = name.startswith(("triton", "fmegatron::")) or name.endswith("_")
    return 0.0, sum(sizes) + (0 if own else max(sizes))


def product(name: str, dims: list[list[int]]) -> tuple[float, int] | None:
    """(FLOPs, elements of the result) of a matrix product; None of anything else."""
    short = name.removeprefix("aten::").removesuffix("_v2")
    dims = dims[1:] if short in ("addmm", "baddbmm") else dims
    if short not in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm") or len(dims) < 2:
        return None
    a, b = dims[:2]
    result = math.prod(a[:-1]) * b[-1]
    if "grouped" in short and len(a) == len(b) == 2:  # rows by rows, in groups: the weights' gradient, one matrix a group
        return 2.0 * a[0] * a[1] * b[1], a[0] * b[1] * (dims[2][0] if len(dims) > 2 else 1)
    return 2.0 * result * a[-1], result


def attention(name: str, dims: list[list[int]], products: int) -> float:
    """FLOPs of a causal attention with queries and keys of these shapes: so many products, half of each."""
    seq = 2 if "scaled_dot_product" in name or "cudnn" in name else 1  # inside of them [batch, seq, heads, hd]
    return products * 2.0 * math.prod(dims[0]) * dims[1][seq] / 2


def report(found: list[Kernel], device: Hardware) -> str:
    """The table of the top kernels, as Markdown."""
    total = sum(kernel.seconds for kernel in found)
    sheet = f"{device.flops['bf16'] / 1e12:g} TFLOP/s bf16, {device.bandwidth / 1e12:g} TB/s"
    body = []
    for kernel in found[:TOP]:
        least, binds = kernel.roofline(device)
        each = 1 / kernel.calls
        body.append([
            f"{kernel.seconds / total:.1%}", f"{kernel.seconds * 1e3:.3f}", kernel.calls, f"{kernel.seconds * each * 1e6:.1f}",
            f"{kernel.flops * each / 1e9:.3g}", f"{kernel.bytes * each / 1e6:.3g}",
            f"{kernel.seconds / least:.2f} ({binds})" if least else "-", kernel.name[:60], kernel.what[:110],
        ])  # fmt: skip
    head = ["share", "ms a step", "calls", "us each", "GFLOP each", "MB each", "time / roofline", "kernel", "operator"]
    first = f"{total * 1e3:.2f} ms of kernels in a step; roofline of {device.name}: {sheet} (plan/hardware.py)"
    return "\n".join([first, "", *table(head, body), ""])
