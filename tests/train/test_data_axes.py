"""What travels over the data axes, in what dtype and when: reshard, prefetch, reductions issued without waiting."""

from __future__ import annotations

import pytest
import torch

from fmegatron import random, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.plan.meter import Meter
from fmegatron.sharding import RULES, SINGLE, Sharding, abstract_mesh, shard, thread_mesh, virtual_mesh
from fmegatron.sharding.bucket import Wire, run_together
from fmegatron.sharding.collectives import Psum, ReduceScatter
from fmegatron.sharding.mesh import with_transports
from fmegatron.sharding.shard_map import spmd
from fmegatron.sharding.traffic import counted
from fmegatron.testing import assert_same, measure
from fmegatron.testing.background import Background, Products
from fmegatron.train.planned import plan_step
from fmegatron.train.replicas import hash_of, make_check
from fmegatron.train.state import init_params
from fmegatron.train.step import value_and_grad

LAYERS = 4


def model():
    return gpt(Config(layers=LAYERS, embed=16, heads=2, mlp=24, vocab=32))


def batch(rows=4, length=8):
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 32, (rows, length), generator=generator) for _ in range(2))
    return {"tokens": tokens, "labels": labels}


# -- reshard after forward ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("remat", ["none", "full", "every-3"])
@pytest.mark.parametrize("reshard, again", [("always", LAYERS + 1), ("first-2", 2), ("never", 0)])
def test_what_stays_gathered_is_not_gathered_again_and_numbers_are_the_same(reshard, again, remat):
    mesh, traffic = counted(thread_mesh(dp=2))
    sh, expected = Sharding(mesh, RULES["fsdp"]), measure(model(), SINGLE, batch())
    actual = measure(model(), sh, batch(), expected=expected, reshard=reshard, remat=remat)
    assert_same(actual, expected, 1e-12)
    plan = plan_step(model(), sh, reshard=reshard, remat=remat)
    traffic.clear()
    with torch.no_grad():
        spmd(plan.sh, lambda here, like, local: gradients(plan, here, local))(torch.zeros(2), on(sh, batch()))
    assert traffic.counts()["all_gather", "dp"][0] == LAYERS + 3 + again


def gradients(plan, here, local):
    params = init_params(plan.model, here, plan.leaves, random.key(0), torch.float32)
    return value_and_grad(plan, here, params, local)


def on(sh, whole):
    return {name: shard(sh, x, "batch seq") for name, x in whole.items()}


# -- the wire -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [virtual_mesh, thread_mesh])
@pytest.mark.parametrize("total", [torch.float32, torch.bfloat16])
def test_sums_travel_as_the_wire_says(make, total):
    mesh, traffic = counted(make(dp=4))
    dp, wire = mesh["dp"], Wire(torch.bfloat16, total)
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(4, *shape, generator=generator) for shape in ((8, 3), (4,), (5,)))

    def program(sh, a, b, c):
        return run_together([a, b, c], [(ReduceScatter(dp, 0),), (ReduceScatter(dp, 0),), (Psum(dp),)], sh.rank, wire=wire)

    got = spmd(Sharding(mesh, RULES["fsdp"]), program)(a, b, c)
    for x, y, scattered in zip((a, b, c), got, (True, True, False), strict=True):
        parts = x.bfloat16()
        if total == torch.float32:
            exact = parts.double().sum(0)
            want = exact if scattered else exact.bfloat16().double()  # the sum travels to the others in 16 bits too
            torch.testing.assert_close(y.flatten(0, 1).double() if scattered else y[0].double(), want, rtol=1e-6, atol=1e-6)
        else:
            want = parts.double().sum(0)
            torch.testing.assert_close(y.flatten(0, 1).double() if scattered else y[0].double(), want, rtol=3e-2, atol=3e-2)
        assert y.dtype == torch.float32
    sent = {name: row for (name, _), row in traffic.counts().items()}
    if total == torch.float32:
        assert sent == {"all_to_all": (2, 2 * (24 + 4) + 2 * 8), "all_gather": (1, 2 * 8)}  # 5 elements travel as 8
    else:
        assert sent == {"reduce_scatter": (1, 2 * 28), "all_reduce": (1, 2 * 5)}


@pytest.mark.parametrize("rules", ["ddp", "fsdp", "zero2"])
def test_adding_in_fp32_over_a_narrow_wire_loses_only_the_rounding_of_the_parts(rules):
    sh, exact = Sharding(virtual_mesh(dp=8), RULES[rules]), measure(model(), SINGLE, batch(8), dtype=torch.float32)

    def error(**settings):
        got = measure(model(), sh, batch(8), dtype=torch.float32, **settings)
        return max(float((got.grads[p] - x).norm() / x.norm()) for p, x in exact.grads.items())

    narrow = error(reduce_dtype=torch.bfloat16, sum_dtype=torch.float32)
    assert error() < 1e-5 < narrow < 8e-3  # bf16 keeps 8 bits: 2^-8 is 4e-3
    in_bf16 = error(reduce_dtype=torch.bfloat16)
    assert narrow < in_bf16 or rules == "ddp" and narrow == in_bf16  # there the sum is rounded on its way back as well


def test_a_sum_in_more_bits_needs_a_wire_of_fewer():
    with pytest.raises(ValueError, match="give reduce_dtype too"):
        plan_step(model(), SINGLE, sum_dtype=torch.float32)
    with pytest.raises(ValueError, match="reshard is always, never, or first-K"):
        plan_step(model(), SINGLE, reshard="first-0")


# -- what is under way while a block computes -----------------------------------------------------------------------
def under_way(rules, prefetch):
    """At each matmul of a step, in order: the collectives that are under way."""
    mesh, traffic = counted(with_transports(abstract_mesh(dp=4), {"dp": Background()}))
    plan = plan_step(model(), Sharding(mesh, RULES[rules]), prefetch=prefetch)
    here = plan.sh.at(torch.tensor(0))
    params = init_params(plan.model, here, plan.leaves, random.key(0), torch.float32)
    with Products(traffic), torch.no_grad():
        value_and_grad(plan, here, params, batch())
    flying, seen = [], []
    for event in traffic.events[0]:
        if event.collective == "matmul":
            seen.append(sorted(flying))
        elif event.kind == "issue":
            flying.append(event.collective)
        else:
            flying.remove(event.collective)
    return seen


def test_the_next_gather_and_the_last_reduction_are_under_way_while_a_block_computes():
    ahead, products = under_way("fsdp", 1), 7 + 2  # q, k, v, o, gate, up, down; scores and values are one kernel
    layer = (len(ahead) - 3) // (3 * LAYERS)  # forward once, backward twice as many; the logits 3
    assert layer in (products - 2, products)
    forward, back = ahead[: layer * LAYERS], ahead[layer * LAYERS + 3 :]
    assert all(seen.count("all_gather") == 1 for seen in forward)  # one block's, not two: it would be memory
    assert all("reduce_scatter" in seen for seen in back)
    assert all("all_gather" in seen for seen in back[: -2 * layer])  # the lowest layer is the last to be gathered
    assert not any(under_way("fsdp", 0))


def test_what_is_reduced_once_a_step_sends_nothing_while_blocks_compute():
    assert not any(under_way("ddp", 1))


# -- copies of parameters -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [virtual_mesh, thread_mesh])
def test_a_flipped_bit_in_one_copy_is_named(make):
    sh = Sharding(make(dp=2, tp=2), RULES["tp"])
    plan = plan_step(model(), sh)
    start = torch.zeros(4)
    params = spmd(plan.sh, lambda here, _: init_params(plan.model, here, plan.leaves, random.key(0), torch.float32))(start)
    params = tree.map(torch.Tensor.contiguous, params)  # on a virtual mesh equal copies may be one
    check = make_check(model(), sh)
    check(params)
    q = params["layers"]["0"]["attn"]["q"]
    q[3].view(torch.int32).flatten()[5] ^= 1  # q lies over tp: its copies are along dp
    with pytest.raises(RuntimeError, match=r"layers\.0\.attn\.q is not the same on all ranks of mesh axis 'dp';"):
        check(params)
    q[3].view(torch.int32).flatten()[5] ^= 1
    norm = params["final"]["norm"]["weight"] if "final" in params else params["norm"]["weight"]
    norm[1].view(torch.int32)[0] ^= 1 << 31
    with pytest.raises(RuntimeError, match="'dp' \\(and 1 more\\)"):  # along dp and along tp
        check(params)


def test_the_hash_sees_values_and_their_order():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert hash_of(x) == hash_of(x.clone()) != hash_of(x.flip(0))
    assert hash_of(torch.zeros(3)) != hash_of(-torch.zeros(3)) and hash_of(torch.zeros(3)) != hash_of(torch.zeros(4))
    assert hash_of(x.bfloat16()) != hash_of(x.half())


# -- memory ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefetch, blocks", [(0, 2.02), (1, 3.3)])
def test_a_step_holds_its_shards_and_two_whole_blocks_or_with_one_on_its_way_three(prefetch, blocks):
    """Parameters of a block with its gradients or their bucket; gradients and their bucket. Ahead: a bucket and its shards."""
    wide = gpt(Config(layers=6, embed=64, heads=4, mlp=512, vocab=64, loss_chunks=1))
    mesh = with_transports(abstract_mesh(dp=4), {"dp": Background()})
    plan = plan_step(wide, Sharding(mesh, RULES["fsdp"]), prefetch=prefetch, remat="full")
    here, tokens = plan.sh.at(torch.tensor(0)), torch.zeros(1, 2, dtype=torch.int64)  # activations of next to nothing
    params = init_params(wide, here, plan.leaves, random.key(0), torch.float32)
    with Meter() as meter, torch.no_grad():
        meter.hold(tree.leaves(params))
        grads, _ = value_and_grad(plan, here, params, {"tokens": tokens, "labels": tokens})

    def held(values):
        return sum(x.numel() * x.element_size() for x in values)

    stacked = [x for leaf, x in zip(plan.leaves.values(), tree.leaves(params), strict=True) if leaf.stacked]
    over = max(meter.peaks.values()) - held(tree.leaves(params)) - held(tree.leaves(grads))
    assert blocks - 0.1 < over / (mesh.size * held(stacked) / 6) < blocks
