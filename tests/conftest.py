"""One thread a worker, steady hypothesis profiles, and a budget in seconds for each suite (a folder of tests/).

A suite's time is the sum over its tests, on all workers; the table is printed after each run. On CI (the variable CI is
set) a suite over its budget fails the run, and so does a suite that states none.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from uuid import uuid4

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # of pieces.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; before anything imports torch
if not os.path.exists("/proc/driver/nvidia"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels on CPU tensors; read where triton is imported

import hypothesis  # noqa: E402

BUDGETS = MappingProxyType({  # seconds of one core; 2 cores share the sum, make test stays under 12 minutes
    ".": 110,
    "sharding": 80,
    "nn": 100,
    "models": 80,
    "optim": 100,
    "data": 150,
    "train": 520,
    "kernels": 110,
    "inference": 60,
    "plan": 170,
    "properties": 120,
    "distributed": 200,
    "faults": 110,
    "experiments": 140,
    "mutations": 60,
    "benchmarks": 100,
})

hypothesis.settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.bin and train.idx: the bytes of 40 small functions."""
    from fmegatron import data

    folder = tmp_path_factory.mktemp("text")
    documents = [json.dumps({"text": f"def add_{n}(a, b):\n    return a + b + {n}\n" * (1 + n % 3)}) for n in range(40)]
    (folder / "train.jsonl").write_text("\n".join(documents))
    data.tokenize([folder / "train.jsonl"], folder / "train", "byte", append_eod=True)
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[Callable[[], str]]:
    """Makes a new bucket and returns its URL, on a real S3 API of this machine; other processes find it in the environment."""
    moto, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x",
              "DEFAULT_REGION": "us-east-1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem.clear_instance_cache()  # of another server

        def make() -> str:
            name = f"bucket-{uuid4().hex[:12]}"  # moto forgets nothing between servers
            s3fs.S3FileSystem().mkdir(name)
            return f"s3://{name}"

        yield make
    server.stop()


def suite(nodeid: str) -> str:
    """The folder under tests/ of a test: "tests/optim/test_adam.py::test_x" -> "optim"."""
    parts = nodeid.split("::")[0].split("/")
    return parts[parts.index("tests") + 1] if "tests" in parts[:-2] else "."


def verdicts(spent: dict[str, float], budgets: dict[str, float] | MappingProxyType[str, int]) -> list[str]:
    """A line for each suite that has no budget or is over it."""
    none = [f"tests/{name} states no budget (tests/conftest.py)" for name in spent if name not in budgets]
    over = [f"tests/{name} took {seconds:.0f} s, its budget is {budgets[name]} s"
            for name, seconds in spent.items() if seconds > budgets.get(name, float("inf"))]
    return none + over


class Budget:
    """Adds up the time of each suite; the plugin of the controlling process (workers report to it)."""

    def __init__(self, enforce: bool) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.enforce = enforce

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.spent[suite(report.nodeid)] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.enforce and verdicts(self.spent, BUDGETS) and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, seconds in sorted(self.spent.items()):
            terminalreporter.write_line(f"suite {name:<14} {seconds:6.1f} s of {BUDGETS.get(name, 0)} s")
        for line in verdicts(self.spent, BUDGETS):
            terminalreporter.write_line(line, red=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        short = config.option.markexpr == "not long"  # what make test runs; the long tests have no budget
        config.pluginmanager.register(Budget(enforce=bool(os.environ.get("CI")) and short), "budget")
