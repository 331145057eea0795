"""A run that is killed at any moment, or meets a disk that is full or closed, loses the steps since its last checkpoint."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import soak
from runs import FORK, curve, digest, joined, ranks, same_run, start, train

from fmegatron.train.checkpoint import latest, newest_good


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train(folder)
    return folder


@pytest.mark.parametrize("background", [False, True])
def test_killed_at_random_moments(background, unbroken, tmp_path):
    checkpoint = {"background": background, "interval": 3, "keep": 2}
    seconds = soak.seconds_of(tmp_path / "time", checkpoint=checkpoint)
    while not soak.killed_until_done(tmp_path / "run", seconds, random.Random(7), 4, checkpoint=checkpoint):
        shutil.rmtree(tmp_path / "run")  # the machine was busier while it was timed
        seconds /= 2
    assert curve(tmp_path / "run") == curve(unbroken)
    assert digest(tmp_path / "run") == digest(unbroken)


@pytest.mark.parametrize("background", [False, True])
def test_killed_while_it_saves(background, unbroken, tmp_path):
    """Between calls that change the folder of checkpoints, in the thread that saves: counted in calls, not in seconds."""
    groups = {"checkpoint": {"background": background, "interval": 3, "keep": 3}}
    for call in (3, 8, 11) if background else (1, 5, 13):
        code = f"""
import os, signal, sys
from runs import train
calls = 0
def killing(name, fn):
    def call(*args, **options):
        global calls
        if any("checkpoints" in str(x) for x in args):
            calls += 1
            if calls == {call}:
                os.kill(os.getpid(), signal.SIGKILL)
        return fn(*args, **options)
    setattr(os, name, call)
killing("rename", os.rename); killing("replace", os.replace); killing("mkdir", os.mkdir); killing("fsync", os.fsync)
"""
        process = FORK.Process(target=_killed, args=(code, tmp_path / "run", groups))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, call
    train(tmp_path / "run", **groups)
    same_run(tmp_path / "run", unbroken)


def _killed(code: str, folder: Path, groups: dict) -> None:
    exec(code, {})
    train(folder, **groups)


def test_torchrun_starts_it_again(tmp_path):
    """A worker is killed at step 8 of 12; --max-restarts takes both ranks up at the last good checkpoint."""
    assert joined(ranks(tmp_path / "plain")) == [0, 0]
    soak.torchrun(tmp_path / "hit", 1, random.Random(1), faults={"inject": ["kill:8:1"]})
    same_run(tmp_path / "hit", tmp_path / "plain")
    assert "resumed at step 6" in Path(f"{tmp_path}/hit.log").read_text()


# -- disks ----------------------------------------------------------------------------------------------------------
def test_a_full_disk(unbroken, tmp_path):
    """A disk of 256 KB: the run ends with the system's words, what was saved is good, and on a larger disk it goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        for background in (False, True):
            checkpoint = {"folder": str(disk / "c"), "keep": 0, "background": background, "interval": 1}
            process = start(tmp_path / "run", checkpoint=checkpoint)
            process.join(120)
            assert process.exitcode == 1
            assert "No space left on device" in Path(f"{tmp_path}/run.log").read_text()
            assert newest_good(disk / "c")[0] is not None and newest_good(disk / "c")[1] == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        train(tmp_path / "run", checkpoint=checkpoint)
        assert curve(tmp_path / "run") == curve(unbroken)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_that_may_not_grow(tmp_path, unbroken):
    """A quota that anybody has (RLIMIT_FSIZE): the same."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        train(tmp_path / "run", training={"steps": 3})
        size = (latest(tmp_path / "run/checkpoints") / "rank-00000.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        train(tmp_path / "run")

    process = FORK.Process(target=limited)
    process.start()
    process.join(120)
    assert process.exitcode == 1 and digest(tmp_path / "run")["step"] == "step-00000003"
    train(tmp_path / "run")
    same_run(tmp_path / "run", unbroken)


def test_a_folder_that_cannot_be_written(tmp_path, unbroken):
    """Its name is a file's; or it is read-only, for everybody but root, so as another user."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        train(tmp_path / "run", checkpoint={"folder": str(tmp_path / "file" / "c")})
    shutil.copytree(unbroken, tmp_path / "run", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run/checkpoints")
    train(tmp_path / "run", training={"steps": 3})
    closed = tmp_path / "run/checkpoints"
    closed.chmod(0o555)
    for path in (*tmp_path.parents, tmp_path, tmp_path / "run"):
        if path.owner() == Path.home().owner() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055 | (0o022 if path == tmp_path / "run" else 0))
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            path.chmod(0o666)

    def as_nobody() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        train(tmp_path / "run")

    process = FORK.Process(target=as_nobody)
    process.start()
    process.join(120)
    assert process.exitcode == 1 and digest(tmp_path / "run")["step"] == "step-00000003"
    closed.chmod(0o755)
    train(tmp_path / "run")
    same_run(tmp_path / "run", unbroken)


def test_truncated_and_flipped_files(tmp_path, unbroken, capsys):
    """The newest good checkpoint is taken, and the steps since are made again."""
    for hurt in (lambda file: os.truncate(file, file.stat().st_size // 2), lambda file: flip(file)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        train(tmp_path / "run", training={"steps": 9})
        hurt(latest(tmp_path / "run/checkpoints") / "rank-00000.safetensors")
        capsys.readouterr()
        train(tmp_path / "run")
        assert "step-00000009 is damaged" in (said := capsys.readouterr().out) and "resumed at step 6" in said
        same_run(tmp_path / "run", unbroken)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)


# -- ends -----------------------------------------------------------------------------------------------------------
def test_a_run_ends_at_a_file_a_step_or_its_time_and_goes_on(tmp_path, unbroken, capsys):
    folder = tmp_path / "run"
    train(folder, run={"dir": str(folder), "exit_interval": 5})
    assert "stopped at step 5 (run.exit_interval = 5)" in capsys.readouterr().out
    (folder / "stop").touch()
    train(folder)
    assert f"stopped at step 5 (the file {folder / 'stop'})" in capsys.readouterr().out and not (folder / "stop").exists()
    train(folder, run={"dir": str(folder), "minutes": 1e-6})
    assert "stopped at step 5 (run.minutes = 1e-06)" in capsys.readouterr().out
    train(folder, run={"dir": str(folder), "exit_interval": 5})
    train(folder)
    assert curve(folder) == curve(unbroken)
    assert digest(folder)["files"] == digest(unbroken)["files"]
