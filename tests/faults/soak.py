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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from runs import same_run, start, table

from fmegatron import toml
from fmegatron.config import RunConfig


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
    """Two processes under torchrun; a random one is killed at random moments, torchrun starts both again. The kills."""
    here = Path(__file__).parent
    run = toml.update(RunConfig(), table(folder, mesh={"dp": 2}, **groups), "soak")
    file = folder.with_suffix(".toml")
    file.write_text(toml.dumps(run))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
               str(restarts), "--monitor-interval", "0.1", "-m", "fmegatron", "train", str(file)]  # fmt: skip
    paths = os.pathsep.join([str(here), str(here.parent.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = open(f"{folder}.log", "a")
    whole = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    count, steps = 0, 0
    while whole.poll() is None:
        time.sleep(rng.uniform(0.0, 0.3))
        done = len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").is_file() else 0
        if count < kills and done > steps:  # it has gone on since the last kill
            workers = [int(p) for p in children(whole.pid)]
            if len(workers) == 2:
                steps = done
                os.kill(rng.choice(workers), signal.SIGKILL)
                count += 1
    assert whole.returncode == 0, Path(f"{folder}.log").read_text()[-3000:]
    return count


def children(pid: int) -> list[str]:
    """Processes that a process has started."""
    return [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def main(kills: int = 60, seed: int = 0) -> None:
    """All kinds in turn until there were so many kills."""
    root, rng, count, number = Path(tempfile.mkdtemp(prefix="soak-")), random.Random(seed), 0, 0
    more: dict[str, Any] = {"training": {"steps": 40}, "checkpoint": {"interval": 2, "keep": 2}}
    kinds = {"foreground": more, "background": {**more, "checkpoint": {**more["checkpoint"], "background": True}}}
    for name, groups in kinds.items():
        print(f"{name}: {seconds_of(root / name, **groups):.1f} s unbroken", flush=True)
    two = root / "two"
    torchrun(two, 0, rng, **kinds["background"])
    while count < kills:
        name = ("foreground", "background", "torchrun")[number % 3]
        folder = root / f"{name}-{number}"
        if name == "torchrun":
            survived = torchrun(folder, 4, rng, 4, **kinds["background"])
        else:
            survived = killed_until_done(folder, seconds_of(root / "again", **kinds[name]), rng, **kinds[name])
            shutil.rmtree(root / "again")
        same_run(folder, two if name == "torchrun" else root / name)
        count, number = count + survived, number + 1
        print(f"{name}: {survived} kills, then bit for bit the same ({count} in all)", flush=True)
        shutil.rmtree(folder)
    shutil.rmtree(root)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
