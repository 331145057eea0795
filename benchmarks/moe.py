"""A layer of experts, forward and backward: against transformers' blocks, a loop over experts, dense products of equal FLOPs.

    python benchmarks/moe.py [--tokens 2048] [--rounds 9] [--to benchmarks/RESULTS.md]

One process, fp32, one thread; each round runs every participant once, in turn. Memory is the most that was allocated during
forward and backward, gradients of weights included, as torch's profiler counts allocations.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from report import machine, ratio, table  # noqa: E402
from torch import Tensor  # noqa: E402

from fmegatron import tree  # noqa: E402
from fmegatron.nn import moe  # noqa: E402
from fmegatron.nn.mlp import Mlp  # noqa: E402
from fmegatron.nn.moe import Moe  # noqa: E402
from fmegatron.nn.param import init, normal  # noqa: E402
from fmegatron.sharding import SINGLE  # noqa: E402

SHAPES = {"8 experts, top 2": (8, 2, 512, 1024), "64 experts, top 8": (64, 8, 512, 256)}  # experts, k, features, width
Step = Callable[[], Any]


def ours(experts: int, k: int, d: int, width: int, x: Tensor) -> Step:
    """The layer's function and its gradients."""
    block = Moe(experts, k, mlp=width)
    sizes = {"embed": d, **block.sizes(width)}
    p = tree.map(lambda w: w.requires_grad_(), init(moe.declare(block, Mlp(), normal(0.02), normal(0.02)), sizes, 0))
    sh = SINGLE.bind(sizes)

    def step() -> Tensor:
        y, _ = moe.apply(sh, block, Mlp(), p, x, {}, None)
        return torch.autograd.grad(y.sum(), [x, *tree.leaves(p)])

    return step


def dense(experts: int, k: int, d: int, width: int, x: Tensor) -> Step:
    """A gated feed-forward block on every choice's row: the same products, of one expert."""
    rows = torch.randn(x.shape[0] * x.shape[1] * k, d, requires_grad=True)
    w = [torch.randn(*shape).mul_(0.02).requires_grad_() for shape in ((d, width), (d, width), (width, d))]

    def step() -> Any:
        y = (F.silu(rows @ w[0]) * (rows @ w[1])) @ w[2]
        return torch.autograd.grad(y.sum(), [rows, *w])

    return step


def loop(experts: int, k: int, d: int, width: int, x: Tensor) -> Step:
    """For each expert: its tokens, its three products, its weights, added where they belong."""
    router = torch.randn(experts, d).mul_(0.02).requires_grad_()
    own = [[torch.randn(*s).mul_(0.02).requires_grad_() for s in ((d, width), (d, width), (width, d))] for _ in range(experts)]

    def step() -> Any:
        flat = x.flatten(0, 1)
        weight, index = (flat @ router.t()).softmax(-1).topk(k)
        weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(flat)
        for e, (gate, up, down) in enumerate(own):
            token, choice = torch.where(index == e)
            rows = flat[token]
            out = (F.silu(rows @ gate) * (rows @ up)) @ down
            y = y.index_add(0, token, out * weight[token, choice, None])
        return torch.autograd.grad(y.sum(), [x, router, *(w for ws in own for w in ws)])

    return step


def theirs(form: str) -> Callable[..., Step]:
    """transformers' block of Mixtral or Qwen3-MoE, its experts run as `form` says."""

    def made(experts: int, k: int, d: int, width: int, x: Tensor) -> Step:
        from transformers import MixtralConfig, Qwen3MoeConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        if experts == 8:
            c: Any = MixtralConfig(hidden_size=d, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=k)
            c._experts_implementation = form
            block: Any = MixtralSparseMoeBlock(c)
        else:
            c = Qwen3MoeConfig(hidden_size=d, moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=k)
            c._experts_implementation = form
            block = Qwen3MoeSparseMoeBlock(c)
        weights = list(block.parameters())
        for w in weights:
            torch.nn.init.normal_(w, std=0.02)

        def step() -> Any:
            y = block(x)
            return torch.autograd.grad((y[0] if isinstance(y, tuple) else y).sum(), [x, *weights])

        return step

    return made


PARTICIPANTS = {
    "fmegatron": ours,
    "dense of the same FLOPs": dense,
    "transformers": theirs("eager"),
    "transformers grouped_mm": theirs("grouped_mm"),
    "loop over experts": loop,
}


def peak(step: Step) -> int:
    """The most bytes allocated at once during a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def race(
    shape: tuple[int, int, int, int], tokens: int, rounds: int, most: float
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds by round, and peak bytes, of each participant; fewer rounds, at least three, where they take `most` seconds."""
    torch.manual_seed(0)
    x = torch.randn(4, tokens // 4, shape[2], requires_grad=True)
    slow = ("transformers",) if shape[0] > 8 else ()  # its loop, which transformers itself no longer takes: 20 times slower
    steps = {name: make(*shape, x) for name, make in PARTICIPANTS.items() if name not in slow}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > most:
            break
        for name, step in turned(list(steps.items()), done):
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds, {name: peak(step) for name, step in steps.items()}


def turned(order: list[Any], by: int) -> list[Any]:
    """Another one first each round, each second round backwards: each one's neighbours leave the allocator in a state."""
    first = by % len(order)
    order = [*order[first:], *order[:first]]
    return order[::-1] if by % 2 else order


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Race, print, and add the tables to a file; {shape and peer: (ratio of seconds, ratio of peak bytes)}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=90, help="of rounds of a shape, at most")
    parser.add_argument("--note", default="one thread", help="what a reader must know of the machine's state")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, tuple[float, float]] = {}
    title = f"## Experts, {datetime.date.today()}, {args.tokens} tokens, at most {args.rounds} rounds, fp32, {args.note}"
    say(args.to, title, "", machine())
    for name, shape in SHAPES.items():
        body = []
        seconds, bytes_ = race(shape, args.tokens, args.rounds, args.seconds)
        for who, times in seconds.items():
            middle, low, high = ratio(seconds["fmegatron"], times)
            memory = bytes_["fmegatron"] / bytes_[who]
            found[f"{name}: {who}"] = middle, memory
            ms = 1e3 * sorted(times)[len(times) // 2]
            body.append([who, f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{memory:.2f}", f"{ms:.0f}",
                         f"{bytes_[who] / 1e6:.0f}"])  # fmt: skip
        say(args.to, "", *table([name, "our time / theirs", "our peak / theirs", "median ms", "peak MB"], body))
    return found


def say(to: Path | None, *lines: str) -> None:
    """Print lines, and add them to a file, as soon as they are known."""
    text = "\n".join(lines) + "\n"
    print(text, end="", flush=True)
    if to:
        with to.open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
