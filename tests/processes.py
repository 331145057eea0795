"""Programs on several processes, as torchrun starts them. All are forked by one server that has imported torch and the library:
an import takes longer than most of what they do.

    said = torchrun(4, "ranks.py", "a case", "another")         what they print, rank by rank
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

ONE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
COMMAND = Path(__file__).parents[1] / "fmegatron" / "__main__.py"  # as a program: `python -m fmegatron`


def torchrun(count: int, program: Path, *words: object, timeout: float = 300, cwd: Path | None = None) -> str:
    """What the processes print; AssertionError with the words of the first that fails, if one does."""
    done = run(count, program, *words, timeout=timeout, cwd=cwd)
    failed = next((process for process in done if process.returncode > 0), next((p for p in done if p.returncode), None))
    assert failed is None, f"{failed.returncode}: {failed.stdout[-2000:]}\n{failed.stderr[:2000]}\n...\n{failed.stderr[-4000:]}"
    return "".join(process.stdout for process in done)


def run(
    count: int, program: Path, *words: object, timeout: float = 300, cwd: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[subprocess.CompletedProcess[str]]:
    """The processes, once all have ended; where one fails the others are ended. environment: over torchrun's and this one's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder:
        asked = {"count": count, "program": str(program), "words": [str(word) for word in words], "folder": folder,
                 "cwd": str(cwd or Path.cwd()), "environment": {**os.environ, **ONE, **common, **environment}}  # fmt: skip
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
        codes = json.loads(server.stdout.readline() or f"{[-signal.SIGKILL] * count}")
        files = [[Path(folder, f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(count)]
    return [subprocess.CompletedProcess([str(program)], code, *said) for code, said in zip(codes, files, strict=True)]


@cache
def _server() -> subprocess.Popen[str]:
    """One for this process; it ends when its input does."""
    words = [sys.executable, __file__]
    env = {**os.environ, **ONE}
    return subprocess.Popen(words, stdin=-1, stdout=-1, text=True, env=env, start_new_session=True)


def _serve() -> None:
    for name in ("torch._dynamo", "torch._inductor.compile_fx", "torch.distributed", "fmegatron.cli", "fmegatron.train.loop"):
        import_module(name)  # what forks find imported

    while line := sys.stdin.readline():
        asked = json.loads(line)
        pids = {_fork(rank, **asked): rank for rank in range(asked.pop("count"))}
        codes = dict.fromkeys(pids, 0)
        left = set(pids)
        while left:
            pid, status = os.waitpid(-1, 0)
            left.discard(pid)
            codes[pid] = os.waitstatus_to_exitcode(status)
            for other in left if codes[pid] else ():
                os.kill(other, signal.SIGKILL)
        print(json.dumps(list(codes.values())), flush=True)


def _fork(rank: int, program: str, words: list[str], folder: str, cwd: str, environment: dict[str, str]) -> int:
    """The id of a new process; in that process it does not return."""
    if pid := os.fork():
        return pid
    for stream, to in ((0, os.devnull), (1, f"{folder}/{rank}.out"), (2, f"{folder}/{rank}.err")):
        os.dup2(os.open(to, os.O_RDWR | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(cwd)
    sys.argv = [program, *words]
    sys.path.insert(0, str(Path(program).parent))
    code = 1
    try:
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
