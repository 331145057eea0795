"""How evenly experts are loaded: numbers of a step's taps, layer by layer, and a picture of a whole run's.

    experts/03.max_violation     of node 3: the largest load over the mean, less one; 0 is even
    experts/03.entropy           of the router's scores, nats a token; ln(experts) is even
    experts/03.dropped           choices over an expert's capacity, of all choices
    load/03/5                    choices of expert 5 over the mean load; of models with at most SHOWN experts in all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fmegatron.train.metrics import Record

SHOWN = 1024
TAP = "tap.sum.experts/"


def loads(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{node's number: choices of each expert [experts]} in a step's metrics, from one device or stacked ranks."""
    found = {name: x for name, x in metrics.items() if name.startswith(TAP) and name.endswith(".load")}
    return {name.removeprefix(TAP).removesuffix(".load"): x.reshape(-1, x.shape[-1])[0] for name, x in found.items()}


def numbers(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A step's metrics with the 0-D numbers above in place of the experts' taps."""
    out = {name: x for name, x in metrics.items() if not name.startswith(TAP)}
    every = loads(metrics)
    for layer, load in every.items():
        place, choices = f"experts/{layer}", load.sum().clamp(min=1)
        tokens = metrics[f"{TAP}{layer}.tokens"].reshape(-1)[0]
        relative = load / load.mean().clamp(min=1e-9)
        out[f"{place}.max_violation"] = relative.max() - 1
        out[f"{place}.entropy"] = metrics[f"{TAP}{layer}.entropy"].reshape(-1)[0] / tokens
        dropped = metrics.get(f"{TAP}{layer}.dropped")
        out |= {} if dropped is None else {f"{place}.dropped": dropped.reshape(-1)[0] / choices}
        if len(every) * len(load) <= SHOWN:
            out |= {f"load/{layer}/{e}": x for e, x in enumerate(relative.unbind())}
    return out


def picture(records: Sequence[Record], path: str | Path) -> Path | None:
    """Draw each expert's load by step, a row an expert, and the largest violation of each layer; None without records of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in (records[-1] if records else ()) if name.startswith("load/")]
    if not names:
        return None
    names.sort(key=lambda name: tuple(map(int, name.split("/")[1:])))
    kept = [record for record in records if names[0] in record]
    grid = torch.tensor([[float(record[name]) for record in kept] for name in names])
    layers = list(dict.fromkeys(name.split("/")[1] for name in names))
    figure = Figure(figsize=(9, 1.5 + 0.12 * len(names)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    steps, rows = [record["step"] for record in kept], len(names) - 0.5
    look = {"aspect": "auto", "cmap": "RdBu_r", "vmin": 0, "vmax": 2, "interpolation": "nearest"}
    image = left.imshow(grid.numpy(), extent=(steps[0] - 0.5, steps[-1] + 0.5, rows, -0.5), **look)
    per = len(names) // len(layers)
    left.set_yticks([per * i + (per - 1) / 2 for i in range(len(layers))], [f"layer {int(layer)}" for layer in layers])
    for i in range(1, len(layers)):
        left.axhline(per * i - 0.5, color="black", linewidth=0.6)
    left.set(xlabel="step", title="load of each expert over the mean")
    figure.colorbar(image, ax=left)
    for layer in layers:
        right.plot(steps, [record[f"experts/{layer}.max_violation"] for record in kept], label=f"layer {int(layer)}")
    right.set(xlabel="step", title="largest load, less one", ylim=(0, None))
    right.legend(frameon=False, fontsize=7)
    figure.savefig(path)
    return Path(path)
