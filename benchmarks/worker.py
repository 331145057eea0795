"""One participant in a process of its own: steps when it is told to, so that caches, thread pools and memory never mix.

The parent keeps a `Worker`, this file run as a script is its other end; they speak JSON lines over pipes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

THREADS = 2


class Worker:
    """A running participant. `first` holds what its start took: seconds, cpu_seconds, loss."""

    def __init__(self, name: str, shape: Any, dtype: str, cache: Path) -> None:
        begin = time.perf_counter()
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
        env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        self.process = subprocess.Popen(
            [sys.executable, __file__, name, json.dumps(asdict(shape)), dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self.name = name
        self.first = self._answer() | {"seconds": time.perf_counter() - begin}

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} died:\n{self.process.stderr.read()[-3000:]}")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        """One step: {"seconds", "loss"}."""
        assert self.process.stdin is not None
        print("step", file=self.process.stdin, flush=True)
        return self._answer()

    def stop(self) -> dict[str, float]:
        """End the process: {"peak_mb"}, its peak resident memory, and {"base_mb"}, that before the model was made."""
        assert self.process.stdin is not None
        print("stop", file=self.process.stdin, flush=True)
        answer = self._answer()
        self.process.communicate()
        return answer


def serve(name: str, shape: str, dtype: str) -> None:
    """The other end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def answer(**values: float) -> None:
        print(json.dumps(values), file=answers, flush=True)

    import peers
    import shapes

    if name == "jax":
        import jax
        import optax  # noqa: F401

        jax.devices()
    else:
        import torch

        torch.set_num_threads(THREADS)
        if name.startswith("transformers"):
            import transformers.models.llama.modeling_llama  # noqa: F401
    base = peak_mb()
    step = peers.PEERS[name](shapes.Shape(**json.loads(shape)), dtype)
    loss = step()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    answer(loss=loss, cpu_seconds=sum(u.ru_utime + u.ru_stime for u in usage))
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        begin = time.perf_counter()
        loss = step()
        answer(loss=loss, seconds=time.perf_counter() - begin)
    answer(peak_mb=peak_mb(), base_mb=base)
    answers.close()
    sys.stdin.close()
    os._exit(0)


def peak_mb() -> float:
    """This process's peak resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    serve(*sys.argv[1:])
