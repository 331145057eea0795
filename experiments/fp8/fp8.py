"""What few bits cost: loss on real text (Python's own standard library) by recipe, beside bf16 and fp32.

    python experiments/fp8/fp8.py [--steps 150] [--recipes tensorwise,nvfp4] [--out experiments/fp8]

A Llama of 4 layers and 64 features; the same weights, batches and learning rates for all, matrix products of the two middle
layers by each recipe, everything else in fp32: so a curve shows what a recipe's rounding does, and nothing else's. bf16 (the
whole model, as it is trained otherwise) runs beside them as the yardstick; it is compiled, since a CPU without bf16 arithmetic
takes minutes for it otherwise. `nudged` is fp32 with a learning rate larger by a hundredth of a percent: how far two runs grow
apart of which neither is wrong, so what a difference has to exceed to mean something.

Writes, after each run, losses.json, losses.png (training loss, and its difference to fp32's, smoothed) and table.md: held-out
loss after the last step, and its differences to fp32's and bf16's. `--runs` holds the runs' own folders.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

from fmegatron import config, toml
from fmegatron.train import metrics
from fmegatron.train.loop import run

RATE = 4e-3
BASE = {
    "model": {"preset": "llama3:quickstart", "overrides": {"layers": 4, "embed": 64, "heads": 4, "kv": 2, "mlp": 192}},
    "data": {"seq": 128, "vocab_size": 2048},
    "training": {"global_batch": 8, "dtype": "fp32", "compile": False},
    "optimizer": {"lr": RATE, "warmup": 20},
    "validation": {"interval": 0, "batches": 8},
    "checkpoint": {"interval": 0},
    "log": {"prompt": ""},
}
PLAIN = ("bf16", "fp32", "nudged")
BLOCKS = {"blockwise": 32}  # 64 features leave nothing to see of blocks of 128


def settings(name: str, steps: int, folder: Path) -> config.RunConfig:
    """A run's configuration."""
    more = {"run": {"dir": str(folder / name), "fresh": True}, "training": BASE["training"] | {"steps": steps}}
    if name == "bf16":
        more["training"] |= {"dtype": "bf16", "compile": True}
    if name == "nudged":
        more["optimizer"] = BASE["optimizer"] | {"lr": RATE * 1.0001}
    if name not in PLAIN:
        history = {"history": 16, "algorithm": "max"} if name == "delayed" else {}
        more["fp8"] = {"recipe": name, "first": 1, "last": 1} | history | ({"block": BLOCKS[name]} if name in BLOCKS else {})
    return toml.update(config.RunConfig(), BASE | more, "fp8.py")


def losses(folder: Path) -> tuple[list[float], float]:
    """Training losses by step, and the last held-out loss."""
    records = metrics.read(folder / "metrics.jsonl")
    return [record["loss"] for record in records], records[-1]["heldout_loss"]


def picture(found: dict[str, tuple[list[float], float]], path: Path, width: int = 20) -> None:
    """Training losses, and their differences to fp32's, running means."""
    from matplotlib.figure import Figure

    colors = {name: "black" if name == "fp32" else f"C{i}" for i, name in enumerate(found)}
    left, right = (figure := Figure((11, 4.5))).subplots(1, 2)
    base = found["fp32"][0]
    for name, (line, _) in found.items():
        gap = [a - b for a, b in zip(line, base, strict=True)]
        steps = range(width, len(line) + 1)
        dashes = "--" if name == "nudged" else "-"
        left.plot(steps, smooth(line, width), dashes, label=name, color=colors[name])
        right.plot(steps, smooth(gap, width), dashes, label=name, color=colors[name])
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="training loss less fp32's")
    right.legend()
    figure.suptitle(f"running means over {width} steps")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def smooth(line: list[float], width: int) -> list[float]:
    """A running mean; as short as the line where that is shorter."""
    return [sum(line[i : i + width]) / width for i in range(len(line) - width + 1)]


def main(words: list[str] | None = None) -> dict[str, tuple[list[float], float]]:
    """The command; returns {recipe: (losses, held-out loss)}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--recipes", default="tensorwise,delayed,rowwise,blockwise,mxfp8,nvfp4")
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(words)
    names = [*PLAIN, *given.recipes.split(",")]
    seconds: dict[str, float] = {}
    for name in names:
        start = time.perf_counter()
        run(settings(name, given.steps, given.runs))
        seconds[name] = time.perf_counter() - start
        if len(seconds) >= len(PLAIN):  # what is done stands, whatever becomes of the rest
            found = {done: losses(given.runs / done) for done in seconds}
            write(found, seconds, given.steps, given.out)
    return found


def write(found: dict[str, tuple[list[float], float]], seconds: dict[str, float], steps: int, out: Path) -> None:
    """losses.json, losses.png and table.md of the runs so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "losses.json").write_text(json.dumps({name: [round(x, 5) for x in line] for name, (line, _) in found.items()}))
    picture(found, out / "losses.png")
    fp32, bf16 = found["fp32"][1], found["bf16"][1]
    rows = [f"| {name} | {last:.4f} | {last - fp32:+.4f} | {last - bf16:+.4f} | {seconds[name]:.0f} s |"
            for name, (_, last) in found.items()]  # fmt: skip
    head = [f"`python experiments/fp8/fp8.py --steps {steps}`, {date.today()}, {platform.machine()} CPU, one seed.",
            "Recipes are emulated in two of four layers of an fp32 model; bf16 is the whole model.", "",
            "| recipe | held-out loss | less fp32's | less bf16's | run |", "|---|---|---|---|---|"]  # fmt: skip
    (out / "table.md").write_text("\n".join([*head, *rows, ""]))


if __name__ == "__main__":
    main()
