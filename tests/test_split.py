"""The two halves of a backward: together what one backward gives, each with its own products only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron import tree
from fmegatron.split import SPLIT
from fmegatron.transforms import AUTOGRAD

torch.set_num_threads(1)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def counted(fn, *args):
    with Products() as products:
        return fn(*args), products.count


def chain(depth):
    def block(wrt, rest):
        x = wrt["reads"]["x"]
        for i in range(depth):
            x = torch.tanh(x @ wrt["own"][f"w{i}"]) * wrt["own"]["scale"][i]
        return {"y": x, "aside": x.sum(), "count": torch.ones(())}

    own = {f"w{i}": torch.randn(4, 4, dtype=torch.float64) for i in range(depth)} | {"scale": torch.randn(depth).double()}
    return block, {"own": own, "reads": {"x": torch.randn(3, 4).double(), "unused": torch.randn(2), "ids": torch.arange(3)}}


def mlp(wrt, rest):
    own, x = wrt["own"], wrt["reads"]["x"]
    return {"y": x + (torch.relu(x @ own["up"]) * (x @ own["gate"].t())) @ own["down"] + rest["bias"]}


def shared(wrt, rest):
    """One weight twice, one behind the other, directly and transposed; another behind a cast of its own."""
    w, x = wrt["own"]["w"], wrt["reads"]["x"]
    half = wrt["own"]["v"].exp()
    return {"y": (x @ w @ half).sin() @ w.t() + (x @ half) * w[0]}


def twice(wrt, rest):
    """One weight, one use right behind the other."""
    return {"y": (wrt["reads"]["x"] @ wrt["own"]["w"]).sin() @ wrt["own"]["w"]}


def no_input(wrt, rest):
    return {"y": wrt["own"]["table"][rest["ids"]] * 2}


def two_outputs(wrt, rest):
    a, b = (wrt["reads"]["x"] @ wrt["own"]["w"]).chunk(2, -1)
    return {"a": a, "b": b * wrt["own"]["s"]}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


CASES = {
    "chain": lambda: (*chain(3), {}),
    "mlp": lambda: (mlp, {"own": {"up": double(4, 6), "gate": double(6, 4), "down": double(6, 4)},
                          "reads": {"x": double(5, 4)}}, {"bias": double(4)}),
    "shared": lambda: (shared, {"own": {"w": double(4, 4), "v": double(4, 4)}, "reads": {"x": double(4, 4)}}, {}),
    "twice": lambda: (twice, {"own": {"w": double(4, 4)}, "reads": {"x": double(4, 4)}}, {}),
    "no input": lambda: (no_input, {"own": {"table": double(5, 3)}, "reads": {}}, {"ids": torch.tensor([1, 1, 4])}),
    "two outputs": lambda: (two_outputs, {"own": {"w": double(4, 6), "s": double(3)}, "reads": {"x": double(2, 4)}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_halves_are_the_whole(case):
    block, wrt, rest = CASES[case]()
    values, _, whole = AUTOGRAD.vjp(block, wrt, rest)
    cotangents = {name: torch.randn_like(y) for name, y in values.items() if y.is_floating_point() and name != "count"}
    expected = tree.to_paths(whole(cotangents))
    _, _, halves = SPLIT.vjp(block, wrt, rest)
    early, late = tree.to_paths(halves.early(cotangents)), tree.to_paths(halves.late())
    assert late.keys() == expected.keys()
    for path, x in expected.items():
        torch.testing.assert_close(late[path], x, rtol=1e-13, atol=1e-13)
        if path.startswith("reads"):
            assert torch.equal(early[path], late[path])
    _, _, again = SPLIT.vjp(block, wrt, rest)
    for path, x in tree.to_paths(again(cotangents)).items():
        assert torch.equal(x, expected[path])


@pytest.mark.parametrize("case, early, late", [("chain", 3, 3), ("mlp", 3, 3), ("no input", 0, 0), ("two outputs", 1, 1)])
def test_each_half_has_its_own_products(case, early, late):
    block, wrt, rest = CASES[case]()
    values, _, halves = SPLIT.vjp(block, wrt, rest)
    cotangents = {name: torch.randn_like(y) for name, y in values.items() if name not in ("count", "aside")}
    assert counted(halves.early, cotangents)[1] == early
    assert counted(halves.late)[1] == late


@given(st.integers(1, 5), st.data())
def test_some_cotangents_only(depth, data):
    block, wrt = chain(depth)
    values, _, whole = AUTOGRAD.vjp(block, wrt, {})
    names = data.draw(st.sampled_from([["y"], ["aside"], ["y", "aside"]]))
    cotangents = {name: torch.ones_like(values[name]) for name in names}
    halves = SPLIT.vjp(block, wrt, {})[2]
    halves.early(cotangents)
    expected = tree.to_paths(whole(cotangents))
    for path, x in tree.to_paths(halves.late()).items():
        torch.testing.assert_close(x, expected[path])
