"""What was written is read, by whatever version; what was not is named, and the newest good checkpoint is used."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmegatron.train import checkpoint, dcp, steps, together
from fmegatron.train.checkpoint import Chunks, damage, load, newest_good, save, tensors, whole

HERE = Path(__file__).parent


def filled(folder, steps=(10, 20, 30)):
    for step in steps:
        a = torch.full((64, 8), float(step))
        halves = Chunks((64, 8), (((0, 0), a[:32]), ((32, 0), a[32:])))
        save(folder, step, {"a": halves, "n": whole(torch.tensor(step))}, {"s": step})
    return folder


def read(path):
    a, n = torch.zeros(64, 8), torch.tensor(0)
    meta = load(path, {"a": whole(a), "n": whole(n)})
    assert (a == n).all() and meta == {"s": int(n)}
    return int(n)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (lambda step: flip(step / "rank-00000.safetensors", -100), "rank-00000.safetensors has other bytes"),
    "a flipped bit in the header": (lambda step: flip(step / "rank-00000.safetensors", 20), "has other bytes"),
    "truncated": (lambda step: os.truncate(step / "rank-00000.safetensors", 300), "has 300 bytes"),
    "empty": (lambda step: os.truncate(step / "rank-00000.safetensors", 0), "has 0 bytes"),
    "a file too few": (lambda step: (step / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
    "a flipped manifest": (lambda step: flip(step / "manifest.json", 40), "manifest.json is damaged"),
    "half a manifest": (lambda step: os.truncate(step / "manifest.json", 200), "manifest.json is damaged"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "holds no manifest.json"),
    "binary": (lambda step: (step / "manifest.json").write_bytes(b"\xff\x00\xfe"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_newest_good_one_used(name, tmp_path):
    hurt, message = DAMAGE[name]
    filled(tmp_path)
    hurt(tmp_path / "step-00000030")
    with pytest.warns(UserWarning, match=f"step-00000030 is damaged.*{message}") as said:
        assert read(tmp_path) == 20
    assert "\n" not in str(said[0].message)
    if "no manifest" not in name:
        with pytest.raises(ValueError, match=f"step-00000030 is damaged.*{message}"):
            read(tmp_path / "step-00000030")
    hurt(tmp_path / "step-00000020")
    found, lines = newest_good(tmp_path)
    assert found.name == "step-00000010" and len(lines) == 2
    hurt(tmp_path / "step-00000010")
    with pytest.raises(ValueError, match="so are 2 more, and there is no good one"):
        read(tmp_path)
    save(tmp_path, 30, {"a": whole(torch.full((64, 8), 31.0)), "n": whole(torch.tensor(31))}, {"s": 31})
    assert read(tmp_path) == 31  # in the damaged one's place


def test_every_flipped_byte_is_found(tmp_path):
    step = save(tmp_path, 1, {"w": whole(torch.arange(3.0))}, {"note": "x"})
    for file in sorted(step.iterdir()):
        good = file.read_bytes()
        for at in range(len(good)):
            file.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
            assert damage(step), (file.name, at)
        file.write_bytes(good)
    assert damage(step) == []


def test_the_marker_is_damaged(tmp_path):
    filled(tmp_path)
    for text in ("", "step-00000099\n", "../elsewhere\n", "\x00"):
        (tmp_path / "latest").write_text(text)
        assert read(tmp_path) == 30


@pytest.mark.parametrize("name, near", [
    ("step-1", [2]), ("step-00000099", [30]), ("step-00000025", [20, 30]), ("step-00000024", [20, 30]), ("step-20", [20]),
    ("step-25-copy", []), ("elsewhere/step-25", []),
])  # fmt: skip
def test_a_missing_steps_error_names_the_nearest(name, near, tmp_path):
    for step in (2, 10, 20, 30):
        save(tmp_path, step, {"n": whole(torch.tensor(step))}, {})
    (tmp_path / "step-00000024").mkdir()  # empty: no checkpoint
    said = f"beside it the nearest is {' or '.join(f'step-{n:08d}' for n in near)}$" if near else "it holds neither"
    with pytest.raises(ValueError, match=f"no checkpoint in .*{name}: {said}"):
        load(tmp_path / name, {})


def test_a_version_of_tomorrow_is_refused(tmp_path):
    filled(tmp_path, [1])
    file = tmp_path / "step-00000001" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 3}))
    with pytest.raises(ValueError, match="is a checkpoint of format 3; this version of fmegatron reads 1 to 2"):
        read(tmp_path)


def test_the_oldest_format_is_read():
    """Written by the first version of fmegatron: torch's own files, three boxes of one tensor among them."""
    q, mu, step, flag = torch.zeros(4, 6), torch.zeros(10), torch.tensor(0), torch.zeros(2, dtype=torch.bool)
    wanted = {"params.layers.0.attn.q": q, "opt.0.mu.layers.0.attn.q": mu, "step": step, "flag": flag}
    meta = load(HERE / "format1", {key: whole(x) for key, x in wanted.items()})
    assert meta == {"config": '[run]\nname = "old"\n', "model": None}
    assert torch.equal(q, torch.arange(24.0).reshape(4, 6)) and torch.equal(mu, torch.arange(10.0) - 3)
    assert step == 7 and flag.tolist() == [True, False]
    assert tensors(HERE / "format1")["opt.0.mu.layers.0.attn.q"] == ((10,), torch.bfloat16)


def test_damage_of_the_oldest_format_is_named(tmp_path):
    for name, hurt in {"short": lambda f: os.truncate(f, 3000), "gone": os.unlink}.items():
        shutil.copytree(HERE / "format1", tmp_path / name)
        hurt(tmp_path / name / "step-00000007" / "__0_0.distcp")
        with pytest.raises(ValueError, match="step-00000007 is damaged: __0_0.distcp"):
            load(tmp_path / name, {"step": whole(torch.tensor(0))})
    os.truncate(tmp_path / "gone/step-00000007/.metadata", 700)
    with pytest.raises(ValueError, match="step-00000007 is damaged: .metadata"):
        load(tmp_path / "gone", {})
    step = shutil.copytree(HERE / "format1", tmp_path / "outside") / "step-00000007"
    shutil.copy(step / "__0_0.distcp", step.parent)
    table = dcp._Table((step / ".metadata").open("rb")).load()
    for info in table.storage_data.values():
        info.relative_path = "../__0_0.distcp"
    (step / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(ValueError, match=r"its table names a file outside of it, \.\./__0_0"):
        load(tmp_path / "outside", {"step": whole(torch.tensor(0))})


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    """A pickle that would make a folder: as the table, inside the table, and as a tensor. It does where pickle reads it."""
    made = tmp_path / "made"
    pickle.loads(pickle.dumps(Evil(made)))
    made.rmdir()  # the weapon works
    table = dcp._Table((HERE / "format1/step-00000007/.metadata").open("rb")).load()
    box = (HERE / "format1/step-00000007/__0_0.distcp").read_bytes()
    for name in ("table", "inside", "tensor"):
        step = tmp_path / name / "step-00000007"
        shutil.copytree(HERE / "format1/step-00000007", step)
        if name == "table":
            (step / ".metadata").write_bytes(pickle.dumps(Evil(made)))
        if name == "inside":
            table.planner_data = Evil(made)
            (step / ".metadata").write_bytes(pickle.dumps(table))
            table.planner_data = None
        if name == "tensor":
            torch.save({"w": Evil(made)}, tmp_path / "evil")
            evil = (tmp_path / "evil").read_bytes()
            for info in table.storage_data.values():
                info.offset, info.length = 0, len(evil)
            (step / "__0_0.distcp").write_bytes(evil + box)
            (step / ".metadata").write_bytes(pickle.dumps(table))
        with pytest.raises(ValueError, match="mkdir") as error:
            load(tmp_path / name, {"step": whole(torch.tensor(0))})
        assert not made.exists(), name
        assert "is damaged" in str(error.value)
    for word in ("eval", "exec", "getattr", "__import__"):
        evil = b"\x80\x04" + b"c" + f"builtins\n{word}\n".encode() + b"."
        with pytest.raises(pickle.UnpicklingError, match=word):
            dcp._Table(io.BytesIO(evil)).load()


def test_files_are_plain_safetensors(tmp_path):
    filled(tmp_path, [5])
    held = load_file(tmp_path / "step-00000005" / "rank-00000.safetensors")
    assert sorted(held) == ["a@0,0", "a@32,0", "n"] and held["a@32,0"].shape == (32, 8)
    (size,) = struct.unpack("<Q", (tmp_path / "step-00000005" / "rank-00000.safetensors").read_bytes()[:8])
    assert size % 8 == 0


def test_every_nth_is_kept(tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, step, {"n": whole(torch.tensor(step))}, {}, keep=2, keep_every=30)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{n:08d}" for n in (30, 60, 70)]
    assert checkpoint.latest(tmp_path).name == "step-00000070"


def test_an_upload_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    filled(tmp_path, [1])
    before = sorted(tmp_path.iterdir())

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(steps.tensorfile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        filled(tmp_path, [2])
    assert sorted(tmp_path.iterdir()) == before and read(tmp_path) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_a_list_so_that_each_thing_has_one_of_them(world, monkeypatch):
    things = list(range(7))
    monkeypatch.setattr(together.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(together.dist, "get_world_size", lambda group: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(together.dist, "get_rank", lambda group, rank=rank: rank)
        shares += things[together.share()]
    assert sorted(shares) == things
