"""What each rank of a pipeline gives to a checkpoint: together every element of the state, once, by global names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import optim, tree
from fmegatron.models import Config, from_hf, gpt, to_hf
from fmegatron.models.hf import read_params
from fmegatron.sharding import SINGLE
from fmegatron.train import checkpoint, saving
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline, place_pipeline, with_stages
from fmegatron.train.replicas import between_stages, shared_hashes
from fmegatron.train.state import init

C = Config(layers=6, embed=8, heads=2, kv=1, mlp=12, vocab=19, tied=True, no_rope=(False, False, True, False, False, False))


def ranks_of(model, schedule: str, ranks: int, virtual: int | None = None):
    placed = place_pipeline(Pipeline(make_schedule(schedule, ranks, virtual, 6)), model, SINGLE.mesh)
    return [replace(placed, rank=rank, memo={}) for rank in range(ranks)]


def whole(items) -> dict[str, torch.Tensor]:
    return {key: chunks.pieces[0][1] for key, chunks in items.items()}


def optimizer(name: str, model):
    return optim.adamw(1e-2) if name == "adamw" else getattr(optim, name)(1e-2, declare=model.declare)


@given(st.sampled_from([("1f1b", 2, None), ("1f1b", 3, None), ("interleaved_1f1b", 3, 2), ("zbv", 3, 2), ("looped_bfs", 2, 3)]),
       st.booleans(), st.sampled_from(["adamw", "muon", "adafactor"]))  # fmt: skip
def test_all_ranks_together_give_the_state_of_one_device(case, tied, name):
    model = gpt(replace(C, tied=tied))
    placed = ranks_of(model, case[0], case[1], case[2])
    given, plans = {}, []
    for one in placed:
        tx = optimizer(name, with_stages(model, one.model))
        own = saving.of_stages(saving.items(one.model, SINGLE, init(one.model, tx, SINGLE, key=3)), one)
        plans.append(checkpoint.plan_of(own, f"rank-{one.rank}"))
        given |= whole(own)
    checkpoint.merge(plans)  # each element once
    expected = whole(saving.items(model, SINGLE, init(model, optimizer(name, model), SINGLE, key=3)))
    assert given.keys() == expected.keys()
    assert [key for key, x in expected.items() if not torch.equal(x, given[key])] == []


def test_a_tied_table_that_differs_between_stages_is_named():
    placed = ranks_of(gpt(C), "1f1b", 3)
    params = [init(one.model, optim.sgd(1.0), SINGLE, key=1).params for one in placed]
    hashes = [shared_hashes(one, own) for one, own in zip(placed, params, strict=True)]
    assert [len(found) for found in hashes] == [1, 0, 1] and between_stages([([], found) for found in hashes]) == []
    params[2]["embed"]["token"].view(torch.int32)[3, 4] ^= 1
    hashes[2] = shared_hashes(placed[2], params[2])
    assert between_stages([([("a", "dp")], hashes[0]), ([], {}), ([], hashes[2])]) == [("a", "dp"), ("embed.token", "pp")]


def test_a_stage_reads_its_own_leaves_of_a_hugging_face_folder(tmp_path):
    model = gpt(replace(C, no_rope=(False,) * 6, tied=False, context=32))
    to_hf(model, model.init(2), tmp_path)
    model, params = from_hf(tmp_path)
    leaves = tree.to_paths(params)
    for one in ranks_of(model, "1f1b", 3):
        for path, x in tree.to_paths(read_params(tmp_path, model, SINGLE, part=one.model)).items():
            parts = path.split(".")
            n = int(parts[1]) if parts[0] == "layers" else None
            same = leaves[path] if n is None else leaves[".".join(["layers", "0", *parts[2:]])][n : n + len(x)]
            assert torch.equal(x, same)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors here"):
        read_params(tmp_path, model, SINGLE)
