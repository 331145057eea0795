"""Checkpoints: what any chunking wrote any other reads, bit for bit; a kill at any moment loses at most one step."""

from __future__ import annotations

import json
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

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import torchrun

from fmegatron.train.checkpoint import (
    Chunks,
    find,
    latest,
    load,
    read_meta,
    save,
    step_folder,
    tensors,
    whole,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(dtype)


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that tile a shape, by random guillotine cuts: far from any grid of ranks."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))) if shape else ():
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))  # an empty side too: a rank that holds nothing of a tensor
        low = sizes[:dim] + (cut,) + sizes[dim + 1 :]
        high = sizes[:dim] + (sizes[dim] - cut,) + sizes[dim + 1 :]
        boxes += [(offsets, low), (offsets[:dim] + (offsets[dim] + cut,) + offsets[dim + 1 :], high)]
    return boxes


def cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))]


def chunks_of(tensor: torch.Tensor, boxes: list[Box]) -> Chunks:
    return Chunks(tuple(tensor.shape), tuple((box[0], cut(tensor, box)) for box in boxes))


@given(st.data())
def test_any_chunking_reads_any_other_bitwise(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=4))
    saved, wanted, originals = {}, {}, {}
    for number, shape in enumerate(shapes):
        key = f"params.layers.{number}.w"
        originals[key] = random_values(shape, data.draw(st.sampled_from(DTYPES)), seed=number)
        saved[key] = chunks_of(originals[key], data.draw(tilings(shape)))
        # Pieces to fill are views of one padded buffer, as the shards of a virtual mesh are; some overlap.
        boxes = data.draw(tilings(shape)) + data.draw(tilings(shape))
        pieces = []
        for offsets, sizes in boxes:
            padded = torch.full([size + 2 for size in sizes], 1, dtype=originals[key].dtype)
            pieces.append((offsets, padded[tuple(slice(1, size + 1) for size in sizes)]))
        wanted[key] = Chunks(shape, tuple(pieces))
    with tempfile.TemporaryDirectory() as folder:
        save(folder, 3, saved, {"tokens": 12})
        assert tensors(folder) == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in originals.items()}
        assert load(folder, wanted) == {"tokens": 12}
    for key, chunks in wanted.items():
        for offsets, piece in chunks.pieces:
            assert torch.equal(piece, cut(originals[key], (offsets, tuple(piece.shape)))), key


def test_pieces_outside_the_wanted_box_stay_as_they_are(tmp_path: Path) -> None:
    save(tmp_path, 1, {"w": whole(torch.ones(4, 4))}, {})
    buffer = torch.zeros(6, 6)
    load(tmp_path, {"w": Chunks((4, 4), (((0, 0), buffer[1:5, 1:5]),))})
    assert buffer.sum() == 16 and buffer[1:5, 1:5].sum() == 16


def test_floating_dtypes_are_converted(tmp_path: Path) -> None:
    original = random_values((5, 3), torch.float32, 0)
    save(tmp_path, 1, {"w": whole(original)}, {})
    half, parameter = torch.zeros(5, 3, dtype=torch.bfloat16), torch.zeros(5, 3, requires_grad=True)
    load(tmp_path, {"w": Chunks((5, 3), (((0, 0), half), ((0, 0), parameter)))})
    assert torch.equal(half, original.bfloat16()) and torch.equal(parameter, original)


def test_errors_name_the_key_and_both_shapes(tmp_path: Path) -> None:
    save(tmp_path, 7, {"params.q": whole(torch.zeros(4, 8)), "count": whole(torch.tensor(3))}, {})
    untouched = torch.full((4, 8), 5.0)

    def loads(wanted: dict[str, Chunks], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, {"params.q": whole(untouched), **wanted})
        assert (untouched == 5).all()

    loads({"params.k": whole(torch.zeros(2))}, r'step-00000007: no tensor "params.k" of shape \(2,\).*"params.q"')
    loads({"count": whole(torch.zeros(3, dtype=torch.int64))}, r'"count" has shape \(\), wanted is \(3,\)')
    loads({"count": whole(torch.tensor(0.0))}, r'"count" of shape \(\).*int64.*float32')
    loads({"a": whole(torch.zeros(1)), "b": whole(torch.zeros(1))}, r"\(and 1 more of 3 tensors\)")
    with pytest.raises(ValueError, match="no checkpoint in"):
        load(tmp_path / "nowhere", {})


@pytest.mark.parametrize(
    "pieces, message",
    [
        ([((0, 0), (2, 4))], "hold 8 of the 16 elements"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "overlap"),
        ([((0, 0), (4, 2)), ((2, 0), (2, 2)), ((0, 2), (2, 2))], "overlap"),  # the volume is right, a corner is missing
        ([((1, 0), (4, 4))], "does not lie inside"),
        ([((0,), (4,))], "does not lie inside"),
    ],
)
def test_pieces_must_tile_the_tensor(tmp_path: Path, pieces: list[Box], message: str) -> None:
    save(tmp_path, 1, {"w": whole(torch.ones(4, 4))}, {})
    bad = Chunks((4, 4), tuple((offsets, torch.zeros(sizes)) for offsets, sizes in pieces))
    with pytest.raises(ValueError, match=f"w: .*{message}"):
        save(tmp_path, 2, {"w": bad}, {})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_keeps_the_last_k(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, {"w": whole(torch.tensor(step))}, {"step": step}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000030", "step-00000040"]
    # Taken up again from step 30: the abandoned step 40 neither counts nor goes; the one just saved is the latest.
    save(tmp_path, 35, {"w": whole(torch.tensor(35))}, {"step": 35}, keep=2)
    assert read_meta(tmp_path) == {"step": 35}
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000030", "step-00000035", "step-00000040"]


def test_a_copy_beside_the_steps_is_its_owners(tmp_path: Path) -> None:
    save(tmp_path, 10, {"w": whole(torch.tensor(10))}, {})
    for name in ("step-00000010.bak", "step-00000010-best"):
        shutil.copytree(step_folder(tmp_path, 10), tmp_path / name)
    for step in (20, 30):
        save(tmp_path, step, {"w": whole(torch.tensor(step))}, {"step": step}, keep=1, keep_every=20)
    steps, copies = ["step-00000020", "step-00000030"], ["step-00000010-best", "step-00000010.bak"]
    assert sorted(os.listdir(tmp_path)) == ["latest", *copies, *steps]
    shutil.rmtree(step_folder(tmp_path, 30))
    assert latest(tmp_path) == step_folder(tmp_path, 20)
    assert find(tmp_path / "step-00000010.bak") == tmp_path / "step-00000010.bak"


def test_a_failed_save_deletes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, {"w": whole(torch.tensor(1))}, {}, keep=1)
    with pytest.raises(ValueError):
        save(tmp_path, 2, {"w": Chunks((2,), ())}, {}, keep=1)
    with pytest.raises(ValueError):  # meta is strict JSON
        save(tmp_path, 2, {"w": whole(torch.tensor(1))}, {"loss": float("nan")}, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1, 2):
        save(tmp_path, 5, {"w": whole(torch.tensor(value))}, {"value": value})
    result = torch.tensor(0)
    assert load(tmp_path, {"w": whole(result)}) == {"value": 2} and result == 2
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000005"]


def test_unfinished_business_is_ignored_and_cleared(tmp_path: Path) -> None:
    save(tmp_path, 5, {"w": whole(torch.tensor(1))}, {"value": 1})
    half = tmp_path / ".tmp-step-00000006"
    half.mkdir()
    (half / "meta.json").write_text("{")
    assert latest(tmp_path) == step_folder(tmp_path, 5)
    (tmp_path / "latest").unlink()  # killed before the very first marker
    assert find(tmp_path) == step_folder(tmp_path, 5)
    os.rename(
        step_folder(tmp_path, 5), tmp_path / ".old-step-00000005"
    )  # killed between the two renames of a replacement
    assert read_meta(tmp_path) == {"value": 1}
    save(tmp_path, 6, {"w": whole(torch.tensor(2))}, {"value": 2})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000005", "step-00000006"]
    assert read_meta(step_folder(tmp_path, 5)) == {"value": 1} and read_meta(tmp_path) == {"value": 2}


def save_killed_at(call: int, folder: Path, step: int, value: int) -> bool:
    """Save in a forked process that dies at its n-th file-system call; whether it lived long enough to finish."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            count += 1
            if count > call:
                os._exit(9)

    sys.addaudithook(hook)
    save(folder, step, {"w": whole(torch.full((3,), value))}, {"value": value}, keep=1)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("before, after", [(None, 1), (1, 2), (2, 2)], ids=["first", "next", "same step again"])
def test_killed_at_every_file_system_call(tmp_path: Path, before: int | None, after: int) -> None:
    for call in range(1000):
        folder = tmp_path / str(call)
        if before is not None:
            save(folder, before, {"w": whole(torch.full((3,), 10))}, {"value": 10}, keep=1)
        finished = save_killed_at(call, folder, after, value=20)
        values = []
        for path in (folder, *sorted(folder.glob("step-*"))):  # whatever has a step's name is whole
            if path == folder and before is None and latest(folder) is None:
                continue
            result = torch.zeros(3, dtype=torch.int64)
            value = load(path, {"w": whole(result)})["value"]
            assert result.tolist() == [value] * 3
            values.append(value)
        assert values or before is None
        assert set(values) <= {10, 20} and (not finished or values == [20, 20])
        save(folder, 3, {"w": whole(torch.full((3,), 30))}, {"value": 30}, keep=1)  # and the next save finds its way
        assert sorted(os.listdir(folder)) == ["latest", "step-00000003"]
        if finished:
            break
    assert finished and call > 10


PREAMBLE = """
import os, sys, json
import torch
from fmegatron.train.checkpoint import *
"""

KILLED = (
    PREAMBLE
    + """
folder, start = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
for step in range(start, start + 10_000):
    items = {"w": whole(torch.full((300, 300), step)), "v": whole(torch.tensor(step))}
    save(folder, step, items, {"step": step}, keep=2)
    print(step, flush=True)
"""
)


def kill_during_save(folder: Path, kills: int, seed: int) -> None:
    rng, start = random.Random(seed), 1
    for _ in range(kills):
        command = [sys.executable, "-c", KILLED, str(folder), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            while child.stdout.readline() != f"{start}\n":  # one good checkpoint, then anywhere in the later ones
                assert child.poll() is None
            time.sleep(rng.uniform(0.0, 0.08))
            child.send_signal(signal.SIGKILL)
            reported = [start, *(int(line) for line in child.stdout.read().split("\n") if line)][-1]
        big, small = torch.zeros(300, 300, dtype=torch.int64), torch.tensor(0)
        step = load(folder, {"w": whole(big), "v": whole(small)})["step"]
        assert step in (reported, reported + 1)  # at most the one that was being written is missing
        assert (big == step).all() and small == step
        start = step + 1


def test_kill_during_save_leaves_the_last_good_one(tmp_path: Path) -> None:
    kill_during_save(tmp_path, kills=1, seed=0)


@pytest.mark.long
def test_many_kills_during_save(tmp_path: Path) -> None:
    kill_during_save(tmp_path, kills=25, seed=1)


TWO_PROCESSES = (
    PREAMBLE
    + """
import torch.distributed as dist
folder, rank = sys.argv[1], int(os.environ["RANK"])
dist.init_process_group("gloo")
full = torch.arange(48.).reshape(6, 8)
rows = slice(4 * rank, 4 * rank + 4)                     # 4 and 2 rows: uneven
items = {"rows": Chunks((6, 8), (((4 * rank, 0), full[rows]),)),
         "owned": Chunks((3,), (((0,), torch.tensor([1, 2, 3])),) if rank == 1 else ()),
         f"only.{rank}": whole(torch.tensor(rank))}
save(folder + "/run", 1, items, {"a": 1}, keep=1)
save(folder + "/run", 2, items, {"a": 2}, keep=1)

columns, owned, other = torch.zeros(6, 4), torch.zeros(3, dtype=torch.int64), torch.tensor(-1)
wanted = {"rows": Chunks((6, 8), (((0, 4 * rank), columns),)), "owned": whole(owned), f"only.{1 - rank}": whole(other)}
assert load(folder + "/run", wanted) == {"a": 2}
assert torch.equal(columns, full[:, 4 * rank:4 * rank + 4]) and owned.tolist() == [1, 2, 3] and other == 1 - rank

def fails(fn, *args, error=ValueError):
    try:
        fn(*args)
    except error as failure:
        print("failed:", failure, flush=True)
    else:
        raise AssertionError(f"rank {rank} did not fail")

run = folder + "/run"
fails(load, run, {"only.0": whole(torch.zeros(1))} if rank == 0 else {})               # wrong shape on one rank
fails(load, folder + "/nowhere", {})
fails(save, run, 3, {"w": Chunks((4,), (((2 * rank,), torch.zeros(2 + 2 * rank)),))}, {})      # outside, on rank 1
fails(save, run, 3, {"w": whole(torch.zeros(4))}, {})                                       # replicated: two owners
fails(save, run, 3, {"w": Chunks((4 + rank,), ())}, {})                                              # shapes disagree
fails(save, run, 3, {}, {"bad": object()} if rank == 0 else {}, error=TypeError)                # the first rank's meta
assert latest(folder + "/run").name == "step-00000002"
dist.barrier()
dist.destroy_process_group()
"""
)


def test_two_processes(tmp_path: Path) -> None:
    (program := tmp_path / "program.py").write_text(TWO_PROCESSES)
    said = torchrun(2, program, tmp_path)
    half = said[: len(said) // 2]
    assert said == 2 * half and half.count("failed:") == 6  # the same error on every rank
    assert sorted(os.listdir(tmp_path / "run")) == ["latest", "step-00000002"]
    # What two processes wrote, one reads.
    full: Any = torch.zeros(6, 8)
    load(tmp_path / "run", {"rows": whole(full)})
    assert torch.equal(full, torch.arange(48.0).reshape(6, 8))
    assert json.loads((tmp_path / "run/step-00000002/manifest.json").read_text())["step"] == 2
