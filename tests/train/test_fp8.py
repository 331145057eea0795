"""[fp8] from a configuration to a run; mistakes in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pieces import records_of

from fmegatron import cli, config, data, models, optim, toml, tree
from fmegatron.kernels.quantize import recipe
from fmegatron.models import Config, gpt
from fmegatron.models.lower import lower
from fmegatron.sharding import RULES, SINGLE, Sharding, abstract_mesh, shard, thread_mesh
from fmegatron.train.explain import explain
from fmegatron.train.lowbits import lowered
from fmegatron.train.state import init
from fmegatron.train.step import make_step


def test_a_run_learns_as_in_fp32(tmp_path):
    losses = {}
    with data.IndexedWriter(tmp_path / "text", "<u2") as out:
        out.add_documents(np.array([*b"few bits are enough to learn this " * 4, 256]) for _ in range(40))
    for name in ("none", "tensorwise", "nvfp4"):
        more = ["--fp8.recipe", name, "--fp8.last", "1"] if name != "none" else []
        words = ["train", "debug", "--run.dir", str(tmp_path / name), "--training.steps", "8", "--log.prompt", "",
                 "--data.source", str(tmp_path / "text"), "--data.tokenizer", "byte", "--data.pad_vocab", "8",
                 "--training.compile", "false"]  # fmt: skip
        assert cli.main([*words, *more]) == 0
        losses[name] = [record["loss"] for record in records_of(tmp_path / name)]
    assert losses["none"][0] != losses["tensorwise"][0] and losses["tensorwise"][0] != losses["nvfp4"][0]
    for name in ("tensorwise", "nvfp4"):
        assert abs(losses[name][-1] - losses["none"][-1]) < 0.1 * (losses["none"][0] - losses["none"][-1]) + 0.02


CONFIG = Config(layers=2, embed=32, heads=4, kv=2, mlp=48, vocab=64)


@pytest.mark.parametrize(("rules", "sizes", "dtype"), [
    ("fsdp", {"dp": 4}, None),
    ("fsdp_tp_sp", {"dp": 2, "tp": 2}, None),
    ("fsdp", {"dp": 2}, torch.bfloat16),
])  # fmt: skip
def test_weights_gathered_in_eight_bits_are_the_same_bit_for_bit(rules, sizes, dtype):
    tokens = torch.arange(8 * 17).reshape(8, 17) % 61
    whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    found, tx = {}, optim.sgd(0.1)
    for gather in (True, False, None):
        model = lower(gpt(CONFIG), {"layers.*": recipe("tensorwise")}, first=1, gather=gather is True)
        sh = SINGLE if gather is None else Sharding(thread_mesh(**sizes), RULES[rules])
        batch = whole if gather is None else {name: shard(sh, x, "batch seq") for name, x in whole.items()}
        step = make_step(model, tx, sh, dtype=dtype)
        state = init(model, tx, sh, 0, dtype=torch.float64 if dtype is None else torch.float32)
        for _ in range(2):
            state, metrics = step(state, batch)
        found[gather] = [metrics["loss"].flatten()[0], *tree.leaves(state.params)]
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    if dtype is None:
        torch.testing.assert_close(found[True][0], found[None][0], rtol=1e-12, atol=0)


def test_a_weight_in_eight_bits_costs_half_of_bf16_to_gather_and_four_bytes_a_step_for_its_scale():
    sent, sh = {}, Sharding(abstract_mesh(dp=4), RULES["fsdp"])
    for gather in (True, False):
        how = {"layers.*.mlp.*": recipe("tensorwise"), "layers.*": recipe("rowwise")}
        model = lower(gpt(CONFIG), how, first=1, gather=gather)
        seen = explain(model, sh, batch=(8, 16), dtype=torch.bfloat16)
        sent[gather] = {(row.collective, row.axis): row.bytes for row in seen.collectives}
        notes = {leaf.path: " ".join(leaf.notes) for leaf in seen.leaves}
        said = [notes[f"layers.0.{name}"] for name in ("mlp.up", "attn.q")]
        assert said == (["gathered in 8 bits", "gathered whole: rowwise has no one scale to gather by"] if gather else ["", ""])
    weights, visits = 3, 2  # one layer's matrices, gathered forward and backward
    saved = sent[False]["all_gather", "dp"] - sent[True]["all_gather", "dp"]
    assert saved == weights * visits * 32 * 48 * (2 - 1)
    assert sent[True]["all_reduce", "dp"] - sent[False]["all_reduce", "dp"] == 4 * weights


@pytest.mark.parametrize(("said", "part"), [
    ({"recipe": "fp8"}, "known are tensorwise"),
    ({"recipe": "rowwise", "match": ["mlp"]}, "'mlp': no weight"),
    ({"others": {"layers.*": "tensorwse"}}, "recipe 'tensorwse'"),
])  # fmt: skip
def test_mistakes(said, part):
    c = toml.update(config.RunConfig(), {"fp8": said}, "test")
    with pytest.raises(ValueError, match="^fp8: ") as error:
        lowered(c, models.preset("llama3:debug"))
    assert part in str(error.value) and "\n" not in str(error.value)
