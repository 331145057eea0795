"""Each way to attention against the definition; flex_attention runs on CPU forward only, varlen_attn not at all."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import DEVICE

from fmegatron.kernels import attention
from fmegatron.kernels.attention import Seen
from fmegatron.nn import attention as layer
from fmegatron.nn import context, core
from fmegatron.nn.attention import Attention
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, spmd, thread_mesh, unshard
from fmegatron.testing import assert_trees_all_close
from fmegatron.train.remat import parse_remat

B, S, H, KV, HD = 2, 21, 4, 2, 16
DOCUMENT = torch.tensor([[0] * 8 + [1] * 13, [5] * 1 + [3] * 19 + [4]], device=DEVICE)
PLACE = torch.stack((torch.arange(S), torch.arange(S).flip(0))).to(DEVICE)
PATTERNS = {"causal": Seen(), "everything": Seen(causal=False), "window": Seen(window=5), "both sides": Seen(False, 4),
            "documents": Seen(document=DOCUMENT), "documents, window": Seen(window=3, document=DOCUMENT),
            "any order": Seen(window=6, place=PLACE, document=DOCUMENT)}


def draw():
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, S, h, HD, dtype=torch.float64, device=DEVICE) for h in (H, KV, KV))
    return q, k, v, torch.randn(H, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_is_the_models_core(pattern):
    q, k, v, sink = draw()
    seen = PATTERNS[pattern]
    attn = Attention(scale=0.3, causal=seen.causal, softcap=2.0, sink="learned")
    want = core.attend(attn, q, k, v, seen.mask(S, q.device), sink)
    torch.testing.assert_close(attention.attend(q, k, v, seen, scale=0.3, softcap=2.0, sink=sink, by="dense"), want)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # it is what runs on CPU
@pytest.mark.parametrize("pattern, capped", [*((name, True) for name in PATTERNS), ("any order", False)])
def test_flex(pattern, capped):
    q, k, v, sink = (x.float() for x in draw())
    options = {"scale": 0.3, "softcap": 2.0 if capped else None, "sink": sink if capped else None}
    got, want = (attention.attend(q, k, v, PATTERNS[pattern], by=by, **options) for by in ("flex", "dense"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pattern", ["causal", "everything"])
def test_sdpa(pattern):
    q, k, v, _ = draw()
    got, want = (attention.attend(q, k, v, PATTERNS[pattern], scale=0.3, by=by) for by in ("sdpa", "dense"))
    torch.testing.assert_close(got, want)


def by_document(q, k, v, offsets, offsets_k, longest, longest_k, *, scale, window_size, enable_gqa=False):
    """What torch says of varlen_attn: each document alone, queries see `window_size` keys to either side, -1 is all."""
    assert torch.equal(offsets, offsets_k) and offsets.dtype == torch.int32
    assert longest == longest_k == int(offsets.diff().max())
    out = torch.empty_like(q)
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        ahead = torch.arange(b - a)[None] - torch.arange(b - a)[:, None]
        left, right = (n if n >= 0 else b - a for n in window_size)
        mask = (ahead <= right) & (ahead >= -left)
        parts = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        options = {"attn_mask": mask.to(q.device), "scale": scale, "enable_gqa": enable_gqa}
        y = torch.nn.functional.scaled_dot_product_attention(*parts, **options)
        out[a:b] = y[0].transpose(0, 1)
    return out


def of_equal_heads(q, k, v, *given, scale, window_size):
    """varlen_attn as it is in torch 2.11."""
    assert q.shape == k.shape == v.shape
    return by_document(q, k, v, *given, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [by_document, of_equal_heads])
@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "any order"])
def test_varlen_is_asked_the_right_question(pattern, kernel):
    q, k, v, _ = draw()
    got = attention.varlen(q, k, v, PATTERNS[pattern], 0.3, kernel)
    torch.testing.assert_close(got, attention.attend(q, k, v, PATTERNS[pattern], scale=0.3, by="dense"))


def test_the_choice():
    q = torch.zeros(1, 4, 2, 64)
    assert attention.choose(q, Seen(), None, None) == "sdpa"
    assert attention.choose(q, Seen(window=2), None, None) == attention.choose(q, Seen(), 3.0, None) == "dense"  # on CPU


def on_cuda(q, seen, softcap, sink, real=attention.choose):
    """What would be chosen on a GPU, in bf16."""
    return real(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=q.shape), seen, softcap, sink)


APART = torch.tensor([[0] * 5 + [1] * 6 + [0] * 10, [3] * 21], device=DEVICE)


def test_documents_that_come_back_are_not_for_varlen():
    """varlen_attn would take the two parts of one for two documents."""
    q, k, v, _ = draw()
    assert not attention.comes_back(DOCUMENT) and attention.comes_back(APART) and not attention.comes_back(DOCUMENT[:, :1])
    assert on_cuda(q, Seen(document=DOCUMENT), None, None) == on_cuda(q, Seen(window=3), None, None) == "varlen"
    assert on_cuda(q, Seen(document=APART), None, None) == on_cuda(q, Seen(window=3, document=APART), None, None) == "flex"
    wrong = attention.varlen(q, k, v, Seen(document=APART), 0.3, by_document)
    assert not torch.allclose(wrong, attention.attend(q, k, v, Seen(document=APART), scale=0.3, by="dense"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_choice_on_a_gpu(pattern):
    """Forward and backward of what is chosen, in bf16, against fp64."""
    results = {}
    for name, dtype in (("dense", torch.float64), (None, torch.bfloat16)):
        q, k, v, _ = (x.to(dtype).requires_grad_() for x in draw())
        y = attention.attend(q, k, v, PATTERNS[pattern], scale=0.3, by=name)
        torch.manual_seed(1)
        results[name] = [y, *torch.autograd.grad(y, (q, k, v), torch.randn(y.shape, device=DEVICE).to(dtype))]
    for a, b in zip(results[None], results["dense"], strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) < 3e-2


def block(kernels, attn, remat=False, document=DOCUMENT):
    """A layer's attention over packed documents, and its gradients."""
    torch.manual_seed(0)
    declared = {"q": (8, H, HD), "k": (8, KV, HD), "v": (8, KV, HD), "o": (H, HD, 8), "sink": (H,)}
    p = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in declared.items()}
    x = torch.randn(B, S, 8, dtype=torch.float64)
    sh = replace(SINGLE, kernels=kernels).recomputing(parse_remat("selective").recompute if remat else lambda name: None)
    return layer.apply(sh, attn, p, x, {"documents.all": document.cpu()}, None), p


@pytest.mark.parametrize("window, remat", [(5, False), (None, True)])
def test_documents_go_without_a_mask(monkeypatch, window, remat):
    """varlen_attn's place is taken by what torch says of it; on a GPU the choice is the block's own."""
    attn, asked = Attention(scale=0.3, window=window), []

    def run(*given, **options):
        asked.append(options["window_size"])
        return by_document(*given, **options)

    def pulled(kernels):
        y, p = block(kernels, attn, remat)
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), [p[name] for name in "qkvo"])]

    want = pulled("reference")
    monkeypatch.setattr(attention, "choose", lambda *given: "varlen")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", run)
    assert_trees_all_close(pulled("triton"), want, 1e-12)
    assert asked == [(-1 if window is None else 4, 0)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_sinks_and_soft_caps_ask_flex(monkeypatch):
    attn = Attention(scale=0.3, window=5, softcap=3.0, sink="learned")
    with torch.no_grad():
        want = block("reference", attn)[0]
        monkeypatch.setattr(attention, "choose", lambda *given: "flex")
        assert_trees_all_close(block("triton", attn)[0], want, 1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 5])
def test_a_layer_over_documents_that_come_back(monkeypatch, window):
    with torch.no_grad():
        attn = Attention(scale=0.3, window=window)
        want = block("reference", attn, document=APART)[0]
        monkeypatch.setattr(attention, "choose", on_cuda)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_document)
        assert_trees_all_close(block("triton", attn, document=APART)[0], want, 1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form, zigzag", [("gather", True), ("ring", True), ("ulysses", False), ("ulysses", True)])
def test_documents_that_come_back_on_a_mesh_with_cp(monkeypatch, form, zigzag):
    """Every form sees what one device's mask shows; a kernel is asked only where a rank has whole queries in natural order."""
    length, names, asked = 16, ["batch seq heads hd"] * 3, []

    def forward(sh, q, k, v, document):
        q, (k, v) = sh.relayout(q, f"batch seq heads hd -> {context.QUERIES}"), context.meet(sh, k, v, "heads")
        y = context.attend(sh, Attention(scale=0.3), q, k, v, {"documents.all": context.table(sh, document)})
        return sh.relayout(y, f"{context.QUERIES} -> batch seq heads hd")

    def choose(*given):
        asked.append(on_cuda(*given))
        return asked[-1]

    values = [*(x[:, :length, :, :].cpu() for x in draw()[:1] * 3), torch.tensor([[0, 1] * 4 + [0] * 8, [2] * 10 + [3] * 6])]
    monkeypatch.setattr(attention, "choose", choose)
    rules = replace(RULES["fsdp_tp"], attention=form, zigzag=("cp",) if zigzag else ())
    with torch.no_grad():
        want = forward(SINGLE.bind({"heads": H, "kv": H, "hd": HD}), *values)
        sh = replace(Sharding(thread_mesh(cp=2), rules), kernels="triton").bind({"heads": H, "kv": H, "hd": HD})
        local = [shard(sh, x, name) for x, name in zip(values, [*names, "batch seq"], strict=True)]
        got = unshard(sh, spmd(sh, forward)(*local), names[0])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert set(asked) == ({"flex"} if (form, zigzag) == ("ulysses", False) else set())
