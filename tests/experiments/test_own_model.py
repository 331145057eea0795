"""The example of a user's own model, loss, optimizer and data: invariant on meshes, and trained from a TOML by import path."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import COMMAND, torchrun

sys.path.insert(0, str(Path(__file__).parents[2]))  # as `fmegatron` does with the folder it runs in

from experiments import own_model as own  # noqa: E402
from fmegatron.data.batches import NAMES, batch_at  # noqa: E402
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, virtual_mesh  # noqa: E402
from fmegatron.testing import assert_mesh_invariant  # noqa: E402
from fmegatron.train.state import init  # noqa: E402
from fmegatron.train.step import make_step  # noqa: E402

ROOT = Path(own.__file__).parents[1]


def train(sh: Sharding, steps: int = 12) -> list[float]:
    """Bits per byte of each step."""
    model, tx, rows = own.model(), own.lion(3e-3), own.data(64)
    state, step, losses = init(model, tx, sh), make_step(model, tx, sh), []
    for i in range(steps):
        batch = {name: shard(sh, x, NAMES[name]) for name, x in batch_at(rows, 8 * i, 8).items()}
        state, metrics = step(state, batch)
        losses.append(float(metrics["bits"].reshape(-1)[0]))
    return losses


SMALL = own.model(layers=2, embed_size=16, mlp=32)
ALL_AXES = [Sharding(virtual_mesh(dp=2, cp=2, tp=2), RULES[name]) for name in ("tp", "fsdp_tp_sp")]


def test_it_computes_on_meshes_what_one_device_does() -> None:
    assert_mesh_invariant(SMALL, batch_at(own.data(16), 0, 4), ALL_AXES)


@pytest.mark.long
def test_every_preset_computes_what_one_device_does() -> None:
    assert_mesh_invariant(SMALL, batch_at(own.data(16), 0, 4))


def test_it_takes_at_most_sixty_lines_of_code() -> None:
    code = Path(own.__file__).read_text().split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 60


def test_mixing_over_a_sharded_name_is_refused() -> None:
    sh = Sharding(virtual_mesh(tp=2), RULES["tp"]).bind({"mlp": 8})
    with pytest.raises(ValueError, match="mixes over 'mlp'"):
        sh.local(lambda x: x, "batch kv_seq mlp -> batch kv_seq")


FIRST, LAYER, *_ = SMALL.chain
MISTAKES = {
    "node 0 takes parameters 'tabel', but declared are layers.0": {
        "chain": (replace(FIRST, params=(("table", "tabel"),)), *SMALL.chain[1:])
    },
    "no node of the chain has a loss among its writes": {"chain": SMALL.chain[:-1]},
    "no node takes the parameters table": {"chain": (*SMALL.chain[1:-1], replace(SMALL.chain[-1], params=()))},
    "node 9 takes 'layers.0', 2 stacked layers: its layer is 2": {"chain": (*SMALL.chain, replace(LAYER, layer=2, index=9))},
    "two nodes of the chain have index 1: number all of them, or none": {"chain": (*SMALL.chain, LAYER)},
    "stacked layers: its layer is None": {"chain": (FIRST, replace(LAYER, layer=None), *SMALL.chain[2:])},
    "node 0 returns 'h', which depends on parameters: name it": {"chain": (replace(FIRST, writes=()), *SMALL.chain[1:])},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_chain_that_does_not_fit_its_declarations_is_refused(message: str) -> None:
    tx = own.lion(1e-3)
    with pytest.raises(ValueError, match=message):
        wrong = replace(SMALL, **MISTAKES[message])
        make_step(wrong, tx, SINGLE)(init(wrong, tx, SINGLE), batch_at(own.data(16), 0, 4))


def test_nodes_without_numbers_are_numbered() -> None:
    """By its number a step finds what is kept gathered of a node: that of one layer was taken for another's."""
    assert [node.index for node in SMALL.chain] == list(range(len(SMALL.chain)))
    rows, tx, sh = batch_at(own.data(16), 0, 4), own.lion(1e-3), Sharding(virtual_mesh(dp=2), RULES["fsdp"])
    batch = {name: shard(sh, x, NAMES[name]) for name, x in rows.items()}
    one, other = (make_step(SMALL, tx, sh, reshard=how)(init(SMALL, tx, sh), batch)[1] for how in ("always", "never"))
    assert torch.equal(one["grad_norm"], other["grad_norm"])


def test_it_learns_under_tp_as_on_one_device() -> None:
    one = train(SINGLE)
    tp = train(Sharding(virtual_mesh(dp=2, tp=2), RULES["fsdp_tp_sp"]))
    assert abs(one[0] - 8) < 0.1 and one[-1] < 5  # a byte of eight bits, at first
    assert tp == pytest.approx(one, abs=1e-3)


def test_stacked_layers_without_a_number_are_refused_before_training() -> None:
    model = own.model()
    chain = tuple(replace(node, params=(("", "layers"),)) if node.is_layer else node for node in model.chain)
    flat = replace(model, declare={**model.declare, "layers": model.declare["layers"]["0"]}, chain=chain)
    with pytest.raises(ValueError, match="layers.down is stacked: put it under its first layer's number, like 'layers.0.down'"):
        init(flat, own.lion(0.1), SINGLE)


def test_lion_is_its_formula() -> None:
    p, g = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -3.0])
    tx = own.lion(0.1)
    updates, state = tx.update({"w": g}, tx.init({"w": p}), {"w": p})
    assert torch.equal(updates["w"], torch.tensor([-0.1, 0.1]))
    updates, _ = tx.update({"w": -0.02 * g}, state, {"w": p})  # 0.9 * 0.01 g of momentum outweighs 0.1 * 0.02 g
    assert torch.equal(updates["w"], torch.tensor([-0.1, 0.1]))


def test_the_command_trains_it_by_import_path(tmp_path: Path) -> None:
    words = ["train", "experiments/own_model.toml", "--training.steps", "3", "--mesh.virtual", "true", "--mesh.tp", "2"]
    torchrun(1, COMMAND, *words, "--run.dir", tmp_path / "run", cwd=ROOT)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert math.isclose(records[0]["loss"], 8, abs_tol=0.1) and records[2]["loss"] < records[0]["loss"]
