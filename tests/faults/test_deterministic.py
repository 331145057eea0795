"""Golden runs without a golden file: two runs, two processes, a run in parts, and a busy machine give the same bits."""

from __future__ import annotations

import threading

import pytest
import torch
from runs import digest, joined, same_run, start, train

MESHES = [
    pytest.param({}, id="one device"),
    pytest.param({"mesh": {"virtual": True, "dp": 2, "tp": 2}}, id="virtual", marks=pytest.mark.long),
    pytest.param({"mesh": {"virtual": True, "threads": True, "dp": 2}}, id="threads"),
]


@pytest.mark.parametrize("groups", MESHES)
def test_runs_and_processes_give_the_same_bits(groups, tmp_path):
    overrides = {"layers": 1, "embed": 16, "heads": 2, "kv": 2, "mlp": 16, "vocab": 32, "context": 16, "hidden_dropout": 0.2}
    groups = {"training": {"steps": 6}, "model": {"overrides": overrides}} | groups
    train(tmp_path / "one", **groups)
    other = start(tmp_path / "process", **groups)
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [torch.randn(50, 50) @ torch.randn(50, 50) for _ in iter(stop.is_set, True)])
    busy.start()  # and draws from torch's own generator meanwhile
    try:
        for steps in (2, 3, 6):
            train(tmp_path / "parts", **groups | {"training": {"steps": steps}})
    finally:
        stop.set()
        busy.join()
    assert joined([other]) == [0]
    same_run(tmp_path / "one", tmp_path / "process")
    same_run(tmp_path / "one", tmp_path / "parts")


def test_the_digest_sees_a_seed(tmp_path):
    for seed in (0, 1):
        train(tmp_path / str(seed), run={"dir": str(tmp_path / str(seed)), "seed": seed}, training={"steps": 1})
    assert digest(tmp_path / "0")["files"] != digest(tmp_path / "1")["files"]


def test_only_deterministic_kernels_while_it_runs(tmp_path):
    """What has no deterministic kernel is refused in the run, and allowed again after it."""
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        train(tmp_path / "run", model={"loss": "test_deterministic:undecided"})
    assert not torch.are_deterministic_algorithms_enabled()
    train(tmp_path / "free", model={"loss": "test_deterministic:undecided"}, training={"steps": 1, "deterministic": False})


def undecided(sh, logits, labels, weights):
    """A loss with a kernel that torch knows to be without order: put_ of repeated places, accumulating."""
    places = torch.zeros_like(labels)
    return sh.total(torch.zeros_like(logits).put_(places, logits[..., 0], accumulate=False)[..., 0], "batch loss_seq")
