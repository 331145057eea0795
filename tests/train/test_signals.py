"""Signals become requests between steps; a second Ctrl-C ends the process even while it hangs; handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import torchrun

from fmegatron.train.signals import any_rank, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop.requested and not any_rank(stop.requested)
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == number.name and any_rank(stop.requested)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that insists does not cut the last save short
        assert stop.reason == number.name
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_two_runs_in_a_row_share_nothing() -> None:
    with stop_on_signals() as first:
        os.kill(os.getpid(), signal.SIGINT)
    with stop_on_signals() as second:
        assert first.requested and not second.requested


def test_under_torchrun_one_press_may_arrive_twice() -> None:
    with stop_on_signals(grace=60.0) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_outside_the_main_thread_nothing_is_requested() -> None:
    seen = []

    def run() -> None:
        with stop_on_signals() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


HANGS = """
import os, signal, sys, threading, time
from fmegatron.train.signals import stop_on_signals
with stop_on_signals({grace}) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("requested", flush=True)
    {then}
"""


@pytest.mark.parametrize(
    "grace, then",
    [
        ("", "sum(range(10**14))"),  # inside C, where Python runs no handler: as in a collective that hangs
        ("grace=0.05", "time.sleep(60)"),
    ],
)
def test_a_second_press_ends_the_process(grace: str, then: str) -> None:
    command = [sys.executable, "-c", HANGS.format(grace=grace, then=then)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "requested\n"
        if grace:
            child.stdout.flush()
            threading.Event().wait(0.2)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == -signal.SIGINT
        assert "SIGINT: stopping after this step" in child.stderr.read()


VOTES = """
import torch.distributed as dist
from fmegatron.train.signals import any_rank
dist.init_process_group("gloo")
print([any_rank(dist.get_rank() == 1 and step == 2) for step in range(3)])
dist.destroy_process_group()
"""


def test_all_ranks_stop_at_the_step_at_which_one_was_asked(tmp_path: Path) -> None:
    (program := tmp_path / "program.py").write_text(VOTES)
    assert torchrun(2, program, timeout=60) == 2 * "[False, False, True]\n"
