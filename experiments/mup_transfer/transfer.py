"""Does the best learning rate stay where it is as the model grows? Width and depth, with muP (CompleteP) and without.

    python experiments/mup_transfer/transfer.py [--steps 60] [--widths 1,2,4] [--out experiments/mup_transfer]

Writes transfer.json and transfer.png: loss against learning rate, a line a width, and the coordinate check: how far the last
hidden state has moved after so many steps, over width and over depth, with its initial size. Tokens come from a random chain
over 32 words.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from fmegatron import optim
from fmegatron.models import Config
from fmegatron.models.gpt import gpt
from fmegatron.models.model import run_chain
from fmegatron.sharding import SINGLE
from fmegatron.train.mup import mup, mup_adamw

BASE = Config(layers=2, embed=32, heads=2, mlp=64, vocab=32, init_scaled=False, init_std=0.15)


def config(width=1, depth=1):
    """The base with more heads and features, or more layers."""
    return replace(BASE, layers=BASE.layers * depth, embed=32 * width, heads=2 * width, mlp=64 * width)


def text(batches, batch=8, seq=32, seed=0):
    """[batches, batch, seq + 1] tokens of a Markov chain."""
    g = torch.Generator().manual_seed(seed)
    chain = torch.softmax(2.5 * torch.randn(32, 32, generator=torch.Generator().manual_seed(99)), -1)
    out = [torch.randint(32, (batches * batch,), generator=g)]
    for _ in range(seq):
        out.append(torch.multinomial(chain[out[-1]], 1, generator=g)[:, 0])
    return torch.stack(out, 1).reshape(batches, batch, seq + 1)


def build(c, lr, scaled):
    """(model, transform), in muP or in the standard parametrization."""
    if scaled:
        model, scales = mup(c, BASE)
        return model, mup_adamw(scales, lr, weight_decay=0.0)
    return gpt(c), optim.adamw(lr, weight_decay=0.0)


def loss_of(model, params, tokens):
    terms, _ = model.loss(params, {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
    value, count = terms["ce"]
    return value / count


def train(c, lr, scaled, tokens, seed=0):
    """Losses by step, first and last parameters."""
    model, tx = build(c, lr, scaled)
    params = start = model.init(seed)
    state, losses = tx.init(params), []
    for batch in tokens:
        grads, loss = torch.func.grad_and_value(lambda p, x=batch: loss_of(model, p, x))(params)
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        losses.append(float(loss))
    return losses, (model, start, params)


def hidden(model, params, tokens):
    """The residual stream behind each block, [nodes, batch, seq, embed]."""
    sh, seen = SINGLE.bind(model.sizes), []
    values = model.inputs(sh, {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
    for node in model.chain[:-2]:
        values = run_chain(model, (node,), params, values, sh=sh)
        seen.append(values["h"])
    return torch.stack(seen)


def coordinates(widths, scaled, steps=5, lr=2 ** -6, depth=False):
    """{width (or depth): (initial rms of the last hidden state, rms of its change after `steps`)}."""
    found, tokens = {}, text(steps)
    for n in widths:
        _, (model, start, end) = train(config(1, n) if depth else config(n), lr, scaled, tokens)
        with torch.no_grad():
            a, b = (hidden(model, p, tokens[0])[-1] for p in (start, end))
        found[n] = (float(a.square().mean().sqrt()), float((b - a).square().mean().sqrt()))
    return found


def sweep(widths, rates, scaled, tokens):
    """{width: {rate: mean loss over the last fifth of the steps}}."""
    last = max(len(tokens) // 5, 1)
    return {n: {lr: sum(train(config(n), lr, scaled, tokens)[0][-last:]) / last for lr in rates} for n in widths}


def picture(results, path):
    """Six panels: loss over learning rate, coordinates over width and over depth, muP (CompleteP) to the right."""
    from matplotlib.figure import Figure

    figure = Figure((9, 9))
    axes = figure.subplots(3, 2, sharey="row")
    for column, name in enumerate(("standard", "muP")):
        for n, line in results[name]["loss"].items():
            axes[0][column].plot([float(lr) for lr in line], list(line.values()), marker="o", label=f"width x{n}")
        axes[0][column].set(title=name, xlabel="learning rate", ylabel="loss at the end")
        axes[0][column].set_xscale("log", base=2)
        for row, what in enumerate(("width", "depth"), 1):
            points = results[name]["coordinates" if what == "width" else "coordinates by depth"]
            for i, label in enumerate(("initial", "change")):
                axes[row][column].plot([int(n) for n in points], [v[i] for v in points.values()], marker="o", label=label)
            axes[row][column].set_xscale("log", base=2)
            axes[row][column].set(yscale="log", xlabel=f"{what} / base", ylabel="rms of the last hidden state")
        for row in range(3):
            axes[row][column].legend()
    figure.tight_layout()
    figure.savefig(path)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--widths", default="1,2,4")
    parser.add_argument("--depths", default="1,2,4,8")
    parser.add_argument("--rates", default="-9,-8,-7,-6,-5,-4", help="powers of 2")
    parser.add_argument("--out", default=str(Path(__file__).parent))
    a = parser.parse_args(args)
    torch.set_num_threads(1)
    widths, depths = ([int(n) for n in given.split(",")] for given in (a.widths, a.depths))
    rates = [2.0 ** float(n) for n in a.rates.split(",")]
    tokens, results = text(a.steps), {}
    for name, scaled in (("standard", False), ("muP", True)):
        results[name] = {"loss": sweep(widths, rates, scaled, tokens), "coordinates": coordinates(widths, scaled),
                         "coordinates by depth": coordinates(depths, scaled, depth=True)}
        results[name]["best"] = {n: min(line, key=line.get) for n, line in results[name]["loss"].items()}
        print(name, "best learning rate by width:", results[name]["best"])
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "transfer.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(results, out / "transfer.png")


if __name__ == "__main__":
    main()
