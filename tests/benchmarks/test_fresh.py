"""A benchmark's process that dies is followed by one that leaves out what killed it."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {benchmarks!r})
from fresh import Notes, end
notes = Notes(__import__("pathlib").Path(sys.argv[sys.argv.index("--notes") + 1]))
for row in "abc":
    if row in notes.done:
        continue
    for who in "xyz":
        if (row, who) in notes.fatal:
            continue
        notes.add("begin", row, who)
        if row + who == "ay":
            os.kill(os.getpid(), signal.SIGSEGV)
        if row + who == "cx":
            end()
        with open(sys.argv[1], "a") as file:
            file.write(row + who + " ")
    notes.add("done", row)
"""


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fresh

    return fresh


def test_what_kills_a_process_is_left_out_of_the_next(fresh, tmp_path, capfd):
    (tmp_path / "script.py").write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    assert fresh.watched(str(tmp_path / "script.py"), [str(tmp_path / "out")], lambda: 100.0) == 0
    assert (tmp_path / "out").read_text().split() == ["ax", "ax", "az", "bx", "by", "bz", "cy", "cz"]
    assert "y of a ended the process (-11)" in capfd.readouterr().out


def test_no_second_process_without_time_or_before_anything_began(fresh, tmp_path, capfd):
    (tmp_path / "script.py").write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    assert fresh.watched(str(tmp_path / "script.py"), [str(tmp_path / "out")], lambda: 1.0) == -11
    (tmp_path / "none.py").write_text("raise SystemExit('no GPU')")
    assert fresh.watched(str(tmp_path / "none.py"), [], lambda: 100.0) == 1
    assert (tmp_path / "out").read_text().split() == ["ax"] and not fresh.broken("cpu")
    assert "goes on" not in capfd.readouterr().out
    assert sys.modules["fresh"].Notes().fatal == set()
