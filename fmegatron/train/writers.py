"""Where a run's records go, as its configuration says."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

from fmegatron.train import metrics
from fmegatron.train.assemble import Parts


def writers(parts: Parts, stack: ExitStack, done: int) -> list[metrics.Writer]:
    """metrics.jsonl, and what else is asked for, of a run that goes on after `done` steps; `stack` closes them."""
    log, folder = parts.config.log, parts.folder
    found: list[metrics.Writer] = [metrics.JsonLines(folder / "metrics.jsonl", after=done)]
    if log.tensorboard:
        found.append(metrics.TensorBoard(folder / "tensorboard", after=done))
    if log.wandb:
        found.append(metrics.WandB(folder, log.wandb, parts.config.run.name, asdict(parts.config)))
    for writer in found:
        stack.callback(writer.close)
    return found
