"""The groups `monitors`, `validation`, `log` and `profile` of a run's configuration: what is measured, how often, for whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmegatron.toml import option


@dataclass(frozen=True)
class Monitors:
    """What is measured beside loss, speed and memory: see docs/monitors.md. Intervals in steps; 0: never."""

    norms: int = option(10, "between norms of the parameters and counts of the gradient's zeros", at_least=0)
    optimizer: int = option(0, "between norms of parameters, gradients, updates and moments", at_least=0)
    per_parameter: bool = option(False, "monitors.optimizer tells these norms for each parameter too")
    activations: int = option(0, "between statistics of each layer's activations", at_least=0)
    attention: int = option(0, "between the largest attention logits of each layer", at_least=0)
    unigram: str | None = option(None, "text, or a JSON file of counts by token: the loss beside that of token frequencies")

    def __post_init__(self) -> None:
        if self.per_parameter and not self.optimizer:
            raise ValueError("monitors.per_parameter = true needs monitors.optimizer, the steps between")


@dataclass(frozen=True)
class Validation:
    """Loss on held-out text."""

    interval: int = option(100, "steps between validations; 0: only at the end", at_least=0)
    batches: int | None = option(None, "batches of each validation; none: 8", at_least=1)
    full: bool = option(False, "all of the held-out text each time, not some batches")
    sets: dict[str, Any] = option({}, "name = prefix of .bin and .idx: further held-out texts, each with numbers of its own")

    def __post_init__(self) -> None:
        if self.full and self.batches is not None:
            raise ValueError(f"validation.full = true and validation.batches = {self.batches}: drop one of the two")
        if bad := [name for name in self.sets if not name or "/" in name]:
            raise ValueError(f"validation.sets: {bad[0]!r} is no name: one without a slash")


@dataclass(frozen=True)
class Log:
    """What is told while it trains. metrics.jsonl is always written, one object a step."""

    every: int = option(10, "steps between printed lines where there is no terminal for the bar", at_least=1)
    tensorboard: bool = option(False, "write events for TensorBoard")
    wandb: str | None = option(None, "a project of Weights & Biases to log to; offline where WANDB_MODE says so")
    report: bool = option(True, "write report.html at the end: curves, timeline, mesh, memory, settings, environment")
    prompt: str = option("def ", "start of the text generated at the end")


@dataclass(frozen=True)
class Profile:
    """A profiler's traces, for Perfetto or chrome://tracing: traces/rank-R.step-N.json in the run's folder."""

    steps: tuple[int, ...] = option((), "the first and the last step to trace")
    ranks: tuple[int, ...] = option((0,), "processes that trace")
    shapes: bool = option(False, "note shapes of operands")
    stack: bool = option(False, "note the source line of each call")
    memory: bool = option(False, "note allocations")

    def __post_init__(self) -> None:
        if self.steps and (len(self.steps) != 2 or not 1 <= self.steps[0] <= self.steps[1]):
            raise ValueError(f"profile.steps = {list(self.steps)}: the first and the last step, such as [10, 12]")
        if not self.steps and (self.shapes or self.stack or self.memory):
            raise ValueError("profile.shapes, stack and memory need profile.steps, the first and the last step to trace")
