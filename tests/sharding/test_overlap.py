"""Products in chunks: the same values and gradients, and what travels while what is multiplied."""

from __future__ import annotations

import pytest
import torch

from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, abstract_mesh, thread_mesh
from fmegatron.sharding.mesh import with_transports
from fmegatron.sharding.traffic import counted
from fmegatron.testing import assert_same, measure
from fmegatron.testing.background import Background, Products


def model():
    return gpt(Config(layers=2, embed=16, heads=4, kv=2, mlp=24, vocab=21, vocab_pad=8, qk_norm="norm"))


def batch(length=16):
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 21, (4, length), generator=generator) for _ in range(2))
    return {"tokens": tokens, "labels": labels}


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize(
    "rules, sizes", [("tp_sp", {"tp": 4}), ("fsdp_tp_sp", {"dp": 2, "tp": 2}), ("tp_sp", {"cp": 2, "tp": 2})]
)
def test_a_model_is_the_same_in_chunks(rules, sizes, chunks):
    expected, sh = measure(model(), SINGLE, batch()), Sharding(thread_mesh(**sizes), RULES[rules])
    actual = measure(model(), sh, batch(), expected=expected, async_tp=chunks, remat="full")
    assert_same(actual, expected, 1e-12)


def test_chunks_that_do_not_divide_are_one_line():
    with pytest.raises(ValueError, match=r"async_tp = 3: a rank's 4 of dim 'seq' do not divide .*, use one of \[1, 2, 4\]"):
        measure(model(), Sharding(thread_mesh(tp=4), RULES["tp_sp"]), batch(), async_tp=3)


LETTERS = {("issue", "all_gather"): "G", ("wait", "all_gather"): "g", ("issue", "reduce_scatter"): "R",
           ("wait", "reduce_scatter"): "r", ("issue", "matmul"): "m"}  # fmt: skip


def order(chunks, pattern, x_shape, w_shape):
    """Launches (capital), waits and matmuls of one einsum, forward and backward, as letters."""
    mesh, traffic = counted(with_transports(abstract_mesh(tp=2), {"tp": Background()}))
    sh = Sharding(mesh, RULES["tp_sp"]).bind({"seq": 8, "mlp": 6}).at(torch.tensor(0)).overlapping(chunks)
    x, w = torch.zeros(x_shape, requires_grad=True), torch.zeros(w_shape, requires_grad=True)
    spelled = []
    with Products(traffic):
        y = sh.einsum(pattern, x, w)
        spelled.append("".join(LETTERS[event[:2]] for event in traffic.events[0]))
        traffic.clear()
        torch.autograd.grad(y, (x, w), torch.ones_like(y))
        spelled.append("".join(LETTERS[event[:2]] for event in traffic.events[0]))
    return spelled


def test_the_next_chunk_travels_while_one_is_multiplied():
    entry = ("batch seq embed, embed mlp -> batch seq mlp", (1, 4, 5), (5, 3))
    leave = ("batch seq mlp, mlp embed -> batch seq embed", (1, 8, 3), (3, 5))
    assert order(1, *entry) == ["Ggm", "mmRr"]  # whole: waited for at once
    assert order(2, *entry) == ["GGgmgm", "mRmRmrr"]  # the last m, the weights' gradient, while the cotangents travel
    assert order(1, *leave) == ["mRr", "Ggmm"]
    assert order(2, *leave) == ["mRmRrr", "GGgmgmm"]
    assert order(4, *entry)[0] == "GGgmGgmGgmgm"
