"""What a process does now and since when; a thread that writes it to a file, and ends the process where it takes too long.

    DIR/heartbeat/rank-00001.json       {"rank", "device", "step", "doing", "seconds", "time", "collectives", "waits_for"}
    DIR/heartbeat/rank-00001.hang.txt   where a time limit has passed: that, the last collectives, and every thread's stack

The thread needs Python's lock now and then. Where something holds it for good, faulthandler's own thread, which needs none,
writes the stacks and ends the process half a limit later (exit code 1).
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fmegatron.train.faults.exits import HUNG
from fmegatron.train.faults.launches import Launches

TICK = 1.0  # seconds between looks at the clock, at most


class Pulse:
    """What the process does: written by the thread that trains."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.now: tuple[str, int, float] = ("set-up", 0, self.began)  # replaced whole: read by another thread
        self.steps = 0  # finished since the process began

    def at(self, doing: str, step: int | None = None) -> None:
        """From now on it does this."""
        self.now = (doing, self.now[1] if step is None else step, time.monotonic())


class Heart:
    """The thread. Seconds that something may take, 0: any. first: set-up, from the start to the first step, in total. step:
    the first step, which may compile. later: anything after it."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        device: str,
        pulse: Pulse,
        launches: Launches,
        *,
        every: float,
        first: float,
        step: float,
        later: float,
    ) -> None:
        self.folder, self.rank, self.device, self.pulse, self.launches = folder, rank, device, pulse, launches
        self.every, self.first, self.step, self.later = every, first, step, later
        limits = [t for t in (every, first / 4, step / 4, later / 4, TICK) if t > 0]
        self.tick = min(limits)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._stacks: TextIO | None = None

    def __enter__(self) -> Heart:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"rank-{self.rank:05d}*"):
            old.unlink()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            Path(self._stacks.name).unlink()

    def _run(self) -> None:
        written = 0.0
        while not self._end.wait(self.tick):
            doing, _, since = self.pulse.now
            limit = self.later if self.pulse.steps else self.step if doing == "step" else self.first
            since = since if self.pulse.steps or doing == "step" else self.pulse.began
            self._last_resort(limit)
            if limit and time.monotonic() - since > limit:
                self._hung(limit)
            if self.every and time.monotonic() - written >= self.every:
                written = time.monotonic()
                self.write()

    def write(self) -> None:
        """The heartbeat's file, replaced whole."""
        path = self._file(".json")
        path.parent.mkdir(parents=True, exist_ok=True)  # a run that starts afresh clears its folder
        path.with_suffix(".tmp").write_text(json.dumps(self.state()))
        os.replace(path.with_suffix(".tmp"), path)

    def state(self) -> dict[str, Any]:
        """What the file says."""
        doing, step, since = self.pulse.now
        waits = self.launches.waiting
        said = {"rank": self.rank, "device": self.device, "step": step, "doing": doing, "seconds": time.monotonic() - since}
        return said | {"time": time.time(), "collectives": self.launches.count, "waits_for": str(waits) if waits else None}

    def _hung(self, limit: float) -> None:
        """Say where this rank is, and which rank is behind it; then end the process, which nobody else can."""
        state = self.state()
        self.write()
        time.sleep(2 * self.tick)  # until the others, which hang too, have written theirs
        line = f"fmegatron: rank {self.rank} ({self.device}): {state['doing']} of step {state['step']} takes longer than "
        line += f"{limit:g} s; "
        line += f"it waits for {state['waits_for']}" if state["waits_for"] else "it waits for no collective of the mesh"
        line += self._behind(state)
        with open(self._file(".hang.txt"), "w", encoding="utf-8") as out:
            out.write(f"{line}\n\nlast collectives\n" + "".join(f"  {launch}\n" for launch in self.launches.last) + "\n")
            out.flush()
            faulthandler.dump_traceback(out, all_threads=True)
        sys.stderr.write(f"{line}\nfmegatron: stacks of rank {self.rank}: {out.name}\n")
        sys.stderr.flush()
        time.sleep(4 * self.tick)  # the first process that ends takes the others along, under torchrun
        os._exit(HUNG)

    def _behind(self, state: dict[str, Any]) -> str:
        """The ranks that have launched the fewest collectives, or that have written nothing."""
        others = []
        for path in self.folder.glob("rank-*.json"):
            try:
                others.append(json.loads(path.read_text()))
            except (OSError, ValueError):
                continue
        silent = sorted(set(range(int(os.environ.get("WORLD_SIZE", "1")))) - {int(other["rank"]) for other in others})
        if silent and self.every:
            return f"; nothing is known of rank {', '.join(map(str, silent))}"
        fewest = min((other["collectives"] for other in others), default=state["collectives"])
        if fewest >= state["collectives"]:
            return ""
        slow = [f"rank {o['rank']} ({o['doing']} of step {o['step']})" for o in others if o["collectives"] == fewest]
        return f"; behind are {', '.join(sorted(slow))}, at collective {fewest} of {state['collectives']}"

    def _last_resort(self, limit: float) -> None:
        if not limit:
            return
        if self._stacks is None:
            self._stacks = open(self._file(".stacks.txt"), "w", encoding="utf-8")
        faulthandler.dump_traceback_later(1.5 * limit + 8 * self.tick, exit=True, file=self._stacks)

    def _file(self, end: str) -> Path:
        return self.folder / f"rank-{self.rank:05d}{end}"
