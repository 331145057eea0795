"""Multi-tensor AdamW and the gradient's norm against torch's own and the optimizer's pass, whatever the state lies in."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE

from fmegatron import optim, tree
from fmegatron.kernels import adamw, grad_norm
from fmegatron.kernels.multi import integers
from fmegatron.optim.base import LOCAL, Local
from fmegatron.optim.packed import halved, joined

pytest.importorskip("triton")
SHAPES = [(3,), (5000,), (17, 3), (0, 4), ()]


def draw(dtype, seed, scale=1.0):
    torch.manual_seed(seed)
    return [(torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_norm(dtype, scale):
    """Squares of large values do not overflow."""
    tensors = draw(dtype, 0, scale)
    want = torch.linalg.vector_norm(torch.cat([x.double().flatten() for x in tensors]))
    assert float((grad_norm.norm(tensors, form="triton").double() / want - 1).abs()) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_norm_of_what_is_not_finite(value):
    tensors = [torch.full((5000,), 1.0 if value else 0.0, device=DEVICE), torch.full((2,), value, device=DEVICE)]
    assert torch.equal(grad_norm.norm(tensors, form="triton").isfinite(), grad_norm.norm(tensors).isfinite())
    assert value == value or grad_norm.norm(tensors, form="triton").isnan()


def test_integers_keep_every_bit():
    values = [2**62 + 1, -1, 0, 2**53 + 1]
    assert integers(values, torch.device(DEVICE)).tolist() == values


def test_tensors_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="contiguous tensors"):
        grad_norm.norm([torch.ones(3), torch.ones(3).double()], form="triton")


# -- AdamW ----------------------------------------------------------------------------------------------------------
LEAVES = {"a": (2, 2112), "b.none": (0, 32), "c.odd": (7, 5), "d.one": ()}


def params_of(seed, dtype=torch.float32, scale=1.0):
    torch.manual_seed(seed)
    return tree.from_paths({path: (scale * torch.randn(shape, dtype=torch.float64)).to(DEVICE, dtype)
                            for path, shape in LEAVES.items()})


def optimizer(first="fp32", second="fp32", **options):
    tx = optim.adamw(optim.cosine(1e-2, warmup=1, steps=9), **options)
    return optim.in_formats(optim.chain(optim.clip_by_global_norm(1.0), tx), first, second)


def steps(tx, kernels, dtype=torch.float32, grads=None, halves=False, donate=True, start=None, span=range(3)):
    """Parameters and state after some steps, of which the second is skipped: its gradients are not finite."""
    step = optim.fuse(tx, kernels)
    params, state = start or (params_of(0, dtype), None)
    state = tx.init(params) if state is None else state
    params = halved(params) if halves and start is None else params
    for i in span:
        g = tree.map(lambda x: x.to(grads or x.dtype), params_of(i + 1, dtype, 0.1 if i != 1 else float("inf")))
        params, state = step(g, state, params, ok=torch.tensor(i != 1, device=DEVICE), donate=donate, compile=False)
    return params, state


FORMATS = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp8", "fp8")]


def launched(monkeypatch):
    """The leaves of each launch from now on."""
    seen, real = [], adamw.adamw
    monkeypatch.setattr("fmegatron.optim.multi_tensor.adamw", lambda adam, leaves, form: seen.append(len(leaves)) or real(
        adam, leaves, form=form))
    return seen


@pytest.mark.parametrize("formats, halves", [(one, i % 2 == 1) for i, one in enumerate(FORMATS)])
def test_adamw_is_the_optimizers_pass(formats, halves, monkeypatch):
    """The same draws: an element differs, by a step of its format, where the last bits of fp32 tip a rounding over."""
    tx, seen = optimizer(*formats), launched(monkeypatch)
    ours, theirs = (steps(tx, kernels, halves=halves) for kernels in ("triton", "reference"))
    blocked = any(name.startswith("fp") and name != "fp32" for name in formats)
    assert seen == [1 if blocked else 3] * 3  # one launch a step; leaves of cut blocks by the pass, the empty one by none
    one, other = joined(ours[0]), joined(theirs[0])
    for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if formats != ("fp32", "fp32") else 2e-6, atol=1e-6)
    for path, a in tree.to_paths({"s": ours[1][1]}).items():
        b = tree.to_paths({"s": theirs[1][1]})[path]
        if a.dtype in (torch.float32, torch.int64):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9)
        else:
            assert a.dtype == b.dtype and (a != b).sum() <= 2e-3 * a.numel() + 1, path


def test_fp64_is_the_chain_and_torch():
    tx = optim.adamw(1e-2, weight_decay=0.2, mask=lambda path, leaf: True)
    ours, theirs = (steps(tx, kernels, torch.float64, donate=False) for kernels in ("triton", "reference"))
    leaves = [p.requires_grad_() for p in tree.leaves(params_of(0, torch.float64))]
    oracle = torch.optim.AdamW(leaves, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)
    for i in (0, 2):
        for p, g in zip(leaves, tree.leaves(params_of(i + 1, torch.float64, 0.1)), strict=True):
            p.grad = g
        oracle.step()
    for a, b, c in zip(tree.leaves(ours[0]), tree.leaves(theirs[0]), leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(a, c.detach(), rtol=1e-13, atol=1e-14)


def test_the_kernel_is_its_reference():
    made = []
    for form in ("triton", "reference"):
        torch.manual_seed(0)
        p, g, m, v = (torch.randn(5000, dtype=torch.float64, device=DEVICE) for _ in range(4))
        vector = torch.tensor([0.7, 1.0, 3.0, 5.0, 0.1, -0.01, 0.5], dtype=torch.float64, device=DEVICE)
        adamw.adamw(adamw.Adam(), [adamw.Leaf(g, p, m, v.abs_(), vector)], form=form)
        made.append((p, m, v))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("donate", [False, True])
def test_a_skipped_step_changes_no_bit(donate):
    tx = optimizer("fp8", "bf16")
    before = steps(tx, "triton", halves=True, span=[0])
    copy = tree.map(torch.clone, before)
    after = steps(tx, "triton", halves=True, donate=donate, start=before, span=[1])
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after), tree.leaves(copy), strict=True))


def test_the_same_bits_when_taken_up_again():
    tx = optimizer("bf16", "fp8")
    whole = steps(tx, "triton", halves=True)
    half = tree.map(torch.clone, steps(tx, "triton", halves=True, span=range(2)))
    assert all(torch.equal(a, b) for a, b in zip(
        tree.leaves(steps(tx, "triton", halves=True, start=half, span=range(2, 3))), tree.leaves(whole), strict=True))


class Part(Local):
    """The view from a rank that holds some columns of "w" [6, 128]."""

    def index(self, path, leaf):
        rows, columns = LOCAL.index(path, leaf.new_zeros(6, 128))[1:]
        return path, rows, columns[int(leaf[0, 0]) :][: leaf.shape[1]]


def test_shards_draw_what_the_whole_draws():
    tx = optim.in_formats(optim.adamw(1e-2), "fp8", "bf16")
    g = torch.randn(6, 128, device=DEVICE)
    p = torch.randn(6, 128, device=DEVICE)
    p[0, ::32] = torch.arange(0, 128, 32)  # Part reads where a shard begins

    def run(columns, over):
        own = {"w": p[:, columns].contiguous().clone()}
        return optim.fuse(tx, "triton")({"w": g[:, columns]}, tx.init(own), own, over=over, donate=True, compile=False)

    whole = tree.leaves(run(slice(None), LOCAL))
    parts = [tree.leaves(run(slice(a, b), Part())) for a, b in ((0, 32), (32, 128))]
    for full, *cut in zip(whole, *parts, strict=True):
        assert torch.equal(full, torch.cat(cut, -1) if full.dim() else cut[0])


def test_gradients_in_bf16_and_other_tails():
    """bf16 gradients are widened; what is not adam's tail goes by the pass, to the last bit."""
    ours, theirs = (steps(optim.adamw(1e-2), kernels, grads=torch.bfloat16) for kernels in ("triton", "reference"))
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    for tx in (optim.lion(1e-2), optim.decoupled_adamw(1e-2), optim.adamw(1e-2, betas=(optim.Switch(0.9, 0.8, 1), 0.95))):
        ours, theirs = (steps(tx, kernels) for kernels in ("triton", "reference"))
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True))


def test_groups_and_host_memory():
    """Each group is a launch; pieces from host memory are one each, and the bits are the same."""
    groups = optim.multi({"x": optim.adamw(1e-2), "y": optim.adam(1e-3)}, [("a", "x"), ("*", "y")])
    tx = optim.in_formats(groups, "bf16", "bf16")
    here, there = (steps(way(tx), "triton", span=[0]) for way in (lambda tx: tx, optim.in_host_memory))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(here), tree.leaves(there), strict=True))
