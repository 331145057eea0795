"""The shipped configurations of models with experts, scaled down by overrides alone, trained on real text with ep and tp."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from trained import records

from fmegatron import cli, data

DOCS = Path(__file__).parents[2] / "docs"
SIZES = {"layers": 3, "embed": 32, "heads": 4, "mlp": 48, "vocab": 264, "context": 64}
EXPERTS = {"experts": 8, "top_k": 2, "mlp": 16}
LATENT = {"hd": 16, "rope_hd": 8, "v_hd": 8, "kv_lora": 16}
FAMILIES = {  # overrides of the model, and of its experts
    "mixtral_8x7b": ({"kv": 2}, {}),
    "mixtral_8x22b": ({"kv": 2}, {}),
    "qwen3_30b_a3b": ({"kv": 2, "hd": 8}, {}),
    "qwen3_235b_a22b": ({"kv": 2, "hd": 8}, {}),
    "deepseek_v2_lite": (LATENT, {"shared": 16}),
    "deepseek_v3": (LATENT | {"q_lora": 16}, {"shared": 16, "first_dense": 1, "groups": 4, "group_top_k": 2, "group_best": 1}),
    "gpt_oss_20b": ({"kv": 2, "hd": 8, "window": 8}, {}),
    "gpt_oss_120b": ({"kv": 2, "hd": 8, "window": 8}, {}),
}
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """The pages of docs/ as tokens."""
    folder = tmp_path_factory.mktemp("pages")
    data.tokenize(sorted(DOCS.glob("*.md")), folder / "train", "byte", append_eod=True)
    return folder / "train"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_own_configuration_trains(name, pages, tmp_path):
    """Its rules, dtype, remat, schedule and losses are those of the file; ranks are a vmap."""
    sizes, moe = FAMILIES[name]
    options = {f"model.overrides.{key}": value for key, value in (SIZES | sizes).items()}
    options |= {f"model.overrides.moe.{key}": value for key, value in (EXPERTS | moe).items()}
    options |= {"data.source": pages, "data.valid": pages, "data.tokenizer": "byte", "data.seq": 32}
    options |= {"training.steps": 12, "training.global_batch": 16, "training.microbatches": 2, "training.compile": "false"}
    options |= {"optimizer.lr": 0.01, "optimizer.min_lr": 0.001, "optimizer.warmup": 2, "log.prompt": "''"}
    options |= {"mesh.virtual": "true", "mesh.dp": 1, "mesh.ep": 4, "mesh.tp": 2, "checkpoint.interval": 6}
    options |= {"validation.interval": 12, "validation.batches": 1, "run.dir": tmp_path / "run"}
    assert cli.main(shlex.split(" ".join(["train", name, *(f"--{key}={value}" for key, value in options.items())]))) == 0
    loss = records(tmp_path / "run", "loss")
    assert len(loss) == 12 and loss[-1] < loss[0] - 0.5
    assert all(x >= 0 for x in records(tmp_path / "run", "experts/02.max_violation"))
    assert (tmp_path / "run" / "checkpoints" / "step-00000012").is_dir() and (tmp_path / "run" / "experts.png").is_file()
