"""Checkpoints on nodes' own disks in a run: what a lost node held comes from the others; without them, the run's own."""

from __future__ import annotations

import shutil
import signal

import pytest
from runs import curve, digest, joined, ranks, same_run, train

from fmegatron.toml import ConfigError


def test_a_node_is_lost_and_its_files_come_from_the_others(tmp_path):
    groups = {"checkpoint": {"interval": 6}, "local": {"folder": str(tmp_path / "nvme"), "interval": 1}}
    assert joined(ranks(tmp_path / "whole", checkpoint={"interval": 6})) == [0, 0]
    kill = {"faults": {"inject": ["kill:9:1"]}}
    for lost, begins in (((), 8), (("1",), 8), (("0",), 8), (("0", "1"), 6)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "nvme", ignore_errors=True)
        (tmp_path / "run.log").write_text("")
        codes = joined(ranks(tmp_path / "run", **groups, **kill))
        assert codes[1] == -signal.SIGKILL and codes[0] != 0
        for node in lost:
            shutil.rmtree(tmp_path / "nvme/run" / node)
        assert joined(ranks(tmp_path / "run", **groups)) == [0, 0]
        assert f"resumed at step {begins} from" in (tmp_path / "run.log").read_text()
        assert curve(tmp_path / "run") == curve(tmp_path / "whole")
        assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_one_process_keeps_its_own_and_fresh_forgets_them(tmp_path, capsys):
    local = {"folder": str(tmp_path / "nvme"), "interval": 2, "factor": 1}
    train(tmp_path / "plain")
    train(tmp_path / "run", local=local, training={"steps": 5})
    assert sorted(p.name for p in (tmp_path / "nvme/run/0").iterdir()) == ["step-00000002", "step-00000004"]
    shutil.rmtree(tmp_path / "run/checkpoints")
    train(tmp_path / "run", local=local)
    assert "resumed at step 4 from the nodes' own disks" in capsys.readouterr().out
    same_run(tmp_path / "run", tmp_path / "plain")
    train(tmp_path / "run", local=local, run={"dir": str(tmp_path / "run"), "fresh": True})
    assert "resumed" not in capsys.readouterr().out
    same_run(tmp_path / "run", tmp_path / "plain")
    with pytest.raises(ConfigError, match="local.factor, with 1 rank.s. a node: .*factor can be at most 1"):
        train(tmp_path / "two", local=local | {"factor": 2})
