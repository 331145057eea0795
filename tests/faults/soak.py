"""Runs that are killed at random moments, again and again, until they are done: nothing is lost but steps since the last save.

    python tests/faults/soak.py [kills] [seed]

Four kinds of runs take turns: saving in the foreground and behind the training's back, on one process, on two under torchrun
(whose restarts take them up), and saving to nodes' own disks. Each is done when its loss curve and its last state are bit for
bit those of a run that nobody killed, and counts the kills that it survived.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, str(Path(__file__).parent))
from runs import FORK, same_run, speak, start, train


def killed_until_done(folder: Path, seconds: float, rng: random.Random, kills: int = 10**6, **groups: Any) -> int:
    """Start a run and kill it after up to `seconds`, at most `kills` times, until it is done; how often it was killed."""
    count = 0
    while True:
        process = start(folder, **groups)
        process.join(rng.uniform(0, seconds) if count < kills else 120)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            count += 1
            continue
        assert process.exitcode == 0, Path(f"{folder}.log").read_text()[-3000:]
        return count


def seconds_of(folder: Path, **groups: Any) -> float:
    """How long the run takes that nobody kills; it stays for comparison."""
    begin = time.perf_counter()
    process = start(folder, **groups)
    process.join()
    assert process.exitcode == 0, Path(f"{folder}.log").read_text()[-3000:]
    return time.perf_counter() - begin


def torchrun(folder: Path, restarts: int, rng: random.Random, kills: int = 0, **groups: Any) -> int:
    """Two processes under torchrun's agent; random ones are killed at random moments, it starts both again. The kills."""
    whole = FORK.Process(target=_agent, args=(folder, restarts, {"mesh": {"dp": 2}, **groups}))
    whole.start()
    count, steps, metrics = 0, 0, folder / "metrics.jsonl"
    while whole.exitcode is None:
        whole.join(rng.uniform(0.0, 0.2) if kills else None)
        done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        workers = children(whole.pid)
        if count < kills and done > steps and len(workers) == 2:  # it has gone on since the last kill
            steps, count = done, count + 1
            os.kill(int(rng.choice(workers)), signal.SIGKILL)
    assert whole.exitcode == 0, Path(f"{folder}.log").read_text()[-3000:]
    return count


def _agent(folder: Path, restarts: int, groups: dict[str, Any]) -> None:
    """What torchrun runs, with workers that are forks of this process: they need no imports."""
    speak(folder)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=folder.name, max_restarts=restarts, monitor_interval=0.1,
        start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    elastic_launch(config, _worker)(folder, groups)


def _worker(folder: Path, groups: dict[str, Any]) -> None:
    train(folder, **groups)


def children(pid: int) -> list[str]:
    """Processes that a process has started."""
    return [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def main(kills: int = 60, seed: int = 0) -> None:
    """All kinds in turn until there were so many kills."""
    root, rng, count, number = Path(tempfile.mkdtemp(prefix="soak-")), random.Random(seed), 0, 0
    more: dict[str, Any] = {"training": {"steps": 40}, "checkpoint": {"interval": 2, "keep": 2}}
    kinds = {"foreground": more, "background": {**more, "checkpoint": {**more["checkpoint"], "background": True}}}
    disk = str(root / "disk")  # each run of this kind has it to itself
    kinds["nodes"] = {**more, "checkpoint": {"interval": 10, "keep": 2}, "local": {"folder": disk, "interval": 1, "factor": 1}}
    for name, groups in kinds.items():
        shutil.rmtree(disk, ignore_errors=True)
        print(f"{name}: {seconds_of(root / name, **groups):.1f} s unbroken", flush=True)
    two = root / "two"
    torchrun(two, 0, rng, **kinds["background"])
    while count < kills:
        name = ("foreground", "background", "torchrun", "nodes")[number % 4]
        folder = root / f"{name}-{number}"
        if name == "torchrun":
            survived = torchrun(folder, 4, rng, 4, **kinds["background"])
        else:
            seconds = seconds_of(root / "again", **kinds[name])
            shutil.rmtree(disk, ignore_errors=True)
            survived = killed_until_done(folder, seconds, rng, **kinds[name])
            shutil.rmtree(root / "again")
        same_run(folder, two if name == "torchrun" else root / name)
        count, number = count + survived, number + 1
        print(f"{name}: {survived} kills, then bit for bit the same ({count} in all)", flush=True)
        shutil.rmtree(folder)
    shutil.rmtree(root)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
