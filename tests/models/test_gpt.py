"""The decoder: every option on every mesh, compiled, under transforms, in parts; documents, dropout and runs of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from functorch.compile import aot_function, nop

from fmegatron import random, tree
from fmegatron.models import Config, gpt
from fmegatron.models.gpt import runs
from fmegatron.models.model import node_params, run_chain
from fmegatron.nn.rope import Llama3Scaling
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, spmd, virtual_mesh

BASE = Config(layers=2, embed=16, heads=4, kv=2, mlp=24, vocab=29, vocab_pad=8, context=32)
OPTIONS = {
    "llama": BASE,
    "gpt2": replace(BASE, kv=None, positions="learned", norm="layer", activation="gelu_tanh", attention_bias=True,
                    attention_out_bias=True, mlp_bias=True, tied=True, depth_scaling=True),
    "qwen3": replace(BASE, qk_norm="norm", hd=8, rope_fraction=0.5, activation="geglu", kv=1),
    "gemma2": replace(BASE, norm_centred=True, norm_at="peri", attention_softcap=2.0, logit_softcap=3.0, window=3, no_window=2,
                      embed_multiplier=4.0, tied=True),
    "sinks": replace(BASE, sink="learned", qk_norm="l2", no_rope=2, rope_interleaved=True, activation="relu2",
                     qk_layer_scaling=True, norm_at="post", z_loss=0.1),
    "others": replace(BASE, sink="one", norm_at="out", embed_norm=True, rope_scaling=Llama3Scaling(context=8), positions="rope",
                      label_smoothing=0.1, z_loss=0.01, logit_multiplier=0.5, rope_window_base=50.0, window=4,
                      no_window=(False, True)),
    "dropout": replace(BASE, embed_dropout=0.1, attention_dropout=0.2, hidden_dropout=0.3),
}  # fmt: skip
MESHES = {
    "tp4": ({"tp": 4}, "tp"),  # fewer kv heads than ranks
    "fsdp_tp_sp": ({"dp": 2, "tp": 2}, "fsdp_tp_sp"),
    "cp_tp_sp": ({"cp": 2, "tp": 2}, "tp_sp"),
}


def batch(seed=0, b=4, s=8):
    """Tokens of two documents a sample, with weights, positions that start anew, and sample ids."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 29, (b, s), generator=g)
    index = torch.arange(s).expand(b, s)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "weights": torch.rand(b, s, generator=g, dtype=torch.float64),
        "documents": (index >= 5).long(),
        "positions": torch.where(index >= 5, index - 5, index),
        "sample": torch.arange(b) + 100,
    }


def parameters(model):
    """Random values everywhere, biases and norms too."""
    start = model.init(0, torch.float64)
    return tree.map_with_path(
        lambda path, x: x + 0.2 * random.normal(random.fold_in(random.key(5), path), torch.arange(x.numel()).reshape(x.shape)),
        start,
    )


def names_of(name):
    return "batch" if name == "sample" else "batch seq"


def total(model, params, data, sh=SINGLE, key=None):
    terms, _ = model.loss(params, data, sh=sh, key=key)
    return sum(value for value, _ in terms.values())


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_gradients_are_one_devices_on_every_mesh(option, mesh):
    model, data = gpt(OPTIONS[option]), batch()
    params = tree.map(
        lambda p, x: x if "vocab" not in p.names else x * (torch.arange(x.shape[0]) < 29)[:, None],
        model.declare,
        parameters(model),
    )
    key = random.key(1) if model.dropout else None
    axes, rules = MESHES[mesh]
    sh = Sharding(virtual_mesh(**axes), RULES[rules]).bind(model.sizes)
    pieces = {name: shard(sh, x, names_of(name)) for name, x in data.items()}

    def on_mesh(params):
        stored = tree.map(lambda p, x: shard(sh, x, p.names, "storage"), model.declare, params)
        return spmd(sh, lambda sh, p, b: total(model, p, b, sh, key))(stored, pieces).sum()

    grads, value = torch.func.grad_and_value(on_mesh)(params)
    wanted, exact = torch.func.grad_and_value(lambda p: total(model, p, data, key=key))(params)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    for (path, grad), want in zip(tree.to_paths(grads).items(), tree.leaves(wanted), strict=True):
        assert (grad - want).abs().max() <= 1e-11 * want.abs().max() + 1e-14, path  # a key's bias has none


@pytest.mark.parametrize("option", ["gpt2", "gemma2", "sinks"])
def test_a_compiled_layer_equals_the_eager_one(option):
    model, data = gpt(OPTIONS[option]), batch()
    params, sh = parameters(model), SINGLE.bind(model.sizes)
    values = run_chain(model, model.chain[:1], params, model.inputs(sh, data), sh=sh)
    for node in (model.chain[1], model.chain[-1]):
        values = run_chain(model, model.chain[-2:-1], params, values, sh=sh) if node.chunks else values
        own = node_params(node, model.declare, params)
        reads = {name: values[name] for name in node.reads if name in values}

        def run(own, reads, node=node):
            return sum(x.sin().sum() for x in node.fn(sh, own, reads, None).values())

        compiled = aot_function(run, fw_compiler=nop, bw_compiler=nop)  # the tracer of transforms.Compiled
        first, second = (tree.map(lambda x: x.detach().clone().requires_grad_(), own) for _ in range(2))
        a, b = compiled(first, reads), run(second, reads)
        torch.testing.assert_close(a, b)
        for x, y in zip(torch.autograd.grad(a, tree.leaves(first)), torch.autograd.grad(b, tree.leaves(second)), strict=True):
            torch.testing.assert_close(x, y)


def test_per_example_gradients_by_vmap():
    model, data = gpt(BASE), batch()
    params = parameters(model)

    def one(params, example):
        return total(model, params, {name: x[None] for name, x in example.items()})

    each = torch.vmap(torch.func.grad(one), in_dims=(None, 0))(params, data)
    whole = torch.func.grad(lambda p: total(model, p, data))(params)
    for a, b in zip(tree.leaves(each), tree.leaves(whole), strict=True):
        torch.testing.assert_close(a.sum(0), b)


def test_documents_are_as_if_alone():
    model, data = gpt(replace(BASE, window=3)), batch()
    params = parameters(model)
    together = model.logits(params, data["tokens"], documents=data["documents"], positions=data["positions"])
    first, second = model.logits(params, data["tokens"][:, :5]), model.logits(params, data["tokens"][:, 5:])
    torch.testing.assert_close(together, torch.cat((first, second), 1))
    assert together.shape == (4, 8, 29)


def test_a_sequence_stored_in_another_order():
    model, data = gpt(BASE), batch()
    params = parameters(model)
    order = torch.tensor([0, 7, 1, 6, 2, 5, 3, 4])
    zigzag = {name: data[name][:, order] for name in ("tokens", "labels", "weights")}
    zigzag |= {"order": order.expand(4, 8), "positions": order.expand(4, 8)}
    plain = {name: data[name] for name in ("tokens", "labels", "weights")}
    torch.testing.assert_close(total(model, params, zigzag), total(model, params, plain))


def test_the_loss_in_parts_adds_up():
    model, data = gpt(replace(BASE, loss_chunks=4)), batch()
    params, sh = parameters(model), SINGLE.bind(model.sizes)
    values = run_chain(model, model.chain[:-1], params, model.inputs(sh, data), sh=sh)
    node = model.chain[-1]
    own = node_params(node, model.declare, params)
    parts = [
        node.fn(sh, own, {name: values[name].chunk(node.chunks, 1)[i] for name in node.reads}, None)["loss.ce"]
        for i in range(node.chunks)
    ]
    torch.testing.assert_close(sum(parts), total(model, params, data))


def test_dropout_does_not_know_microbatches():
    model, data = gpt(OPTIONS["dropout"]), batch()
    params, key = parameters(model), random.key(3)
    halves = [{name: x[part] for name, x in data.items()} for part in (slice(0, 2), slice(2, 4))]
    whole = total(model, params, data, key=key)
    torch.testing.assert_close(whole, sum(total(model, params, half, key=key) for half in halves))
    assert not torch.isclose(whole, total(model, params, data, key=random.key(4)))
    assert not torch.isclose(whole, total(model, params, data))


def test_what_a_batch_lacks():
    model, tokens = gpt(BASE), batch()["tokens"]
    params = parameters(model)
    terms, _ = model.loss(params, {"tokens": tokens})
    value, count = terms["ce"]
    assert count == 4 * 7
    logits = model.logits(params, tokens)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(value / count, torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
    assert model.counts({"tokens": tokens}) == {"ce": count}
    sh = Sharding(virtual_mesh(cp=2), RULES["tp_sp"])
    for given, message in (
        ({"tokens": tokens}, "no labels, and seq lies over mesh axes cp"),
        ({"labels": tokens}, "no tokens"),
        ({"tokens": tokens, "labels": tokens[:, 1:]}, r"labels of shape \(4, 7\) for tokens of"),
    ):
        with pytest.raises(ValueError, match=message):
            model.counts(given, sh)


def test_labels_below_zero_are_torchs_ignore_index_and_those_beyond_the_vocabulary_an_error():
    model, data = gpt(BASE), {name: batch()[name] for name in ("tokens", "labels")}
    params = parameters(model)
    data["labels"][:, ::3] = -100
    value, count = model.loss(params, data)[0]["ce"]
    expected = torch.nn.functional.cross_entropy(model.logits(params, data["tokens"]).flatten(0, 1), data["labels"].flatten())
    torch.testing.assert_close(value / count, expected)
    with pytest.raises((RuntimeError, IndexError), match="out of"):
        model.loss(params, {**data, "labels": data["tokens"] + 32})


def test_layers_of_one_structure_are_one_run_and_one_kind_is_one_function():
    alternating = replace(BASE, layers=6, window=4, no_window=3)
    assert runs(alternating) == [range(0, 6)]
    fns = [node.fn for node in gpt(alternating).chain[1:-2]]
    assert len(set(map(id, fns))) == 2 and fns[2] is fns[5] and fns[0] is fns[1]
    assert [node.layer for node in gpt(alternating).chain[1:-2]] == list(range(6))


def test_settings_that_cannot_be():
    for change, message in (
        ({"kv": 3}, r"kv can be one of \[1, 2, 4\]"),
        ({"heads": 5, "kv": 5}, "embed = 16 does not divide into heads = 5"),
        ({"no_rope": (True,)}, "no_rope has 1 flags for layers = 2"),
        ({"activation": "swigelu"}, "'swigelu' is unknown: use one of swiglu"),
    ):
        with pytest.raises(ValueError, match=message):
            gpt(replace(BASE, **change))


@pytest.mark.parametrize(("options", "needs"), [
    ({"positions": "learned", "rope_base": 5e5}, "positions = rope"), ({"positions": "none", "no_rope": 2}, "positions = rope"),
    ({"rope_window_base": 1e4 + 1}, "a window"), ({"no_window": 2}, "a window"), ({"norm_bias": False}, "norm = layer"),
    ({"v_hd": 4}, "kv_lora"), ({"rope_hd": 4}, "kv_lora"), ({"qk_clip_alpha": 0.7}, "qk_clip"), ({"mtp_weight": 0.3}, "mtp")])
def test_an_option_in_vain_is_one_line(options, needs):
    with pytest.raises(ValueError, match=f"does nothing without .*{needs}"):
        Config(layers=2, embed=8, heads=2, mlp=12, vocab=11, **options)
