"""Everything that watches over a run's steps, in the order in which it happens: one value the loop asks.

    with Guard(config, folder, mesh, pulse, launches, step, say) as guard:
        while not guard.stops(signal, done):            somebody asks to stop
            outcome = guard.step(state, feed, done + 1)     a batch, a step, its result looked at
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from fmegatron.config import ConfigError, RunConfig
from fmegatron.data import Rows, Skip
from fmegatron.sharding import Mesh
from fmegatron.toml import unheard
from fmegatron.train.faults.ends import Ends
from fmegatron.train.faults.exits import BAD_RESULT, ELSEWHERE, Halt
from fmegatron.train.faults.inject import BAD, injected, parse
from fmegatron.train.faults.launches import Launches, noted
from fmegatron.train.faults.memory import history, memory_report
from fmegatron.train.faults.pulse import Heart, Pulse
from fmegatron.train.faults.rerun import Outcome, judged
from fmegatron.train.faults.stragglers import Stragglers
from fmegatron.train.faults.watch import Watch, spikes
from fmegatron.train.setup_batch import sizes_of
from fmegatron.train.signals import Stop, any_rank
from fmegatron.train.state import TrainState
from fmegatron.train.step import Limits, Metrics

STOP = "stop"  # the file in the run's folder


@contextmanager
def beating(c: RunConfig) -> Iterator[tuple[Pulse, Launches]]:
    """What the process does and launches, from before it meets the others; a thread writes it down and ends what hangs."""
    f, pulse, launches = c.faults, Pulse(), Launches()
    times: dict[str, Any] = {"first": f.init_timeout, "step": f.compile_timeout or f.init_timeout, "later": f.train_timeout}
    with ExitStack() as stack:
        if f.heartbeat or any(times.values()):
            device = f"{f.device or socket.gethostname()}/{os.environ.get('LOCAL_RANK', '0')}"
            where = (c.run.folder / "heartbeat", int(os.environ.get("RANK", "0")), device)
            stack.enter_context(Heart(*where, pulse, launches, every=f.heartbeat, **times))
        yield pulse, launches


def watched(mesh: Mesh, c: RunConfig, launches: Launches) -> Mesh:
    """The mesh, noting what it launches where a report will need it."""
    f = c.faults
    needed = f.stragglers or f.heartbeat or f.init_timeout or f.compile_timeout or f.train_timeout
    return noted(mesh, launches) if needed else mesh


class Guard:
    """See the module. `watch` is what of all this goes into a checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        mesh: Mesh,
        pulse: Pulse,
        launches: Launches,
        step: Callable[..., Any],
        say: Callable[[str], None],
    ) -> None:
        check(config)
        self.config, self.folder, self.mesh, self.launches, self.say = config, folder, mesh, launches, say
        self.rank = mesh.rank or 0
        self.devices = names_of_devices(config.faults.device)
        self.watch = Watch()
        self.pulse = pulse
        self.why: str | None = None
        self._ends = Ends(folder / STOP, config.run.minutes, config.run.exit_interval, began=time.monotonic())
        self._stack = ExitStack()
        launch = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        faults = parse(config.faults.inject)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if far := [fault for fault in faults if fault.by_rank and int(fault.where) >= ranks]:
            raise ConfigError(f"faults.inject: {far[0].kind} of rank {far[0].where}, processes are 0 to {ranks - 1}")

        def run(state: TrainState, batch: Any, limits: Limits, number: int, attempt: int) -> tuple[TrainState, Metrics]:
            try:
                return step(state, batch, limits)
            except KeyError as error:  # the names are known when a step has been made
                if error.args[0] not in limits:
                    raise
                said = f"faults.spike.{error.args[0]}: a step has no number of that name"
                raise ConfigError(f"{said}; loss and grad_norm are, and what else metrics.jsonl has of the loss") from None

        self._run = injected(run, faults, rank=self.rank, devices=self.devices, launch=launch)
        f = config.faults
        self._stragglers = Stragglers(
            self.devices, every=f.stragglers, ratio=f.straggler_ratio, file=folder / "stragglers.jsonl", device=mesh.device
        )

    def __enter__(self) -> Guard:
        if self.config.faults.memory_history:
            self._stack.enter_context(history())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def begin(self, done: int) -> None:
        """The process begins (again) after so many steps."""
        self._ends = replace(self._ends, start=done)

    def rows(self, rows: Rows) -> Rows:
        """The run's samples less those that it has left out."""
        return Skip(rows, self.watch.skip) if self.watch.skip else rows

    # -- between steps ----------------------------------------------------------------------------------------------
    def stops(self, signal: Stop, done: int) -> bool:
        """Whether any rank has a reason to stop; `why` says which."""
        self.pulse.at("vote", done + 1)
        self.why = self._ends.why(signal, done) if self.rank == 0 else signal.reason
        stops = any_rank(self.why is not None, device=self.mesh.device)
        if stops and self.rank == 0:
            self._ends.file.unlink(missing_ok=True)
            self.why = self.why or "a signal to another rank"
        return stops

    # -- a step -----------------------------------------------------------------------------------------------------
    def step(self, state: TrainState, feed: Iterator[Any], number: int) -> Outcome:
        """The next batch and its step, judged. Raises Halt where it is to end the run."""
        start = time.perf_counter()
        self.pulse.at("data", number)
        with memory_report(self.folder, self.rank, self.config.faults.memory):
            batch = next(feed)
            got = time.perf_counter()
            self.launches.take_stalled()
            self.pulse.at("step", number)
            outcome = self._judged(state, batch, number)
        stalled = self.launches.take_stalled() if self._stragglers.every else 0.0
        if self.pulse.steps:  # the first step compiles, and warms up
            self._stragglers.add(time.perf_counter() - got, stalled, got - start)
        self.pulse.steps += 1
        self.pulse.at("report", number)
        for line in (self._stragglers.report(number), outcome.said):
            if line:
                self.say(line)
        self.watch = outcome.watch
        if outcome.then == "stop":
            raise Halt(BAD_RESULT, outcome.said)
        return outcome

    def _judged(self, state: TrainState, batch: Any, number: int) -> Outcome:
        f = self.config.faults
        if not (f.rerun or f.recheck):
            return Outcome(*self._run(state, batch, {}, number, 0), self.watch)

        def vote(flag: bool) -> bool:
            return any_rank(flag, device=self.mesh.device)

        t = self.config.training
        overflows = t.loss_scale == "dynamic" or (t.loss_scale is None and t.dtype == "fp16")
        return judged(
            self._run, state, batch, self.watch, f, number, devices=self.devices, any_rank=vote, overflows=overflows
        )

    # -- what follows -----------------------------------------------------------------------------------------------
    def past(self, stop: int, loaded: TrainState, found: Watch) -> None:
        """Go on from `loaded`, a checkpoint of watch `found`, without the last batches of the `stop` consumed samples."""
        c = self.config
        sizes, at, starts = sizes_of(c), int(loaded.consumed.flatten()[0]), list[int]()
        while at < stop:  # batches may grow
            starts.append(at)
            at += sizes.at(at)
        first = starts[-c.faults.rollback_batches :][0]
        number = Skip(_NO_ROWS, self.watch.skip).number
        watch = replace(found, skip=self.watch.skip, rollbacks=self.watch.rollbacks + 1)
        self.watch = watch.without(number(first), number(stop - 1) + 1)
        self.say(f"samples {number(first)}:{number(stop - 1) + 1} are left out")

    def elsewhere(self) -> Halt:
        """The end of a process whose last step is to be run on other devices."""
        return Halt(ELSEWHERE, "saved; start again on other devices")


class _NoRows:
    def row(self, number: int) -> Any:
        raise AssertionError(number)


_NO_ROWS = _NoRows()


def names_of_devices(name: str | None) -> tuple[str, ...]:
    """A name for each rank's device, by rank: its host, and the number or the UUID of what it computes on."""
    local = os.environ.get("LOCAL_RANK", "0")
    if torch.cuda.is_available():
        local = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    mine = f"{name or socket.gethostname()}/{local}"
    if not dist.is_initialized():
        return (mine,)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, mine)
    return tuple(names)


def check(c: RunConfig) -> None:
    """ConfigError for settings that cannot be honoured together."""
    f = c.faults
    spikes(f)
    if (f.rerun or f.recheck) and not c.training.deterministic and not f.tolerance:
        raise ConfigError("faults.rerun and recheck compare two runs: set training.deterministic, or a faults.tolerance")
    if not f.rerun and (f.elsewhere or [fault for fault in parse(f.inject) if fault.kind in BAD]):
        raise ConfigError("faults.elsewhere and injected bad results need faults.rerun = true")
    if not f.recheck and any(fault.kind == "silent" for fault in parse(f.inject)):
        raise ConfigError("faults.inject = silent:...: it is found by faults.recheck, the steps between; set it")
    if not c.local.folder:
        unheard("local", c.local, ("interval", "factor", "jump"), "local.folder")
