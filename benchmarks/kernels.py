"""Our kernels on one GPU against copying memory, torch's operators, torch.compile and Liger-Kernel, by turns in one process.

    python benchmarks/kernels.py [--only norm,loss] [--seconds 420] [--to benchmarks/RESULTS.md]

A memory-bound kernel's figure is its bytes a second, those that it must read and write at least, over the copy's measured in
the same rounds; a matmul's is FLOP/s. Each row is written as soon as it is measured: to what is printed, and to --to. No
network; liger-kernel (pip install liger-kernel) takes part where it is installed. Without a GPU, --tiny runs every row in
Triton's interpreter (TRITON_INTERPRET=1): that shows that they run, the times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import torch
import torch.nn.functional as F
from report import machine, ratio
from torch import Tensor

from fmegatron import optim, tree
from fmegatron.kernels import activation, cross_entropy, grad_norm, grouped_matmul, norm, paged, permute, rope

LIGER = importlib.util.find_spec("liger_kernel") is not None
Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """Contestants {name: what one call does}, "triton" ours; and the bytes or FLOPs of a call."""

    name: str
    runs: Mapping[str, Run]
    bytes: int = 0
    flops: int = 0


def both_ways(fn: Callable[..., Any], *tensors: Tensor) -> Run:
    """Forward and backward of fn, gradients of the floating tensors. What fails does so when it is called."""
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    wrt = [x for x in given if x.requires_grad]
    seeds: list[Tensor] = []

    def run() -> None:
        y = fn(*given)
        out = y if isinstance(y, tuple) else (y,)
        if not seeds:
            seeds.extend(torch.randn_like(x) for x in out)
        torch.autograd.grad(out, wrt, seeds)

    return run


def forms(fn: Callable[..., Any], *tensors: Tensor, backward: bool = True) -> dict[str, Run]:
    """Ours, torch's operators, and these through torch.compile."""

    def ours(*xs: Tensor) -> Any:
        return fn(*xs, form="triton")

    compiled = torch.compile(fn, dynamic=False)
    wrap = both_ways if backward else (lambda f, *xs: lambda: f(*xs))
    return {"triton": wrap(ours, *tensors), "torch": wrap(fn, *tensors), "compile": wrap(compiled, *tensors)}


def rows(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """(group, its rows), made when they are asked for, so that memory is free again."""
    dtype, size = torch.bfloat16, torch.bfloat16.itemsize
    t, d, ff, vocab = (4, 16, 16, 32) if tiny else (16384, 4096, 14336, 128256)
    heads, kv, hd = (2, 1, 8) if tiny else (32, 8, 128)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def norms() -> list[Row]:
        x, r, w = draw(t, d), draw(t, d), draw(d)
        rms = forms(lambda x, w, form="reference": norm.norm(x, w, form=form), x, w)
        rms["torch's own"] = both_ways(lambda x, w: F.rms_norm(x, (d,), w, 1e-5), x, w)
        if LIGER:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            rms["liger"] = both_ways(lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-5), x, w)
        added = forms(lambda x, r, w, form="reference": norm.add_norm(x, r, w, form=form), x, r, w)
        layer = forms(lambda x, w, b, form="reference": norm.norm(x, w, b, kind="layer", form=form), x, w, w)
        layer["torch's own"] = both_ways(lambda x, w, b: F.layer_norm(x, (d,), w, b, 1e-5), x, w, w)
        return [Row("rmsnorm", rms, 5 * x.numel() * size), Row("add + rmsnorm", added, 8 * x.numel() * size),
                Row("layernorm", layer, 5 * x.numel() * size)]

    def activations() -> list[Row]:
        gate, up = draw(t, ff), draw(t, ff)
        swiglu = forms(lambda g, u, form="reference": activation.glu(g, u, form=form), gate, up)
        if LIGER:
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            swiglu["liger"] = both_ways(lambda g, u: LigerSiLUMulFunction.apply(g, u), gate, up)
        relu2 = forms(lambda x, form="reference": activation.activate(x, act="relu2", form=form), up)
        return [Row("swiglu", swiglu, 8 * up.numel() * size), Row("relu2", relu2, 5 * up.numel() * size)]

    def ropes() -> list[Row]:
        length = min(t, 4096)
        q, k = draw(t // length, length, heads, hd), draw(t // length, length, kv, hd)
        angles = torch.rand(1, length, 1, hd // 2, device=device)
        cos, sin = angles.cos(), angles.sin()
        turn = forms(lambda q, k, form="reference": rope.rotate(q, k, cos, sin, form=form), q, k)
        return [Row("rope", turn, 4 * (q.numel() + k.numel()) * size)]

    def loss() -> list[Row]:
        n = max(t // 4, 4)
        x, labels = draw(n, vocab), torch.randint(0, vocab, (n,), device=device)
        h, table = draw(n, d), draw(vocab, d)

        def ours(x: Tensor, labels: Tensor, form: str = "reference") -> Tensor:
            lse, picked, _ = cross_entropy.stats(x, labels, form=form)
            return (lse - picked).mean()

        def linear(h: Tensor, table: Tensor, labels: Tensor, form: str = "reference") -> Tensor:
            lse, picked, _ = cross_entropy.linear(h, table, labels, form=form)
            return (lse - picked).mean()

        ce, whole = forms(ours, x, labels), forms(linear, h, table, labels)
        ce["torch's own"] = both_ways(lambda x, labels: F.cross_entropy(x.float(), labels), x, labels)
        if LIGER:
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

            whole["liger"] = both_ways(lambda h, w, labels: Fused.apply(h, w, labels)[0], h, table, labels)
        return [Row("cross entropy", ce, 4 * x.numel() * size), Row("linear cross entropy", whole, flops=6 * n * vocab * d)]

    def optimizer() -> list[Row]:
        shapes = [(d, d), (ff, d), (d,)] * 4
        weights, grads = ({str(i): torch.randn(s, device=device) * 0.02 for i, s in enumerate(shapes)} for _ in range(2))
        count = sum(p.numel() for p in weights.values())

        def way(tx: optim.Transform, kernels: Any, compile: bool) -> Run:
            step, params = optim.fuse(tx, kernels), tree.map(torch.clone, weights)
            state = tx.init(params)
            return lambda: step(grads, state, params, donate=True, compile=compile)

        def ways(tx: optim.Transform) -> dict[str, Run]:
            found = {"triton": ("triton", False), "torch": ("reference", False), "compile": ("reference", True)}
            return {name: way(tx, *how) for name, how in found.items()}

        params = [torch.nn.Parameter(p.clone()) for p in weights.values()]
        for p, g in zip(params, grads.values(), strict=True):
            p.grad = g
        tx = optim.adamw(1e-3)
        fused = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=device == "cuda")
        listed = list(grads.values())
        norms = {form: lambda form=form: grad_norm.norm(listed, form=form) for form in ("triton", "reference")}
        return [Row("adamw", {**ways(tx), "torch fused": fused.step}, 28 * count),
                Row("adamw, moments in bf16", ways(optim.in_formats(tx, "bf16", "bf16")), 20 * count),
                Row("gradient norm", {"triton": norms["triton"], "torch": norms["reference"],
                                      "foreach": lambda: torch.nn.utils.get_total_norm(listed)}, 4 * count)]

    def experts() -> list[Row]:
        groups, top, wide = (2, 2, 16) if tiny else (64, 8, 1024)
        n = max(t // 4, 4)
        index = torch.rand(n, groups, device=device).topk(top).indices
        order = index.reshape(-1).argsort(stable=True)
        slot = torch.empty_like(order).scatter(0, order, torch.arange(n * top, device=device)).reshape(n, top)
        counts = torch.bincount(index.reshape(-1), minlength=groups)
        x, y, weight, w = draw(n, d), draw(n * top, d), torch.rand(n, top, device=device), draw(groups, d, wide)
        there = forms(lambda x, form="reference": permute.permute(x, slot, n * top, form=form), x)
        back = forms(lambda y, weight, form="reference": permute.unpermute(y, slot, weight, form=form), y, weight)
        offsets = counts.cumsum(0).to(torch.int32)
        product = {"triton": both_ways(lambda y, w: grouped_matmul.grouped_matmul(y, w, counts, form="triton"), y, w),
                   "torch grouped_mm": both_ways(lambda y, w: F.grouped_mm(y, w, offs=offsets), y, w)}
        return [Row("permute", there, 2 * (n + n * top) * d * size), Row("unpermute", back, (2 * n + 3 * n * top) * d * size),
                Row("grouped matmul", product, flops=6 * n * top * d * wide)]

    def decoding() -> list[Row]:
        batch, length, page = (2, 9, 4) if tiny else (64, 8192, 64)
        most = -(-length // page)
        keys, values = draw(batch * most, page, kv, hd), draw(batch * most, page, kv, hd)
        table = torch.randperm(batch * most, device=device).reshape(batch, most).to(torch.int32)
        lengths, q = torch.full((batch,), length, device=device), draw(batch, heads, hd)
        k, v = (x[table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for x in (keys, values))
        return [Row("paged decode", {
            "triton": lambda: paged.decode(q, keys, values, table, lengths, scale=0.1, form="triton"),
            "sdpa of pages in order": lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, scale=0.1, enable_gqa=True),
        }, 2 * batch * length * kv * hd * size)]

    yield from {"norm": norms, "activation": activations, "rope": ropes, "loss": loss, "optimizer": optimizer,
                "experts": experts, "decode": decoding}.items()


def timed(run: Run, device: str) -> float:
    """Seconds of one call."""
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def race(row: Row, copy: Run, copied: int, device: str, rounds: int, warm: int, notes: fresh.Notes) -> list[str]:
    """The row's cells: ours against the best of the others, and of each contestant its share of the copy, or TFLOP/s.

    A contestant that fails is named with its reason, and the others race. Raises RuntimeError where the device is broken.
    """
    runs, failed = {"copy": copy}, dict[str, str]()
    for name, run in row.runs.items():
        if (row.name, name) in notes.fatal:
            failed[name] = "it ended its process"
            continue
        try:
            notes.add("begin", row.name, name)
            run()
            timed(run, device)  # waits: what fails on the device fails here
            runs[name] = run
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"
            if fresh.broken(device):
                raise RuntimeError(f"{name}, {failed[name]}") from error
            if device == "cuda":
                torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds + warm):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found = timed(runs[name], device)
            if i >= warm:
                seconds[name].append(found)
    middle = {name: float(np.median(found)) for name, found in seconds.items()}
    others = [name for name in runs if name not in ("triton", "copy")]
    cells = ["not measured"]
    if "triton" in runs and others:
        best = min(others, key=lambda name: middle[name])
        cells = ["{:.2f} [{:.2f}, {:.2f}] {}".format(*ratio(seconds["triton"], seconds[best]), best)]
    rate = copied / middle["copy"]
    for name in row.runs:
        if name in failed:
            cells.append(f"{name} failed ({failed[name]})")
            continue
        share = f"{row.flops / middle[name] / 1e12:.0f} TFLOP/s" if row.flops else f"{row.bytes / middle[name] / rate:.2f}"
        cells.append(f"{name} {share} {middle[name] * 1e3:.3f} ms")
    return [row.name, cells[0], "; ".join(cells[1:])]


def main(argv: list[str] | None = None) -> list[list[str]]:
    """Race the rows, writing each as it is measured; the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="groups, by comma")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=420, help="after which no further group begins")
    parser.add_argument("--tiny", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    def left() -> float:
        return args.seconds - (time.time() - args.began)

    if not args.tiny and args.notes is None:
        words = [*(sys.argv[1:] if argv is None else argv), "--began", str(args.began)]
        raise SystemExit(fresh.watched(__file__, words, left))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise SystemExit("no GPU: --tiny runs every row in Triton's interpreter, its times mean nothing")
    notes, done = fresh.Notes(args.notes), list[list[str]]()
    elements = 2**12 if args.tiny else 2**28
    source, target = (torch.empty(elements, device=device, dtype=torch.bfloat16) for _ in range(2))

    def tell(line: str) -> None:
        print(line, flush=True)
        if args.to:
            with args.to.open("a") as file:
                file.write(line + "\n")

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton's interpreter"
    tell(f"\n## {datetime.datetime.now():%Y-%m-%d %H:%M}  `python benchmarks/kernels.py`\n\n{name}; {machine()}\n")
    tell("Time of ours / the best other's, below 1 is faster, median of rounds [95 % interval]; then each one's bytes a second "
         "over the copy's, or TFLOP/s, and its time, forward and backward:\n\n| kernel | ours / best | all |\n|---|---|---|")
    for group, make in rows(device, args.tiny):
        if (args.only and group not in args.only.split(",")) or left() < 0:
            continue
        try:
            made = make()
        except Exception as error:
            made = []
            tell(f"| {group} | not measured | {type(error).__name__}: {' '.join(str(error).split())[:200]} |")
        for row in made:
            if row.name in notes.done:
                continue
            if left() < 0:
                tell(f"| {row.name} | not measured | no time left |")
                continue
            copied, rounds = 2 * source.numel() * source.element_size(), (1, 1) if args.tiny else (args.rounds, 3)
            try:
                cells = race(row, lambda: target.copy_(source), copied, device, *rounds, notes)
            except RuntimeError as error:  # in turns, or of a broken device
                cells = [row.name, "not measured", " ".join(str(error).split())[:200]]
            done.append(cells)
            tell("| " + " | ".join(cells) + " |")
            if fresh.broken(device):
                fresh.end()
            notes.add("done", row.name)
    return done


if __name__ == "__main__":
    main()
