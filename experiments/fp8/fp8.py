"""What few bits cost: loss on real text (Python's own standard library) by recipe, beside bf16 and fp32.

    python experiments/fp8/fp8.py [--steps 300] [--recipes tensorwise,nvfp4] [--out experiments/fp8]

A Llama of 4 layers and 128 features; the same weights, batches and learning rates for all, matrix products of the middle
layers by each recipe, everything else in bf16. Writes losses.json, losses.png (difference to bf16, smoothed) and table.md:
held-out loss after the last step, and its difference to bf16's. Runs under fmegatron train, so `--out` holds its folders.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path

from fmegatron import config, toml
from fmegatron.train import metrics
from fmegatron.train.loop import run

BASE = {
    "model": {"preset": "llama3:quickstart", "overrides": {"layers": 4, "embed": 128, "heads": 4, "kv": 2, "mlp": 384}},
    "data": {"seq": 128, "vocab_size": 2048},
    "training": {"global_batch": 8, "dtype": "bf16", "compile": False},
    "optimizer": {"lr": 2e-3, "warmup": 30},
    "validation": {"interval": 0, "batches": 16},
    "checkpoint": {"interval": 0},
    "log": {"prompt": ""},
}
PLAIN = ("fp32", "bf16")
BLOCKS = {"blockwise": 32}  # 128 features leave nothing to see of blocks of 128


def settings(name: str, steps: int, folder: Path) -> config.RunConfig:
    """A run's configuration."""
    more = {"run": {"dir": str(folder / name), "fresh": True}, "training": BASE["training"] | {"steps": steps}}
    if name == "fp32":
        more["training"] |= {"dtype": "fp32"}
    if name not in PLAIN:
        history = {"history": 16, "algorithm": "max"} if name == "delayed" else {}
        more["fp8"] = {"recipe": name, "first": 1, "last": 1} | history | ({"block": BLOCKS[name]} if name in BLOCKS else {})
    return toml.update(config.RunConfig(), BASE | more, "fp8.py")


def losses(folder: Path) -> tuple[list[float], float]:
    """Training losses by step, and the last held-out loss."""
    records = metrics.read(folder / "metrics.jsonl")
    return [record["loss"] for record in records], records[-1]["heldout_loss"]


def picture(found: dict[str, tuple[list[float], float]], path: Path, width: int = 20) -> None:
    """Difference of the training loss to bf16's, a running mean."""
    from matplotlib.figure import Figure

    axes = (figure := Figure((8, 4.5))).subplots()
    for name, (line, _) in found.items():
        gap = [a - b for a, b in zip(line, found["bf16"][0], strict=True)]
        mean = [sum(gap[i : i + width]) / width for i in range(len(gap) - width + 1)]
        if name != "bf16":
            axes.plot(range(width, len(gap) + 1), mean, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss less bf16's", title=f"running mean over {width} steps")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(words: list[str] | None = None) -> dict[str, tuple[list[float], float]]:
    """The command; returns {recipe: (losses, held-out loss)}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recipes", default="tensorwise,delayed,rowwise,blockwise,mxfp8,nvfp4")
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(words)
    names = [*PLAIN, *given.recipes.split(",")]
    for name in names:
        run(settings(name, given.steps, given.runs))
    found = {name: losses(given.runs / name) for name in names}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "losses.json").write_text(json.dumps({name: [round(x, 5) for x in line] for name, (line, _) in found.items()}))
    picture(found, given.out / "losses.png")
    rows = [f"| {name} | {last:.4f} | {last - found['bf16'][1]:+.4f} |" for name, (_, last) in found.items()]
    head = [f"`python experiments/fp8/fp8.py --steps {given.steps}`, {date.today()}, {platform.machine()} CPU, one seed", "",
            "| recipe | held-out loss | less bf16's |", "|---|---|---|"]  # fmt: skip
    (given.out / "table.md").write_text("\n".join([*head, *rows, ""]))
    return found


if __name__ == "__main__":
    main()
