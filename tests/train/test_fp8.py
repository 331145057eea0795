"""[fp8] from a configuration to a run; mistakes in one line."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pieces import records_of

from fmegatron import cli, config, data, models, optim, toml, tree
from fmegatron.kernels.quantize import Recipe, boxes, eight_bits, factors, quantize, recipe, tops
from fmegatron.models import Config, gpt
from fmegatron.models.lower import lower
from fmegatron.sharding import RULES, SINGLE, Sharding, abstract_mesh, shard, thread_mesh
from fmegatron.train.explain import explain
from fmegatron.train.leaves import plan_leaves
from fmegatron.train.lowbits import lowered
from fmegatron.train.state import init
from fmegatron.train.step import make_step
from fmegatron.train.weights import gathered_low


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


TENSORWISE, BLOCKWISE = recipe("tensorwise"), recipe("blockwise", block=4)
DELAYED = recipe("delayed", history=4, algorithm="max")


@pytest.mark.parametrize(("how", "rules", "sizes", "dtype"), [
    (TENSORWISE, "fsdp", {"dp": 4}, None),
    (TENSORWISE, "fsdp_tp_sp", {"dp": 2, "tp": 2}, None),
    (TENSORWISE, "fsdp", {"dp": 2}, torch.bfloat16),
    (BLOCKWISE, "fsdp", {"dp": 4}, None),
    (BLOCKWISE, "fsdp_tp_sp", {"dp": 2, "tp": 2}, None),
    (BLOCKWISE, "fsdp", {"dp": 2}, torch.bfloat16),
    (recipe("blockwise", block=8), "fsdp", {"dp": 2, "fsdp": 2}, None),
    (DELAYED, "fsdp", {"dp": 4}, None),  # the history is cut along its steps, and gathered
    (recipe("delayed", history=3), "fsdp_tp_sp", {"dp": 2, "tp": 2}, None),
    pytest.param(recipe("delayed", history=2), "fsdp", {"dp": 2}, torch.bfloat16, marks=pytest.mark.long),
], ids=lambda x: x.name if isinstance(x, Recipe) else str(x))  # fmt: skip
def test_weights_gathered_in_eight_bits_are_the_same_bit_for_bit(how, rules, sizes, dtype):
    tokens = torch.arange(8 * 17).reshape(8, 17) % 61
    whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    found, tx = {}, optim.sgd(0.1)
    for gather in (True, False, None):
        model = lower(gpt(CONFIG), {"layers.*": how}, first=1, gather=gather is True)
        sh = SINGLE if gather is None else Sharding(thread_mesh(**sizes), RULES[rules])
        batch = whole if gather is None else {name: shard(sh, x, "batch seq") for name, x in whole.items()}
        step = make_step(model, tx, sh, dtype=dtype)
        state = init(model, tx, sh, 0, dtype=torch.float64 if dtype is None else torch.float32)
        for _ in range(3 if how.name == "delayed" else 2):  # a history counts from the second step on
            state, metrics = step(state, batch)
        found[gather] = [metrics["loss"].flatten()[0], *tree.leaves(state.params)]
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    if dtype is None:
        torch.testing.assert_close(found[True][0], found[None][0], rtol=1e-12, atol=0)


def test_a_weight_in_eight_bits_costs_half_of_bf16_to_gather_and_four_bytes_a_scale():
    sh, wide = Sharding(abstract_mesh(dp=4), RULES["fsdp"]), "gathered whole: rowwise has no one scale to gather by"
    weights, visits, elements = 3, 2, 32 * 48  # one layer's matrices, gathered forward and backward; their scales once a step
    cases = ((TENSORWISE, weights, 0), (BLOCKWISE, 0, weights * elements // 4**2),
             (DELAYED, 0, weights * 3 * 4))  # fmt: skip; a history of 4 steps lies over 4 ranks
    for kind, of_ones, of_squares in cases:
        sent = {}
        for gather in (True, False):
            how = {"layers.*.mlp.*": kind, "layers.*": recipe("rowwise")}
            seen = explain(lower(gpt(CONFIG), how, first=1, gather=gather), sh, batch=(8, 16), dtype=torch.bfloat16)
            sent[gather] = {(row.collective, row.axis): row.bytes for row in seen.collectives}
            notes = {leaf.path: " ".join(leaf.notes) for leaf in seen.leaves}
            said = [notes[f"layers.0.{name}"] for name in ("mlp.up", "attn.q")]
            assert said == (["gathered in 8 bits", wide] if gather else ["", ""])
        less = {key: sent[False][key] - sent[True][key] for key in sent[True]}
        assert less["all_gather", "dp"] == weights * visits * elements * (2 - 1) - 4 * of_squares
        assert less["all_reduce", "dp"] == -4 * of_ones


def test_blocks_that_ranks_would_cut_travel_whole():
    model = lower(gpt(CONFIG), {"layers.*.mlp.*": recipe("blockwise", block=16)})
    for ranks, said in ((4, "gathered whole: 3 blocks of 16 along mlp do not divide over 4 ranks"), (3, "gathered in 8 bits")):
        sh = Sharding(abstract_mesh(dp=ranks), RULES["fsdp"]).bind(model.sizes)
        assert gathered_low(sh, model.chain, plan_leaves(model, sh))["layers.0.mlp.up"] == (said,)


@settings(max_examples=60)
@given(st.data())
def test_shards_rounded_by_themselves_are_the_whole_weight_s_shards(data):
    """Payload and scales of the flattened matrix, wherever blocks lie inside of what any rank holds of any leaf."""
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=2, max_size=4), "sizes")
    rows, block = data.draw(st.integers(1, len(sizes) - 1), "rows"), data.draw(st.sampled_from([1, 2, 4, 6]), "block")
    matrix = math.prod(sizes[:rows]), math.prod(sizes[rows:])
    counts = boxes(sizes, rows, block)
    assume(counts is not None)
    assert math.prod(counts[:rows]) * block == matrix[0] and math.prod(counts[rows:]) * block == matrix[1]
    cuts = [data.draw(st.sampled_from([n for n in range(1, c + 1) if c % n == 0])) for c in counts]
    how = recipe("blockwise", block=block)
    whole = torch.randn(sizes, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9)))) * 10
    wanted = quantize(whole.reshape(matrix), how.format, how.weight)
    payload, scales = torch.zeros(sizes, dtype=torch.uint8), torch.zeros(counts)
    for place in product(*(range(n) for n in cuts)):
        box, squares = (tuple(slice(i * (n // c), (i + 1) * (n // c)) for i, n, c in zip(place, total, cuts, strict=True))
                        for total in (sizes, counts))  # fmt: skip
        mine = tops(whole[box], [n // c for n, c in zip(counts, cuts, strict=True)])
        payload[box], scales[squares] = eight_bits(whole[box], mine, how), factors(mine, how.format, how.weight)[1]
    assert torch.equal(payload.reshape(matrix), wanted.payload.view(torch.uint8))
    assert torch.equal(scales.reshape(wanted.scales.shape), wanted.scales)


@pytest.mark.parametrize(("said", "part"), [
    ({"recipe": "fp8"}, "known are tensorwise"),
    ({"recipe": "rowwise", "match": ["mlp"]}, "'mlp': no weight"),
    ({"others": {"layers.*": "tensorwse"}}, "recipe 'tensorwse'"),
    ({"recipe": "rowwise", "first": 99}, "first = 99 and last = 0 leave none of 2 layers"),
    ({"recipe": "rowwise", "margin": 400}, "margin 400: 0 to 16"),
    ({"recipe": "nvfp4", "margin": 4}, "margin 4: 0 to 3"),
])  # fmt: skip
def test_mistakes(said, part):
    c = toml.update(config.RunConfig(), {"fp8": said}, "test")
    with pytest.raises(ValueError, match="^fp8: ") as error:
        lowered(c, models.preset("llama3:debug"))
    assert part in str(error.value) and "\n" not in str(error.value)
