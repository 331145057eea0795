"""The groups `faults` and `local` of a run's configuration: bad numbers, hangs, lack of memory; checkpoints on nodes' disks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fmegatron.toml import option, unheard


@dataclass(frozen=True)
class Faults:
    """Bad numbers, ranks that hang or lag, memory that runs out: see docs/faults.md."""

    rerun: bool = option(False, "watch the loss; a step that is refused is run again, to tell a fault from bad data")
    spike: dict[str, Any] = option({"loss": 10.0}, "metric = factor: refused at so many times the largest of the first samples")
    spike_samples: int = option(100, "accepted steps whose largest value spikes are measured by", at_least=1)
    tolerance: float = option(0.0, "relative difference up to which a re-run counts as the same", at_least=0)
    recheck: int = option(0, "steps between ones that are computed twice and compared; 0: never", at_least=0)
    on_fault: Literal["continue", "stop"] = option("continue", "a re-run differs: take its result, or exit with code 17")
    on_bad: Literal["skip", "stop", "rollback"] = option("skip", "a re-run is as bad: leave the batch out, exit (17), ...")
    elsewhere: bool = option(False, "before on_bad: save, exit with code 16, and run the step again on other devices")
    rollback_batches: int = option(1, "left out at a rollback: the bad one and those before it", at_least=1)
    rollbacks: int = option(3, "at most; then exit with code 17", at_least=0)
    device: str | None = option(None, "name of this process's device in reports; none: host and its number or GPU")
    stragglers: int = option(0, "steps between reports of each rank's own time; 0: none", at_least=0)
    straggler_ratio: float = option(1.2, "a rank is named from so many times the median on", at_least=1)
    heartbeat: float = option(0.0, "seconds between the files that say what a rank does; 0: none", at_least=0)
    init_timeout: float = option(0.0, "seconds from rendezvous to the first step; then stacks, and exit code 18", at_least=0)
    compile_timeout: float = option(0.0, "seconds that the first step may take, compiling too; 0: init_timeout", at_least=0)
    train_timeout: float = option(0.0, "seconds that a later step may take; 0 of these three: any", at_least=0)
    memory: bool = option(True, "where memory runs out, leave a report; on a GPU its allocator's snapshot too")
    memory_history: bool = option(False, "the GPU's snapshot has the history of all allocations, which costs some time")
    inject: tuple[str, ...] = option((), 'faults for tests, as ["KIND:STEP:WHERE", ...], see docs/faults.md')

    def __post_init__(self) -> None:
        if not self.rerun:
            watched = ("spike", "spike_samples", "on_bad", "rollback_batches", "rollbacks")
            unheard("faults", self, watched, "faults.rerun = true")
        if not (self.rerun or self.recheck):
            unheard("faults", self, ("tolerance", "on_fault"), "faults.rerun = true or faults.recheck")
        if self.on_bad != "rollback":
            unheard("faults", self, ("rollback_batches", "rollbacks"), "faults.on_bad = rollback")
        if not self.stragglers:
            unheard("faults", self, ("straggler_ratio",), "faults.stragglers, the steps between reports")
        if not self.memory:
            unheard("faults", self, ("memory_history",), "faults.memory = true")


@dataclass(frozen=True)
class Local:
    """Checkpoints on each node's own disk, between the others: fast, and whole though nodes are lost."""

    folder: str | None = option(None, "on each node's own disk; none: no such checkpoints")
    interval: int = option(0, "steps between them; 0: none", at_least=0)
    factor: int = option(2, "nodes that keep each file", at_least=1)
    jump: int = option(1, "distance between those nodes", at_least=1)
