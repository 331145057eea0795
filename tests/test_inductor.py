"""Graphs as one library each, and functions of any number of rows."""

from __future__ import annotations

import pytest
import torch

from fmegatron.transforms import why_not_compile

pytestmark = pytest.mark.skipif(why_not_compile() is not None, reason=f"cannot compile: {why_not_compile()}")

SCALE = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const double* x, double* out, const int64_t n, const double by)
{
    for (int64_t i = 0; i < n; ++i) out[i] = by * x[i];
}
"""
FILL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(int64_t* out)
{
    if (out[0] < 0) throw std::runtime_error("negative");
    out[0] = 7;
}
"""


def test_kernels_of_one_name_live_in_one_library():
    from fmegatron.inductor import Kernels

    scope = {}
    kernels = Kernels(scope)
    scope["scale"] = first = kernels.add("scale", [], SCALE)
    scope["fill"] = kernels.add("fill", [], FILL)
    kernels.build()
    x, out, n = torch.arange(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    first(x, out, 4, 0.5)
    assert out.tolist() == [0.0, 0.5, 1.0, 1.5, 0.0]
    assert scope["scale"] is not first  # nothing stands between a graph and its kernels any more
    scope["fill"](n)
    assert n.item() == 7
    for wrong in (lambda: scope["fill"](), lambda: scope["fill"](n, n), lambda: scope["fill"](n.fill_(-1))):
        with pytest.raises(RuntimeError, match="arguments|negative"):
            wrong()
    with pytest.raises(TypeError):
        scope["scale"](x, out, "four", 0.5)


def test_a_graph_of_several_kernels_is_built_once(monkeypatch):
    from torch._inductor.utils import fresh_cache

    from fmegatron import inductor
    from fmegatron.compiled import Compiled

    built = []
    monkeypatch.setattr(inductor, "library", lambda sources, really=inductor.library: built.append(sources) or really(sources))

    def block(wrt, rest):
        h = torch.tanh((rest["x"] * 2 + 1) @ wrt["w"])
        return {"y": torch.softmax(h @ wrt["w"], -1)}

    w, x = torch.randn(16, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    with fresh_cache():
        out, _, pull = Compiled().vjp(block, {"w": w}, {"x": x}, kind="block")
        seed = torch.randn_like(out["y"])
        grad = pull({"y": seed})["w"]
    w.requires_grad_()
    y = block({"w": w}, {"x": x})["y"]
    torch.testing.assert_close(out["y"], y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(y, w, seed)[0], rtol=1e-12, atol=1e-12)
    some = [len(sources) for sources in built if sources]
    assert len(some) == 2 and some[0] >= 3  # forward, with a kernel between products and around them, and backward


def test_rows_are_compiled_once():
    from fmegatron.compiled import Rows

    run = Rows(lambda add, x, vector, more: (x + vector[1] * add, more["y"].sum(1)))
    for n in (2, 3, 64, 129):
        x, vector = torch.randn(n, 8, dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)
        out, sums = run(4, x, vector, {"y": x.t().contiguous().t()})
        torch.testing.assert_close(out, x + 12)
        torch.testing.assert_close(sums, x.sum(1))
    assert len(run.graphs) == 1
    with pytest.raises(AssertionError, match="number of rows"):
        Rows(lambda x: (x + (1 if x.shape[0] > 5 else 2),))(x)
