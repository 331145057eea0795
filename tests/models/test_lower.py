"""Models in few bits: equal under every mesh, gradients those of the three quantized products, and close to the whole ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fmegatron import optim, tree
from fmegatron.kernels.quantize import E4M3, factors, multiply, quantize, recipe, scaled
from fmegatron.models.config import Config
from fmegatron.models.gpt import gpt
from fmegatron.models.lower import lower, weights_of
from fmegatron.nn.lowbits import Lowered
from fmegatron.nn.lowexperts import placed
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, unshard, virtual_mesh
from fmegatron.testing import assert_mesh_invariant
from fmegatron.train.state import init
from fmegatron.train.step import make_step

torch.set_num_threads(1)
CONFIG = Config(layers=3, embed=32, heads=4, kv=2, mlp=32, vocab=48)
RECIPES = {
    "tensorwise": recipe("tensorwise"),
    "rowwise": recipe("rowwise"),
    "blockwise": recipe("blockwise", block=4),
    "mxfp8": recipe("mxfp8", block=4),
    "nvfp4": recipe("nvfp4", block=4),
    "wide wgrad": recipe("tensorwise", wgrad=False),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_three_products(name):
    torch.manual_seed(0)
    how, x, w, dy = RECIPES[name], torch.randn(2, 8, 32), torch.randn(32, 3, 8), torch.randn(2, 8, 3, 8)
    sh = SINGLE.bind({"embed": 32, "heads": 3, "hd": 8})
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = sh.einsum("batch seq embed, embed heads hd -> batch seq heads hd", a, Lowered(b, how))
    dx, dw = torch.autograd.grad(y, (a, b), dy)
    x2, w2, dy2 = x.flatten(0, 1), w.flatten(1).T, dy.flatten(0, 1).flatten(1)

    def product(p, q, formats, weight):
        left, right = quantize(p, formats[0], how.operand), quantize(q, formats[1], how.weight if weight else how.operand)
        return multiply(left, right)

    wide = dy2.T @ x2
    assert torch.equal(y.flatten(0, 1).flatten(1), product(x2, w2, (how.format, how.format), True))
    assert torch.equal(dx.flatten(0, 1), product(dy2, w2.T, (how.gradient, how.format), True))
    expected = product(dy2.T, x2.T, (how.gradient, how.format), False) if how.wgrad else wide
    assert torch.equal(dw.flatten(1).T, expected)
    error = (dw.flatten(1).T - wide).norm() / wide.norm()
    assert error < (0.3 if name == "nvfp4" else 0.1) and (error > 0) == how.wgrad


@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_by_torchs_operator_the_products_are_the_same(name):
    torch.manual_seed(0)
    x, w, found = torch.randn(2, 8, 32, requires_grad=True), torch.randn(32, 16, requires_grad=True), []
    for form in ("reference", "triton"):
        sh = replace(SINGLE.bind({"embed": 32, "mlp": 16}), kernels=form)
        y = sh.einsum("batch seq embed, embed mlp -> batch seq mlp", x, Lowered(w, RECIPES[name]))
        found.append((y, *torch.autograd.grad(y, (x, w), y.detach())))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5 * ours.abs().max().item())


@pytest.mark.parametrize("name", list(RECIPES))
def test_kept_for_the_backward_are_eight_bits_and_scales(name):
    torch.manual_seed(0)
    how, x = RECIPES[name], torch.randn(2, 8, 32).bfloat16().requires_grad_()
    weights = [Lowered(torch.randn(32, n).bfloat16().requires_grad_(), how) for n in (16, 24)]
    own, kept = {w.tensor.untyped_storage().data_ptr() for w in weights}, {}
    sh = SINGLE.bind({"embed": 32, "mlp": 16, "wide": 24})

    def keep(y):
        if (storage := y.untyped_storage()).data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        sh.einsum("batch seq embed, (embed mlp | embed wide) -> (batch seq mlp | batch seq wide)", x, *weights)
    scales = {"tensorwise": 1, "rowwise": 32, "wide wgrad": 0}.get(name, x.numel() // 4)  # along the tokens
    width = 2 if name == "wide wgrad" else 1
    assert sum(storage.nbytes() for storage in kept.values()) == width * x.numel() + 4 * scales


@pytest.mark.parametrize(("name", "mesh", "rules"), [
    ("tensorwise", {"dp": 2, "tp": 4}, "fsdp_tp_sp"),  # kv heads fewer than ranks: their products are replicated
    ("rowwise", {"dp": 2, "cp": 2, "tp": 2}, "fsdp_tp_sp"),
    ("blockwise", {"cp": 2, "tp": 2}, "cp_ring"),
    ("nvfp4", {"dp": 2, "tp": 2}, "tp"),
    ("wide wgrad", {"tp": 4}, "tp_sp"),
])  # fmt: skip
def test_every_mesh_has_the_same_scales_and_results(name, mesh, rules):
    model = lower(gpt(CONFIG), {"layers.*": RECIPES[name], "head.*": RECIPES[name]})
    tokens = torch.arange(4 * 17).reshape(4, 17) % 47
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    assert_mesh_invariant(model, batch, [Sharding(virtual_mesh(**mesh), RULES[rules])])


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("mesh", [{}, {"dp": 2, "tp": 4}])
def test_delayed_scales_are_those_of_the_steps_before(mesh, algorithm):
    steps, how = 3, recipe("delayed", history=2, algorithm=algorithm, wgrad=False)
    model = lower(gpt(CONFIG), {"layers.*.mlp.*": how, "layers.*": None}, last=1)
    sh = Sharding(virtual_mesh(**mesh), RULES["fsdp_tp_sp"]) if mesh else SINGLE
    tx = optim.sgd(0.1)
    step = make_step(model, tx, sh, microbatches=2)
    state = init(model, tx, sh, 0, dtype=torch.float64)
    tokens = torch.arange(8 * 17).reshape(8, 17) % 47
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    batch = {name: shard(sh, x, "batch seq") for name, x in batch.items()} if mesh else batch
    tops = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        tops.append([metrics[f"tap.max.fp8/02/mlp.up.{which}"].flatten()[0].item() for which in "xwg"])
    leaf = tree.to_paths(state.params)["layers.0.mlp.up_amax"]
    leaf = unshard(sh.bind(model.sizes), leaf, "layers amax_of amax_steps_2", kind="storage") if mesh else leaf
    assert torch.equal(leaf[1], torch.tensor(tops[-2:], dtype=torch.float64).T) and not leaf[2].any() and leaf[1].all()
    clip = tree.to_paths(state.opt_state)
    assert not any(x.any() for path, x in clip.items() if "_amax" in path)
    weight = Lowered(torch.ones(1), how, leaf[1])._tops()
    assert torch.equal(weight, leaf[1].amax(-1) if algorithm == "max" else leaf[1][:, -1])


def test_the_gradient_s_largest_value_is_the_cotangent_of_the_history_and_the_next_steps_scale():
    torch.manual_seed(0)
    x, w, dy, how = torch.randn(8, 32), torch.randn(32, 16), torch.randn(1, 8, 16), recipe("delayed", history=2)
    history = torch.tensor([[0.0, 3.0], [0.0, 3.0], [0.0, 5.0]], requires_grad=True)
    sh, a = SINGLE.bind({"embed": 32, "mlp": 16}), x[None].clone().requires_grad_()
    y = sh.einsum("batch seq embed, embed mlp -> batch seq mlp", a, Lowered(w, how, history))
    dx, newest = torch.autograd.grad(y, (a, history), dy)
    expected = torch.zeros(3, 2)
    expected[2, 1] = dy.abs().max()
    assert torch.equal(newest, expected)
    factor, scale = factors(torch.tensor(5.0), how.gradient, how.operand)
    back = scaled(w, how.format, how.operand, *factors(torch.full((1, 1, 1, 1), 3.0), how.format, how.operand))
    assert torch.equal(dx[0], (how.gradient.round(dy[0] * factor).float() @ back.values.T) * scale * back.scales.flatten())


def test_delayed_is_tensorwise_with_another_step_s_scale():
    torch.manual_seed(0)
    x, w, how = torch.randn(2, 8, 32), torch.randn(32, 16), recipe("delayed")
    sh = SINGLE.bind({"embed": 32, "mlp": 16})
    top = torch.stack([x.abs().max(), w.abs().max(), x.abs().max()])[:, None]
    def product(weight):
        return sh.einsum("batch seq embed, embed mlp -> batch seq mlp", x, weight)

    assert torch.equal(product(Lowered(w, how, top)), product(Lowered(w, recipe("tensorwise"))))
    assert not torch.equal(product(Lowered(w, how, 1.7 * top)), product(Lowered(w, how, top)))
    never = product(Lowered(w, how, 0 * top))  # before the first step
    assert torch.equal(never, E4M3.round(x).float() @ E4M3.round(w).float())


EXPERTS = Config(layers=1, embed=16, heads=4, kv=2, mlp=16, vocab=48, moe=Moe(experts=4, top_k=2, mlp=8, shared=8))


@pytest.mark.parametrize(("name", "mesh", "rules"), [
    ("tensorwise", {"dp": 2, "ep": 2}, "fsdp"),
    ("rowwise", {"ep": 2, "tp": 2}, "tp"),
    ("rowwise", {"cp": 2, "ep": 2}, "fsdp_tp_sp"),
])  # fmt: skip
def test_experts_of_eight_bits_on_every_mesh(name, mesh, rules):
    model = lower(gpt(EXPERTS), {"layers.*.experts.*": RECIPES[name]})
    tokens = torch.arange(4 * 17).reshape(4, 17) % 47
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    assert_mesh_invariant(model, batch, [Sharding(virtual_mesh(**mesh), RULES[rules])])


@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_experts_products_are_those_of_each_expert_s_rows(name):
    torch.manual_seed(0)
    how, counts = RECIPES[name], torch.tensor([3, 0, 5])
    x, w, dy = torch.randn(8, 16), torch.randn(3, 16, 12), torch.randn(8, 12)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = placed(SINGLE, {"up": Lowered(b, how)})["up"].product(a, counts)
    dx, dw = torch.autograd.grad(y, (a, b), dy)

    def whole(x, format):  # tensorwise: rows have one scale, whoever's they are
        return {} if name == "rowwise" else {"of": factors(x.abs().max().reshape(1, 1, 1, 1), format, how.operand)}

    def product(left, right, formats, of_left, of_right):
        found = [scaled(z, f, how.operand, *o["of"]) if o else quantize(z, f, how.operand)
                 for z, f, o in zip((left, right), formats, (of_left, of_right), strict=True)]  # fmt: skip
        return multiply(*found)

    all_x, all_dy = whole(x, how.format), whole(dy, how.gradient)
    for e, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 8))):
        if rows.start == rows.stop:
            assert not dw[e].any()
            continue
        torch.testing.assert_close(y[rows], product(x[rows], w[e].T, (how.format,) * 2, all_x, {}), rtol=1e-6, atol=1e-6)
        back = (how.gradient, how.format)
        torch.testing.assert_close(dx[rows], product(dy[rows], w[e], back, all_dy, {}), rtol=1e-6, atol=1e-6)
        expected = product(x[rows].T, dy[rows].T, back[::-1], all_x, all_dy)
        torch.testing.assert_close(dw[e], expected, rtol=1e-6, atol=1e-6)


def test_only_what_is_named_changes_and_layers_at_the_ends_stay():
    model = gpt(CONFIG)
    low = lower(model, {"layers.*.mlp.up": RECIPES["rowwise"], "layers.*.mlp.*": RECIPES["tensorwise"]}, first=1, last=1)
    changed = [old.fn is not new.fn for old, new in zip(model.chain, low.chain, strict=True)]
    assert [i for i, yes in enumerate(changed) if yes] == [2]  # embed, layer 0, layer 1
    assert "layers.1.mlp.up" in [weight.path for weight in weights_of(model, model.chain[2])]
    every = lower(model, {"layers.*": RECIPES["rowwise"]})
    assert len({node.fn for node in every.chain if node.is_layer}) == 1  # compiled once


def test_mistakes():
    model = gpt(CONFIG)
    with pytest.raises(ValueError, match=r"'layers.\*.mpl.\*'.*one is layers.0.attn.*"):
        lower(model, {"layers.*.mpl.*": RECIPES["rowwise"]})
    with pytest.raises(ValueError, match="mxfp8 for layers.0.mlp.experts.*experts take tensorwise or rowwise"):
        lower(gpt(EXPERTS), {"layers.*": recipe("mxfp8")})
    low = lower(model, {"layers.*": recipe("mxfp8")})
    with pytest.raises(ValueError, match="seq of 24 on a rank does not divide"):
        low.loss(low.init(0), {"tokens": torch.zeros(2, 24, dtype=torch.long)})
