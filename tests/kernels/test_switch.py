"""The switch: what it chooses, and a model's step with kernels against the same step with torch's operators, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron import optim
from fmegatron.compiled import Compiled
from fmegatron.kernels import norm
from fmegatron.kernels.launch import choose
from fmegatron.models.gpt import Config, gpt
from fmegatron.nn import experts
from fmegatron.nn.mlp import Mlp
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, virtual_mesh
from fmegatron.testing import assert_trees_all_close
from fmegatron.testing.invariance import NAMES, whole_leaves
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step

pytest.importorskip("triton")
CPU = torch.device("cpu")
SMALL = {"embed": 16, "heads": 4, "kv": 2, "mlp": 12, "vocab": 21, "vocab_pad": 8}
LLAMA = {"layers": 1, "rope_fraction": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2, "logit_softcap": 3.0, "qk_norm": "norm"}
GPT2 = {"layers": 1, "positions": "learned", "context": 8, "norm": "layer", "activation": "gelu_tanh", "mlp_bias": True}
EXPERTS = {"layers": 1, "moe": Moe(experts=4, top_k=2)}


def test_what_auto_means(monkeypatch):
    assert choose("auto", CPU) == choose("reference", CPU) == "reference"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cpu needs TRITON_INTERPRET=1"):
        choose("triton", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose("auto", torch.device("cuda")) == "reference"
    with pytest.raises(ValueError, match="pip install triton"):
        choose("triton", CPU)


def trained(config, sh, **settings):
    net, tx = gpt(Config(**{**SMALL, **config})), optim.sgd(0.3)
    plan, step = plan_step(net, sh, **settings), make_step(net, tx, sh, **settings)
    torch.manual_seed(0)
    batch = {name: torch.randint(0, 21, (2, 4)) for name in ("tokens", "labels")} | {"weights": torch.rand(2, 4).double()}
    state = init(net, tx, sh, key=0, dtype=torch.float64)
    state, metrics = step(state, {name: shard(plan.sh, x, NAMES[name]) for name, x in batch.items()})
    return whole_leaves(plan, state.params, "storage"), float(metrics["loss"].flatten()[0])


@pytest.mark.parametrize("config", [LLAMA, GPT2, EXPERTS], ids=["llama", "gpt2", "experts"])
def test_a_step_of_a_model(config):
    """One device, and ranks whose vocabulary is cut into pieces, the last of pads alone."""
    want = trained(config, SINGLE)
    meshes = [SINGLE] + [Sharding(virtual_mesh(tp=2), RULES["fsdp_tp_sp"])] * (config is not GPT2)
    for sh in meshes:
        assert_trees_all_close(trained(config, sh, kernels="triton"), want, 1e-12)


def test_remat_runs_kernels_again():
    assert_trees_all_close(trained(LLAMA, SINGLE, kernels="triton", remat="selective"), trained(LLAMA, SINGLE), 1e-12)


def test_in_a_compiled_block():
    """Inductor calls the kernels as operators, between what it fuses itself."""

    def block(wrt, rest):
        return {"y": norm.norm(wrt["x"].sin(), wrt["w"], form="triton").cos().sum()}

    torch.manual_seed(0)
    values = {"x": torch.randn(5, 8), "w": torch.randn(8)}
    out, _, pull = Compiled().vjp(block, values, {}, kind="block")
    want, back = torch.func.vjp(lambda v: block(v, {})["y"], values)
    assert torch.allclose(out["y"], want, rtol=1e-6)
    assert_trees_all_close(pull({"y": torch.ones(())}), back(torch.ones(()))[0], 1e-5)


class Operators(TorchDispatchMode):
    """The names of what ran."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0, 0, 11]])
def test_products_of_experts_follow_the_switch(counts):
    kind, n = Mlp("swiglu"), torch.tensor(counts)
    torch.manual_seed(0)
    shapes = {"gate": (4, 6, 5), "up": (4, 6, 5), "down": (4, 5, 6), "rows": (11, 6), "scale": (11,)}
    values = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    expert = torch.repeat_interleave(torch.arange(4), n)

    def pulled(form):
        with Operators() as ran:
            out = experts.grouped(kind, values, values["rows"], n, expert, values["scale"], form=form)
            grads = torch.autograd.grad(out.sin().sum(), list(values.values()))
        return [out.detach(), *grads], {name for name in ran.seen if "grouped" in name}

    (got, ours), (want, _) = pulled("triton"), pulled("reference")
    assert ours == {"fmegatron::grouped_matmul", "fmegatron::grouped_matmul_dw"}
    assert_trees_all_close(got, want, 1e-4)
