"""Products in chunks: the same values and gradients, and what travels while what is multiplied."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron.compiled import Compiled
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, abstract_mesh, thread_mesh
from fmegatron.sharding.mesh import with_transports
from fmegatron.sharding.traffic import counted
from fmegatron.sharding.transports import Group
from fmegatron.testing import assert_same, assert_trees_all_close, measure
from fmegatron.testing.background import Background, Products
from fmegatron.transforms import AUTOGRAD, why_not_compile


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


class Late(TorchDispatchMode):
    """The collectives of rank 0 of two whose partner sends zeros; each reads what is sent when it is waited for."""

    def __init__(self):
        super().__init__()
        self.spelled, self.under_way = "", {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        letters = {"gather_blocks": "G", "reduce_scatter_tensor": "R", "wait_tensor": "", "mm": "m", "bmm": "m"}
        if name not in letters or type(args[0]) is not torch.Tensor:  # while it is traced
            return func(*args, **(kwargs or {}))
        self.spelled, sent = self.spelled + letters[name], args[0]
        if name == "gather_blocks":
            self.under_way[sent.data_ptr()] = "g", lambda: sent[1].zero_()
        elif name == "reduce_scatter_tensor":
            got = sent.new_full((len(sent) // 2, *sent.shape[1:]), torch.nan)
            self.under_way[got.data_ptr()] = "r", lambda: got.copy_(sent[: len(got)])
            return got
        elif name == "wait_tensor":
            letter, arrive = self.under_way.pop(sent.data_ptr())
            self.spelled += letter
            arrive()
            return sent
        return func(*args, **(kwargs or {}))


@pytest.fixture
def half():
    """A group of two of which only rank 0 is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield Group(dist.group.WORLD.group_name, place=0)
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))
@pytest.mark.parametrize("pattern, x_shape, w_shape, forward, backward", [
    ("batch seq embed, embed mlp -> batch seq mlp", (1, 4, 5), (5, 3), "GGgmGgmGgmgm", "mRmRmRmRmrrrr"),
    ("batch seq mlp, mlp embed -> batch seq embed", (1, 8, 3), (3, 5), "mRmRmRmRrrrr", "GGgmGgmGgmgmm"),
])  # fmt: skip
def test_compiled_chunks_send_what_nobody_overwrites(half, pattern, x_shape, w_shape, forward, backward):
    """A result that is waited for as a view, or has `out=`, does not tell Inductor that what was sent is still being read."""
    mesh = with_transports(abstract_mesh(tp=2), {"tp": half})
    sh = Sharding(mesh, RULES["tp_sp"]).bind({"seq": 8, "mlp": 6}).at(torch.tensor(0)).overlapping(4)
    wrt = {"x": torch.rand(x_shape, dtype=torch.float64), "w": torch.rand(w_shape, dtype=torch.float64)}

    def block(wrt, rest):
        return {"y": sh.einsum(pattern, wrt["x"].sin(), wrt["w"]).cos()}

    def found(engine):
        with Late() as late:
            values, _, pullback = engine.vjp(block, wrt, {}, "block")
            ahead, late.spelled = late.spelled, ""
            return {**values, **pullback({"y": torch.ones_like(values["y"])})}, ahead, late.spelled

    (values, *orders), (expected, *eager) = found(Compiled()), found(AUTOGRAD)
    assert orders == eager == [forward, backward]
    assert_trees_all_close(values, expected, 1e-14)
