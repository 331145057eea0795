"""Golden runs: two runs, two processes, a run in parts, and a busy machine give the same bits; one curve is written down."""

from __future__ import annotations

import threading

import pytest
import torch
from runs import curve, digest, joined, same_run, start, train

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


GOLDEN = [(3.49942, 1.622088), (3.46115, 1.891546), (3.385309, 1.593755), (3.198717, 1.391945), (3.102936, 1.39849),
          (2.981917, 1.105958), (2.926141, 1.180622), (2.877514, 1.28505)]  # fmt: skip


def test_the_golden_curve(tmp_path):
    """Loss and gradient norm of eight steps with dropout, as they were on 2026-11-21: who changes them changes runs.
    Equal to 1e-4: other machines and versions of torch add in other orders."""
    sizes = {"layers": 2, "embed": 16, "heads": 2, "kv": 1, "mlp": 16, "vocab": 32, "context": 16, "hidden_dropout": 0.2}
    optimizer = {"lr": 1e-2, "warmup": 2, "schedule": "cosine"}
    train(tmp_path / "run", training={"steps": 8}, model={"overrides": sizes}, optimizer=optimizer)
    for record, (loss, norm) in zip(curve(tmp_path / "run"), GOLDEN, strict=True):
        assert (record["loss"], record["grad_norm"]) == pytest.approx((loss, norm), rel=1e-4), record["step"]


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
