"""Remat is a matter of counts, not of numbers: matmuls say what ran again, live bytes say what was kept."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron import random
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, abstract_mesh
from fmegatron.testing import assert_same, measure
from fmegatron.train import step, weights
from fmegatron.train.chain import visits
from fmegatron.train.planned import plan_step
from fmegatron.train.remat import SELECTIVE, Remat, parse_remat
from fmegatron.train.state import init_params
from fmegatron.train.step import value_and_grad

torch.set_num_threads(1)
LAYERS = 4
FORWARD = 8  # matmuls of a layer's forward: q, k, v, scores, values, o, up, down


class Matmuls(TorchDispatchMode):
    """Counts matmuls, those inside fused attention as two."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            self.count += 1
        return func(*args, **(kwargs or {}))


def model(**more):
    """Softcap keeps attention unfused: its matmuls are seen, and its scores are residuals."""
    sizes = {"embed": 16, "heads": 2, "mlp": 48, "vocab": 32, "activation": "gelu", "attention_softcap": 9.0}
    return gpt(Config(layers=LAYERS, **{**sizes, **more}))


def batch(length=16):
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(0, 32, (2, length), generator=generator)}


def matmuls(remat, **settings):
    plan = plan_step(model(), SINGLE, remat=remat, **settings)
    params = plan.model.init(0)
    with Matmuls() as counted, torch.no_grad():
        value_and_grad(plan, plan.sh, params, batch())
    return counted.count


def test_each_policy_runs_again_exactly_what_it_says():
    none = matmuls("none")
    assert none == 3 * (FORWARD * LAYERS + 1)  # forward once, backward twice as many; and the logits
    assert matmuls("full") == none + FORWARD * LAYERS
    assert matmuls("every-1") == matmuls("every-3") == none + FORWARD * LAYERS
    assert matmuls("selective:core_attention") == none + 2 * LAYERS  # scores and values
    assert matmuls("selective:mlp_activation") == none


@pytest.mark.parametrize("remat", ["full", "every-2", "every-3", "selective", "selective:core_attention"])
def test_numbers_do_not_change(remat):
    whole = batch() | {"weights": torch.rand(2, 16, dtype=torch.float64), "labels": batch()["tokens"]}
    expected = measure(model(), SINGLE, whole)
    assert_same(measure(model(), SINGLE, whole, remat=remat), expected, 1e-12)


def kept(remat):
    """Bytes that a layer's forward leaves for backward, beside its parameters."""
    plan = plan_step(model(), SINGLE, remat=remat)
    seen = {}

    def pack(x):
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    sh, node = plan.sh, plan.model.chain[1]
    params = plan.model.init(0)
    own = torch.utils._pytree.tree_map(lambda x: x[0].clone().requires_grad_(), params["layers"]["0"])
    values = plan.model.chain[0].fn(sh, params["embed"], batch(), None)
    values["h"] = values["h"].detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        node.fn(sh, own, values, None)
    return sum(seen.values())


def test_selective_drops_the_residuals_of_the_parts_it_names():
    scores = 2 * 2 * 16 * 16 * 4  # batch, heads, queries, keys, bytes
    hidden = 2 * 16 * 48 * 4
    none = kept("none")
    assert none - kept("selective:core_attention") >= 2 * scores  # tanh and softmax at the least
    assert 0 <= none - kept("selective:mlp_activation") <= hidden + 8
    assert kept("selective") < none - 2 * scores + hidden


def test_visits_are_the_order_in_which_parameters_are_needed():
    chain = model().chain
    number = {id(node): i for i, node in enumerate(chain)}
    sh = Sharding(abstract_mesh(fsdp=8), RULES["fsdp"])
    leaves = plan_step(model(embed=64, mlp=256), sh).leaves

    def order(remat, free, reshard="always"):
        given = weights.Weights(sh, leaves, {}, None, 1, free, weights.parse_reshard(reshard))
        return [number[id(node)] for node in visits(chain, parse_remat(remat), given)]

    forward = list(range(LAYERS + 3))
    assert order("none", False) == forward
    assert order("none", True) == forward + [5, 4, 3, 2, 1]  # the loss (6) went back in its forward, a lookup (0) needs none
    assert order("full", True) == forward + [5, 4, 3, 2, 1]
    assert order("every-2", True) == forward + [5, 3, 4, 1, 2]  # a segment runs again forwards
    for remat in ("none", "full", "every-2"):
        assert order(remat, True, "never") == order(remat, False, "never") == forward
    assert order("none", True, "first-2") == order("full", True, "first-2") == forward + [2, 1]


def test_policies_have_names():
    assert parse_remat("none") == Remat() and parse_remat("full") == Remat(every=1) == parse_remat("every-1")
    assert parse_remat("selective") == Remat(parts=SELECTIVE)
    assert parse_remat("selective:norm,mlp_activation") == Remat(parts=("norm", "mlp_activation"))
    for wrong in ("every-0", "all", "selective:softmax", ""):
        with pytest.raises(ValueError, match="remat is none, full, every-K"):
            parse_remat(wrong)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_parameters_in_use_are_gathered_a_block_ahead_and_freed_behind(remat):
    """Under fsdp, whole parameters exist for two blocks at a time: this one's, and the next one's on their way."""
    assert 1 <= peak_in_use(remat, weights.Weights.leave) <= 2
    assert remat != "none" or peak_in_use(remat, lambda self, node, own, done: None) > 2  # never left: the test sees it


def peak_in_use(remat, leave):
    """The most bytes of gathered parameters alive at once, in blocks."""
    sh = Sharding(abstract_mesh(fsdp=8), RULES["fsdp"])
    plan = plan_step(model(embed=64, mlp=256), sh, remat=remat)
    held, peak = {}, [0]
    def bytes_now():
        return sum(x().untyped_storage().nbytes() for x in held.values() if x() is not None)

    class Watched(weights.Weights):
        def take(self, node):
            own = super().take(node)
            for x in torch.utils._pytree.tree_leaves(own):
                held[id(x)] = weakref.ref(x)
            peak[0] = max(peak[0], bytes_now())
            return own

        def leave(self, node, own, done=False):
            peak[0] = max(peak[0], bytes_now())
            leave(self, node, own, done)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(step, "Weights", Watched)
        here = plan.sh.at(torch.tensor(0))
        params = init_params(plan.model, here, plan.leaves, random.key(0), torch.float32)
        value_and_grad(plan, here, params, batch())
    leaves = zip(plan.leaves.values(), torch.utils._pytree.tree_leaves(params), strict=True)
    block = sum(4 * 8 * x.numel() // LAYERS for leaf, x in leaves if leaf.stacked)
    return peak[0] / block
