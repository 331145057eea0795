"""The end of a run: a picture of its losses, and a block of text that says what came out and how to go on.

Both are made from `metrics.jsonl` and plain values, so they can be made again for any old run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from fmegatron.train import metrics

INK, TRAIN, HELDOUT, OTHERS = "#2b2b2b", "#9bb3cc", "#c0392b", ("#4d7c4d", "#8a6d3b", "#6b5b95")


def loss_curve(
    records: Sequence[metrics.Record],
    picture: str | Path,
    *,
    compressors: Mapping[str, float] | None = None,
    title: str = "",
) -> Path:
    """Draw the training curve and the held-out points as a PNG and return its path.

    In bits per byte where records have held-out `bits_per_byte` beside `heldout_loss` (their ratio brings the training
    loss, nats a token, to the same scale), else in nats a token. compressors: bits per byte of others on the held-out
    text, drawn as lines: {"gzip -9": 2.31, "xz -9": 2.05}.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [record for record in records if record.get("heldout_loss") is not None]
    points = [(record["step"], record["heldout_loss"], record.get("bits_per_byte")) for record in measured]
    ratios = [bits / nats for _, nats, bits in points if bits and nats]
    scale = sum(ratios) / len(ratios) if ratios else 1.0
    train = [(r["step"], scale * r["loss"]) for r in records if r.get("loss") is not None]
    heldout = [(step, bits if ratios else nats) for step, nats, bits in points if not ratios or bits is not None]

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN, linewidth=0.7, alpha=0.7)
        axes.plot(steps, smooth(losses), color=INK, linewidth=1.4, label="training")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color=HELDOUT, markersize=4, linewidth=1, label="held-out")
        step, value = heldout[-1]
        axes.annotate(f"{value:.3f}", (step, value), (0, -12), textcoords="offset points", ha="right", color=HELDOUT,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
    for number, (name, bits) in enumerate((compressors or {}).items() if ratios else ()):
        color = OTHERS[number % len(OTHERS)]
        axes.axhline(bits, color=color, linewidth=1, linestyle="--", label=f"{name} {bits:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if ratios else "nats per token")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.3)
    if len(train) > 20:  # the first steps of a fresh model would flatten all the rest
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, 1.1 * max(sorted(losses)[-len(losses) // 20], *(compressors or {}).values(), 0.0)))
    if train or heldout:
        axes.legend(frameon=False)
    path = Path(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """The mean over each value and its neighbours, `window` in all (default: a fortieth), fewer near the ends."""
    reach = (window or len(values) // 40) // 2
    sums = [0.0, *accumulate(values)]
    bounds = ((max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values)))
    return [(sums[high] - sums[low]) / (high - low) for low, high in bounds]


def closing(
    *,
    steps: int,
    seconds: float,
    heldout_bits_per_byte: float | None = None,
    compressors: Mapping[str, float] | None = None,
    sample: str = "",
    checkpoint: str | Path | None = None,
    picture: str | Path | None = None,
    page: str | Path | None = None,
    resume: str = "",
    generate: str = "",
) -> str:
    """The text after the last step: result beside the compressors', a sample, where things lie, how to go on."""
    rows: list[tuple[str, str]] = [("trained", f"{steps:,} steps in {duration(seconds)}")]
    if heldout_bits_per_byte is not None:
        rows.append(("held-out", f"{heldout_bits_per_byte:.4f} bits per byte"))
        for name, bits in (compressors or {}).items():
            verdict = "beaten" if heldout_bits_per_byte < bits else "not beaten"
            rows.append((name, f"{bits:.4f} bits per byte ({verdict})"))
    rows += [("loss curve", str(picture))] if picture else []
    rows += [("report", str(page))] if page else []
    rows += [("checkpoint", str(checkpoint))] if checkpoint else []
    rows += [("resume", resume)] if resume else []
    rows += [("generate", generate)] if generate else []
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if sample:
        lines = ["sample", *(f"  | {line}" for line in sample.splitlines()), "", *lines]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time as people say it: 38 s, 4 min 12 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
