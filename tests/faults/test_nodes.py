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
    train(tmp_path / "run", local=local, training={"steps": 5})
    assert "resumed at step 5 from " in capsys.readouterr().out  # the newer of the two, which is the run's
    shutil.rmtree(tmp_path / "run/checkpoints")
    train(tmp_path / "run", local=local)
    assert "resumed at step 4 from the nodes' own disks" in capsys.readouterr().out
    same_run(tmp_path / "run", tmp_path / "plain")
    train(tmp_path / "run", local=local, run={"dir": str(tmp_path / "run"), "fresh": True})
    assert "resumed" not in capsys.readouterr().out
    same_run(tmp_path / "run", tmp_path / "plain")
    with pytest.raises(ConfigError, match="local.factor, with 1 rank.s. a node: .*factor can be at most 1"):
        train(tmp_path / "two", local=local | {"factor": 2})


@pytest.mark.long
def test_several_ranks_save_to_object_storage(s3, tmp_path):
    """Two ranks upload a file each; they are killed, and taken up from there; a flipped file is stepped over."""
    where = {"folder": f"{s3()}/run", "interval": 3, "keep": 0}
    assert joined(ranks(tmp_path / "whole")) == [0, 0]
    codes = joined(ranks(tmp_path / "run", checkpoint=where, faults={"inject": ["kill:11:1"]}))
    assert codes[1] == -signal.SIGKILL
    import s3fs

    store = s3fs.S3FileSystem()
    file = f"{where['folder']}/step-00000009/rank-00001.safetensors"
    data = store.cat_file(file)
    store.pipe_file(file, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ValueError, match="rank-00001.safetensors has other bytes than were written"):
        train(tmp_path / "look", mesh={"virtual": True, "dp": 2}, checkpoint={"resume": f"{where['folder']}/step-00000009"})
    store.rm(f"{where['folder']}/step-00000009", recursive=True)
    assert joined(ranks(tmp_path / "run", checkpoint=where)) == [0, 0]
    assert f"resumed at step 6 from {where['folder']}/step-00000006" in (tmp_path / "run.log").read_text()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    files = [store.cat_file(f"{where['folder']}/step-00000012/rank-0000{i}.safetensors") for i in range(2)]
    last = tmp_path / "whole/checkpoints/step-00000012"
    assert files == [(last / f"rank-0000{i}.safetensors").read_bytes() for i in range(2)]
