"""fmegatron.testing: each assertion passes where it should, and says where it fails."""

from __future__ import annotations

import pytest
import torch

from fmegatron import testing
from fmegatron.models.gpt import Config, gpt
from fmegatron.models.model import Model, Node
from fmegatron.nn.param import Param, normal
from fmegatron.sharding import RULES, Sharding, virtual_mesh


def test_trees_close():
    a = {"w": {"q": torch.tensor([100.0, 1.0]), "k": torch.ones(2)}, "n": torch.tensor([float("-inf"), 0.0])}
    b = {"w": {"q": torch.tensor([100.0, 1.001]), "k": torch.ones(2)}, "n": torch.tensor([float("-inf"), 0.0])}
    testing.assert_trees_all_close(a, b, 1e-4)  # relative to 100, the leaf's largest
    with pytest.raises(AssertionError, match=r"1 of 3 leaves differ .*\n  w\.q: 1e-05, at \[1\]: 1, expected 1\.001"):
        testing.assert_trees_all_close(a, b, 1e-6)
    with pytest.raises(AssertionError, match=r"w\.q: 1 of 2, at \[1\]"):
        testing.assert_trees_all_equal(a, b)
    with pytest.raises(AssertionError, match=r"missing \['w.k'\], unexpected \['w.v'\]"):
        testing.assert_trees_all_close({"w": {"v": a["n"]}}, {"w": {"k": a["n"]}})
    with pytest.raises(AssertionError, match=r"n: shape \(2,\), expected \(1, 2\)"):
        testing.assert_trees_all_close({"n": a["n"]}, {"n": a["n"][None]})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AssertionError):
            testing.assert_trees_all_close([torch.tensor([bad])], [torch.tensor([1.0])], 1e9)


def test_error_of_zeros_needs_a_floor():
    noise, zero = torch.tensor([1e-17]), torch.zeros(1)
    assert testing.error(noise, zero) == float("inf") and testing.error(noise, zero, floor=1.0) < 1e-16
    assert testing.error(zero, zero) == 0 == testing.error(torch.zeros(0), torch.zeros(0))


def test_shapes_and_dtypes():
    testing.assert_shape(torch.zeros(2, 3), (None, 3))
    with pytest.raises(AssertionError, match=r"shape \(2, 3\), expected \('any', 4\)"):
        testing.assert_shape(torch.zeros(2, 3), (None, 4))
    testing.assert_dtype({"a": torch.zeros(1)}, torch.float32)
    with pytest.raises(AssertionError, match="a.b: torch.int64"):
        testing.assert_dtype({"a": {"b": torch.zeros(1, dtype=torch.int64)}}, torch.float32)


def own_model(mix):
    """A model of one's own of two nodes; `mix` may be wrong on a mesh."""

    def embed(sh, p, v, key):
        return {"h": sh.lookup("batch seq, vocab embed -> batch seq embed", v["tokens"], p["table"])}

    def loss(sh, p, v, key):
        heads = mix(sh, sh.einsum("batch seq embed, embed heads -> batch seq heads", v["h"], p["w"]))
        return {"loss.own": sh.total(heads.square(), "batch seq heads")}

    declare = {"table": Param("vocab embed", normal(1.0)), "w": Param("embed heads", normal(1.0))}
    chain = (
        Node(embed, (("table", "table"),), ("tokens",), ("h",), index=0),
        Node(loss, (("w", "w"),), ("h",), ("loss.own",), index=1),
    )
    counts = {"own": lambda sh, v: sh.total(torch.ones_like(v["tokens"], dtype=torch.float64), "batch seq")}
    return Model(declare, {"vocab": 8, "embed": 4, "heads": 4}, chain, lambda sh, batch: dict(batch),
                 lambda sh, v: {name: count(sh, v) for name, count in counts.items()})  # fmt: skip


def test_a_users_own_model_passes_and_a_mix_over_a_sharded_name_is_seen():
    batch = {"tokens": torch.arange(32).reshape(4, 8) % 8}
    over = [Sharding(virtual_mesh(dp=2, tp=2), RULES["tp"])]
    testing.assert_mesh_invariant(own_model(lambda sh, x: x.tanh()), batch, over)
    with pytest.raises(AssertionError, match="tp on virtual mesh .*'tp': 2.*\n.*loss.own"):
        testing.assert_mesh_invariant(own_model(lambda sh, x: x.softmax(-1)), batch, over)  # over local heads: wrong


def test_a_value_without_names_is_asked_for():
    model = own_model(lambda sh, x: x)
    first = Node(lambda *a: {"mine": torch.zeros(1)}, writes=("mine",), index=9)
    renamed = Model(**{**vars(model), "chain": (first, *model.chain)})
    with pytest.raises(ValueError, match="value 'mine' has no names"):
        testing.assert_mesh_invariant(renamed, {"tokens": torch.zeros(4, 8, dtype=torch.int64)}, [])


def test_every_preset_is_tried_by_default():
    from fmegatron.testing.invariance import shardings

    assert {sh.rules.name for sh in shardings()} >= RULES.keys() - {"single"}
    net = gpt(Config(layers=1, embed=8, heads=2, mlp=8, vocab=8))
    testing.assert_mesh_invariant(net, {"tokens": torch.zeros(2, 2, dtype=torch.int64), "labels": torch.ones(2, 2).long()},
                                  shardings([{"dp": 2}])[:2])  # fmt: skip
