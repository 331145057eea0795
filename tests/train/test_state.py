"""The first state: bit-equal initial parameters that lie where the rules say, and a norm that counts elements once."""

from __future__ import annotations

import pytest
import torch

from fmegatron import optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, spmd, virtual_mesh
from fmegatron.testing import assert_dtype, assert_placement, assert_trees_all_equal
from fmegatron.testing.invariance import whole_leaves
from fmegatron.train.leaves import to_optimizer, to_storage
from fmegatron.train.planned import plan_step
from fmegatron.train.state import Over, init

torch.set_num_threads(1)
MODEL = gpt(Config(layers=3, embed=16, heads=4, kv=2, mlp=24, vocab=21, vocab_pad=8, tied=True, no_rope=2))
SIZES = ({"dp": 2, "fsdp": 2}, {"dp": 2, "tp": 4})
PAIRS = [(name, sizes) for name, rules in RULES.items() for sizes in SIZES if sizes.keys() <= rules.axes]


@pytest.mark.parametrize("rules, sizes", PAIRS)
def test_initial_parameters_lie_where_the_rules_say(rules, sizes):
    sh = Sharding(virtual_mesh(**sizes), RULES[rules])
    plan = plan_step(MODEL, sh)
    state = init(MODEL, optim.adamw(optim.constant(0.1)), sh, key=0)
    assert_dtype(state.params, torch.float32)
    for (path, leaf), x in zip(plan.leaves.items(), tree.leaves(state.params), strict=True):
        here = plan.sh if leaf.param.layers is None else plan.sh.bind({"layers": leaf.param.layers})
        assert_placement(here, x, leaf.param.names, "storage", path)
    whole = whole_leaves(plan, state.params, "storage")
    one = init(MODEL, optim.sgd(optim.constant(0.1)), SINGLE, key=0)
    single = whole_leaves(plan_step(MODEL, SINGLE), one.params, "storage")
    assert_trees_all_equal(whole, single)

    def there_and_back(here, params):
        moved = to_optimizer(plan.leaves, params, here)
        return moved, to_storage(plan.leaves, moved, here), Over(here, plan.leaves).norm(moved)

    moved, back, norm = spmd(plan.sh, there_and_back)(state.params)
    assert_trees_all_equal(back, state.params)
    for (path, leaf), x in zip(plan.leaves.items(), tree.leaves(moved), strict=True):
        here = plan.sh if leaf.param.layers is None else plan.sh.bind({"layers": leaf.param.layers})
        assert_placement(here, x, leaf.param.names, "optimizer", path)
    expected = torch.sqrt(sum(x.double().square().sum() for x in single.values()))
    torch.testing.assert_close(norm, expected.float().expand(sh.mesh.size))


def test_how_layers_are_grouped_does_not_change_initial_values():
    """Layers of another kind in between (no rope) change runs, not values."""
    sizes = {"layers": 4, "embed": 16, "heads": 4, "mlp": 24, "vocab": 21, "qk_norm": "norm"}
    one, other = gpt(Config(**sizes)).init(0), gpt(Config(**sizes, sink="learned")).init(0)
    for path, x in tree.to_paths(one["layers"]["0"]).items():
        runs = [tree.to_paths(other["layers"][run])[path] for run in sorted(other["layers"], key=int)]
        assert torch.equal(x, torch.cat(runs)), path
