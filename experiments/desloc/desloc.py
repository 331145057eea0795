"""What does a byte between replicas buy? Held-out loss against bytes sent, by data parallelism and by meeting less often.

    python experiments/desloc/desloc.py [--steps 240] [--replicas 4] [--period 16] [--cache runs/cache] [--out FOLDER]

Writes results.json, table.md and desloc.png. Replicas are ranks of a virtual mesh: the program is the one that torchrun runs,
and its transports count what a replica hands to collectives. Text is the source of this Python's standard library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from fmegatron import data, models, optim, train
from fmegatron.data.batches import held_out_batches
from fmegatron.data.place import reading
from fmegatron.sharding import RULES, Sharding, virtual_mesh
from fmegatron.sharding.traffic import counted
from fmegatron.train.evaluate import held_out, make_evaluate
from fmegatron.train.meeting import make_average
from fmegatron.train.semisync import SemiSync

SEQ, BATCH, VOCAB, RATE = 64, 16, 512, 3e-3
HERE = Path(__file__).parent


def methods(period):
    """{name: when replicas meet}; None is plain data parallelism."""
    nesterov, lighter = (optim.sgd(0.7, momentum=m, nesterov=True) for m in (0.9, 0.5))
    return {
        "DDP": None,
        f"Local Adam, K = {period}": SemiSync(period, period),
        f"DES-LOC, {period}/{3 * period}/{6 * period}": SemiSync(period, {"mu": 3 * period, "nu": 6 * period}),
        f"parameters only, K = {period}": SemiSync(period),
        f"DiLoCo, H = {period}": SemiSync(period, outer=nesterov),
        f"DiLoCo, H = {period}, momentum 0.5": SemiSync(period, outer=lighter),
        f"streaming DiLoCo, H = {period}, 2 fragments": SemiSync(period, outer=nesterov, fragments=2),
    }


def run(rule, corpus, steps, replicas, every):
    """Loss by step, held-out loss by step, bytes that a replica handed over by step (metrics left out)."""
    mesh, traffic = counted(virtual_mesh(replica=replicas))
    sh = Sharding(mesh, replace(RULES["ddp"], apart="replica" if rule else None))
    model = models.llama3("debug", layers=2, embed=64, heads=4, kv=2, mlp=176, vocab=corpus.vocab_size)
    rate = optim.cosine(RATE, warmup=steps // 10, steps=steps)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, betas=(0.9, 0.95), weight_decay=0.0))
    state = train.init(model, tx, sh, key=0, semisync=rule)
    step = train.make_step(model, tx, sh, semisync=rule)
    evaluate, average = make_evaluate(model, sh), make_average(model, sh)
    feed = data.batches(corpus, sh, seq=SEQ, global_batch=BATCH, seed=0)
    losses, heldout, sent, start = [], [], [], time.perf_counter()
    for done, batch in enumerate(itertools.islice(feed, steps), 1):
        traffic.clear()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0]))
        sent.append(sum(e.bytes for e in traffic.events[0] if e.kind == "issue" and e.bytes > 8 * len(metrics)))
        if done % every == 0 or done == steps:
            rows = corpus.held_out(SEQ, 64, limit=256)
            numbers = held_out(evaluate, average(state.params), held_out_batches(rows, **reading(sh)), None)
            heldout.append([done, numbers["heldout_loss"]])
    feed.close()
    size = model.count()
    return {"loss": losses, "heldout": heldout, "bytes": sent, "parameters": size, "seconds": time.perf_counter() - start}


def table(found):
    """The results as Markdown."""
    first = next(iter(found["runs"].values()))
    ddp = sum(first["bytes"])
    lines = ["| | held-out loss, nats a token | bytes a replica sent | of DDP's |", "|---|---|---|---|"]
    for name, one in found["runs"].items():
        total = sum(one["bytes"])
        lines.append(f"| {name} | {one['heldout'][-1][1]:.3f} | {total / 1e6:.2f} MB | 1/{ddp / max(total, 1):.1f} |")
    return "\n".join(lines) + "\n"


def draw(found, path):
    """Held-out loss against steps, and against bytes sent so far."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name, one in found["runs"].items():
        so_far = list(itertools.accumulate(one["bytes"]))
        steps, losses = zip(*one["heldout"], strict=True)
        left.plot(steps, losses, label=name)
        right.plot([max(so_far[step - 1], 1) / 1e6 for step in steps], losses, marker=".", label=name)
    left.set(xlabel="step", ylabel="held-out loss, nats a token")
    right.set(xlabel="MB sent by a replica", xscale="log")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(words=None, corpus=None):
    """Train by every method in turn; corpus: in place of the standard library."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--period", type=int, default=16)
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--only", default="", help="methods whose name holds this")
    args = parser.parse_args(words)
    corpus = corpus or data.quickstart(args.cache, vocab_size=VOCAB)
    found = {"steps": args.steps, "replicas": args.replicas, "period": args.period, "torch": torch.__version__, "runs": {}}
    for name, rule in methods(args.period).items():
        if args.only not in name:
            continue
        found["runs"][name] = run(rule, corpus, args.steps, args.replicas, max(1, args.steps // 12))
        one = found["runs"][name]
        said = f"held-out {one['heldout'][-1][1]:.3f}  {sum(one['bytes']) / 1e6:9.2f} MB  {one['seconds']:.0f} s"
        print(f"{name:44} {said}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(found))
    (args.out / "table.md").write_text(table(found))
    draw(found, args.out / "desloc.png")
    return found


if __name__ == "__main__":
    main()
