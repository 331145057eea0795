"""What few bits cost on real text (Python's own standard library, as bytes), by recipe, in differences of pairs.

    nice -n 19 python experiments/fp8/fp8.py [--seeds 0,1,2] [--warm 200] [--steps 200] [--recipes tensorwise,nvfp4] [--out DIR]

A Llama of 2 layers and 64 features, all of whose layers are multiplied by a recipe, is first trained in fp32 (`warm` steps; one
start, order of text and set of weights a seed). From that state:

1. Loss and gradient of the same weights on the same held-out batches, by each recipe and in fp32: the difference of the losses,
   and how far the gradient is off, |g - g32| / |g32|. Nothing but rounding differs.
2. `steps` more of training by each recipe, from the same state on the same batches: the mean training loss of the second half,
   less that of fp32's continuation. `nudged` is fp32 with a rate larger by a thousandth: what a difference has to exceed.

bf16 is the whole model computed in bf16. Means with 95 % intervals of Student's t, over seeds x batches (1) and over seeds (2).
Rows of rows.jsonl come as they are measured, a seed at a time; table.md and rounding.png are made of what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmegatron import optim, tree
from fmegatron.kernels.quantize import recipe
from fmegatron.models import Config, Model, gpt
from fmegatron.models.lower import lower
from fmegatron.sharding import SINGLE
from fmegatron.train.state import TrainState, init
from fmegatron.train.step import make_step

CONFIG = Config(layers=2, embed=64, heads=4, kv=2, mlp=192, vocab=256)
RATE, ROWS, SEQ, HELD = 4e-3, 8, 64, 8  # HELD: batches of which the first measurement is made
RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise", "mxfp8", "nvfp4")
OPTIONS: dict[str, dict[str, Any]] = {"blockwise": {"block": 32}, "delayed": {"history": 16, "algorithm": "max"}}
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


def text() -> Tensor:
    """The standard library's modules as one row of bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batch(tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """Rows from places drawn by the seed."""
    places = torch.randint(len(tokens) - SEQ - 1, (ROWS,), generator=torch.Generator().manual_seed(seed))
    rows = torch.stack([tokens[i : i + SEQ + 1] for i in places.tolist()]).long()
    return {"tokens": rows[:, :-1], "labels": rows[:, 1:]}


def model_of(name: str) -> Model:
    """The model with all layers by a recipe; fp32, bf16, nudged: as it is."""
    return lower(gpt(CONFIG), {"layers.*": recipe(name, **OPTIONS.get(name, {}))}) if name in RECIPES else gpt(CONFIG)


def trained(name: str, state: TrainState, tokens: Tensor, seeds: range, scale: float = 1.0) -> tuple[TrainState, list[float]]:
    """The state and the losses after a step of each seed's batch."""
    tx = optim.adamw(RATE * scale)
    step, losses = make_step(model_of(name), tx, SINGLE, dtype=torch.bfloat16 if name == "bf16" else None), []
    for seed in seeds:
        state, metrics = step(state, batch(tokens, seed))
        losses.append(metrics["loss"].item())
    return state, losses


def started(name: str, warm: TrainState, seed: int) -> TrainState:
    """The warm state with the leaves that a recipe has of its own (histories) as they begin."""
    own = tree.to_paths(init(model_of(name), optim.adamw(RATE), SINGLE, seed, dtype=torch.float32).params)
    params = tree.to_paths(warm.params)
    if own.keys() == params.keys():
        return warm
    fresh = init(model_of(name), optim.adamw(RATE), SINGLE, seed, dtype=torch.float32)
    moments, theirs, spec = tree.to_paths(fresh.opt_state), tree.to_paths(warm.opt_state), tree.flatten(fresh.opt_state)[1]
    return warm._replace(params=tree.from_paths({path: params.get(path, x) for path, x in own.items()}),
                          opt_state=tree.unflatten(spec, [theirs.get(path, x) for path, x in moments.items()]))  # fmt: skip


def gradient(name: str, params: Any, given: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Loss, and all gradients in one row."""
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    leaves = {path: x.detach().to(dtype).requires_grad_() for path, x in tree.to_paths(params).items()}
    terms, _ = model_of(name).loss(tree.from_paths(leaves), given)
    loss = torch.stack([total / count for total, count in terms.values()]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), torch.cat([g.detach().float().flatten() for g in grads])


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval; inf of one value."""
    x = torch.tensor(values, dtype=torch.float64)
    n = len(x)
    return x.mean().item(), (T95[n - 2] if n - 2 < len(T95) else 2.0) * x.std().item() / n**0.5 if n > 1 else float("inf")


def table(rows: list[dict[str, Any]], words: str) -> str:
    """What the rows say."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        found[row["what"], row["name"]].append(row["value"])
    names = list(dict.fromkeys(name for _, name in found))

    def cell(what: str, name: str, scale: float = 1.0) -> str:
        values = found.get((what, name), [])
        if not values:
            return ""
        mean, half = interval(values)
        return f"{mean * scale:+.2f} ± {half * scale:.2f} ({len(values)})"

    lines = [f"| {name} | {cell('held-out', name, 1e3)} | {cell('gradient', name, 100)} | {cell('training', name, 1e3)} |"
             for name in names]  # fmt: skip
    head = [f"`{words}`, {date.today()}, {platform.machine()} CPU. Mean, 95 % interval, (pairs).", "",
            "| recipe | held-out loss less fp32's, same weights, 1e-3 | gradient off by, % | training loss less fp32's, 1e-3 |",
            "|---|---|---|---|"]  # fmt: skip
    return "\n".join([*head, *lines, ""])


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """The three columns with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.6))
    titles = {"held-out": "held-out loss less fp32's, same weights", "gradient": "|g - g32| / |g32|",
              "training": "training loss less fp32's, same start"}  # fmt: skip
    for axes, (what, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        names = list(dict.fromkeys(row["name"] for row in rows if row["what"] == what))
        for i, name in enumerate(names):
            values = [row["value"] for row in rows if (row["what"], row["name"]) == (what, name)]
            mean, half = interval(values)
            axes.plot([i] * len(values), values, ".", color="lightgray")
            axes.errorbar(i, mean, half if len(values) > 1 else None, fmt="o", capsize=4, color=f"C{i}")
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(words: list[str] | None = None) -> list[dict[str, Any]]:
    """The command; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="each alone, or several at once in folders of their own")
    parser.add_argument("--warm", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(words)
    said = f"python experiments/fp8/fp8.py --seeds {given.seeds} --warm {given.warm} --steps {given.steps}"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "rows.jsonl").write_text("")
    all_text = text()
    seeds = [int(word) for word in given.seeds.split(",")]
    cut, rows, names = len(all_text) * 9 // 10, list[dict[str, Any]](), ["bf16", *given.recipes.split(",")]

    def add(what: str, name: str, seed: int, value: float) -> None:
        rows.append({"what": what, "name": name, "seed": seed, "value": value})
        with (given.out / "rows.jsonl").open("a") as out:
            out.write(json.dumps(rows[-1]) + "\n")

    def written() -> None:
        (given.out / "table.md").write_text(table(rows, said))
        picture(rows, given.out / "rounding.png")

    warm = {}
    for seed in seeds:
        first = init(gpt(CONFIG), optim.adamw(RATE), SINGLE, seed, dtype=torch.float32)
        warm[seed], _ = trained("fp32", first, all_text[:cut], range(seed * 10**6, seed * 10**6 + given.warm))
        for b in range(HELD):
            one = batch(all_text[cut:], 10**7 + b)
            loss, g = gradient("fp32", warm[seed].params, one)
            for name in names:
                if name != "delayed":  # with its history filled it rounds as tensorwise does
                    low, h = gradient(name, warm[seed].params, one)
                    add("held-out", name, seed, low - loss)
                    add("gradient", name, seed, ((h - g).norm() / g.norm()).item())
        written()
    for seed in seeds:
        order, half = range(seed * 10**6 + given.warm, seed * 10**6 + given.warm + given.steps), given.steps // 2
        _, base = trained("fp32", warm[seed], all_text[:cut], order)
        for name in ("nudged", *names):
            scale = 1.001 if name == "nudged" else 1.0
            _, losses = trained(name, started(name, warm[seed], seed), all_text[:cut], order, scale)
            gaps = [a - b for a, b in zip(losses[half:], base[half:], strict=True)]
            add("training", name, seed, sum(gaps) / len(gaps))
        written()
    return rows


if __name__ == "__main__":
    main()
