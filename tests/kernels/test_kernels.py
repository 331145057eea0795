"""Every kernel against its reference in fp64: forward, backward, odd shapes, strides, NaN and inf, transforms, compilers.

On CPU they run in Triton's interpreter, on a GPU compiled; the tests are the same.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DEVICE, Case, D
from functorch.compile import aot_function, nop

pytest.importorskip("triton")

# Largest error allowed, over the largest value of the fp64 result: some units in the last place of the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def errors(got, want):
    """Of each result, the largest error over the largest value."""
    return [float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) if b.numel() else 0.0
            for a, b in zip(got, want, strict=True)]


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16,
                                   pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
def test_equals_the_fp64_reference(case: Case, dtype):
    inputs = case.draw(7, dtype)
    exact = [x.double() if i in case.moving(inputs) else x for i, x in enumerate(inputs)]
    got, want = case.run("triton", inputs), case.run("reference", exact)
    assert all(x.dtype == y.dtype for x, y in zip(got, case.run("reference", inputs), strict=True))
    assert max(errors(got, want)) < TOLERANCE[dtype], errors(got, want)


@every
@pytest.mark.parametrize("rows", [0, 13])
def test_any_number_of_rows(case: Case, rows):
    inputs = case.draw(rows)
    got, want = case.run("triton", inputs), case.run("reference", inputs)
    assert [x.shape for x in got] == [x.shape for x in want]
    assert max(errors(got, want)) < 1e-13


def test_groups_of_several_tiles():
    """A tile has 16 rows in the interpreter, and 128 on a GPU."""
    case = next(case for case in CASES if case.name == "grouped_matmul")
    inputs = case.draw(700 if DEVICE == "cuda" else 60, torch.float32)
    exact = [x.double() if i in case.moving(inputs) else x for i, x in enumerate(inputs)]
    assert max(errors(case.run("triton", inputs), case.run("reference", exact))) < TOLERANCE[torch.float32]


@every
def test_strides_do_not_matter(case: Case):
    inputs = case.draw(6)
    strided = [x if x is None or x.dim() == 0 else torch.stack((x, x), 0).movedim(0, -1)[..., 0].transpose(0, -1).contiguous()
               .transpose(0, -1) if x.dim() > 1 else torch.stack((x, x), -1)[:, 0] for x in inputs]
    assert any(not x.is_contiguous() for x in strided if x is not None)
    assert max(errors(case.run("triton", strided), case.run("triton", inputs))) < 1e-15


@every
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.long)])
def test_what_is_not_finite_stays_in_its_row(case: Case, value):
    """A row with it is what the reference makes of it, up to which of NaN and inf; the other rows are as without it."""
    inputs = case.draw(5, torch.float32)
    bad = [x if x is None else x.clone() for x in inputs]
    at = (0, 2) if inputs[0].dim() == 4 else (2,)
    bad[0][at].view(-1)[1] = value
    with torch.no_grad():
        clean, got, want = (case.call(form, *xs) for form, xs in (("triton", inputs), ("triton", bad), ("reference", bad)))
    for a, b, c in zip(*(y if isinstance(y, tuple) else (y,) for y in (clean, got, want)), strict=True):
        assert torch.equal(b.isfinite(), c.isfinite()) and torch.equal(b.isnan(), c.isnan())
        if case.moves:
            continue
        keep = torch.ones_like(a, dtype=torch.bool)
        keep[at] = False
        assert torch.equal(a[keep], b[keep])


@every
def test_every_element_is_written(case: Case):
    """Fresh memory is filled with NaN, and the result is the same."""
    inputs = case.draw(5, torch.float32)
    want = case.run("triton", inputs)
    torch.use_deterministic_algorithms(True)
    try:
        got = case.run("triton", inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def scalar(case: Case, form, inputs):
    """A scalar function of the moving inputs."""
    at = case.moving(inputs)

    def fn(*values):
        now = list(inputs)
        for i, x in zip(at, values, strict=True):
            now[i] = x
        out = case.call(form, *now)
        return sum(y.sin().sum() for y in (out if isinstance(out, tuple) else (out,)))

    return fn, [inputs[i] for i in at]


@every
def test_under_torch_func(case: Case):
    """vmap of grad, forward mode, and a derivative of a derivative, all as the reference's."""
    several = [case.draw(2, seed=seed) for seed in range(2)]
    results = {}
    for form in ("reference", "triton"):
        fn, values = scalar(case, form, several[0])
        stacked = [torch.stack(same) for same in zip(*(scalar(case, form, one)[1] for one in several), strict=True)]
        every_arg = tuple(range(len(values)))
        grads = torch.vmap(torch.func.grad(fn, every_arg))(*stacked)
        tangent = torch.func.jvp(fn, tuple(values), tuple(x.cos() for x in values))[1]
        first = torch.func.grad(fn, every_arg)
        second = torch.func.grad(lambda *xs, first=first: sum(g.sin().sum() for g in first(*xs)), every_arg)(*values)
        results[form] = [*grads, tangent, *second]
    assert max(errors(results["triton"], results["reference"])) < 1e-12


@every
def test_traced_by_aot_autograd(case: Case):
    """As a compiled block's Python is: on fake tensors, forward and backward in one graph."""
    inputs = case.draw(3)
    moving, there = case.moving(inputs), [i for i, x in enumerate(inputs) if x is not None]

    def fn(*given):
        now = dict(zip(there, given, strict=True))
        out = case.call("triton", *(now.get(i) for i in range(len(inputs))))
        return sum(y.sin().sum() for y in (out if isinstance(out, tuple) else (out,)))

    def grads(run):
        given = {i: inputs[i].detach().requires_grad_(i in moving) for i in there}
        return torch.autograd.grad(run(*given.values()), [given[i] for i in moving])

    for a, b in zip(grads(aot_function(fn, fw_compiler=nop, bw_compiler=nop)), grads(fn), strict=True):
        assert torch.equal(a, b)


def test_in_a_graph_of_dynamo():
    case = next(case for case in CASES if case.name == "rms")
    fn, values = scalar(case, "triton", case.draw(3, torch.float32))
    values = [x.requires_grad_() for x in values]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*values), values), torch.autograd.grad(fn(*values), values), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_gradients_by_differences():
    """torch's own numerical derivative, of a kernel whose reference could be wrong in the same way."""
    for name in ("layer_centred_added", "glu_quick_gelu_full", "cross_entropy_full", "linear"):
        case = next(case for case in CASES if case.name == name)
        fn, values = scalar(case, "triton", case.draw(2, D))
        assert torch.autograd.gradcheck(fn, [x.requires_grad_() for x in values], fast_mode=True), name
