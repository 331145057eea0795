"""Programs: what an earlier process compiled runs without the compiler, gives the same bits, and says what it depends on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fmegatron
from fmegatron import inductor, optim
from fmegatron.compiled import Compiled, Rows
from fmegatron.optim import LOCAL, fuse
from fmegatron.programs import Programs, Text, environment, foreign, load
from fmegatron.testing import assert_trees_all_close
from fmegatron.transforms import Kind, why_not_compile

pytestmark = pytest.mark.skipif(why_not_compile() is not None, reason=f"cannot compile: {why_not_compile()}")


def block(wrt, rest):
    h = torch.tanh((rest["x"] * 2 + 1) @ wrt["w"])
    return {"y": torch.softmax(h @ wrt["w"], -1), "most": h.argmax(-1), "unused": h.sum(0)}


def never(*_):
    raise AssertionError("Python of a block that was compiled before")


def at_once(work):
    """In place of a thread, so that what is kept is there when the test asks."""
    from concurrent.futures import Future

    done = Future()
    done.set_result(work())
    return done


@pytest.fixture
def programs(tmp_path, monkeypatch):
    monkeypatch.setattr(inductor, "in_background", at_once)
    return Programs(tmp_path / "programs", "a test")


def run(engine, fn, w, x, seed):
    out, moving, pull = engine.vjp(fn, {"w": w}, {"x": x}, Kind("block", (), "0"))
    return out, moving, pull({"y": seed})


def test_a_block_of_an_earlier_process_is_run_and_not_traced(programs):
    w, x = torch.randn(16, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    seed = torch.randn(16, 8, dtype=torch.float64).t()  # not as the backward was compiled for
    first = run(Compiled(programs), block, w, x, seed)
    again = run(Compiled(programs), never, w, x, seed)
    assert first[1] == again[1] == {"y", "unused"}
    assert_trees_all_close((again[0], again[2]), (first[0], first[2]), 0.0)
    with pytest.raises(AssertionError, match="Python of a block"):
        run(Compiled(replace(programs, what="another test")), never, w, x, seed)


def test_the_optimizer_of_an_earlier_process_is_run(programs):
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    params = {"a": torch.randn(64, 64), "b": torch.randn(3, 5)}
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    made = []
    for _ in range(2):
        step = fuse(tx, programs=programs)
        made.append(step(grads, tx.init(params), params, over=LOCAL))
    assert list(programs.folder.iterdir())
    assert_trees_all_close(made[1], made[0], 0.0)
    assert Rows(never, programs, "optimizer").programs is programs


@pytest.mark.parametrize("change", ["what", "name", "threads", "matmul", "environment", "source"])
def test_what_a_program_depends_on_is_in_its_name(programs, change, monkeypatch, tmp_path):
    before, name = programs.path("a block"), "a block"
    if change == "what":
        programs = replace(programs, what="another test")
    elif change == "name":
        name = "another block"
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    elif change == "matmul":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    elif change == "environment":
        monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    else:
        here = Path(fmegatron.__file__).parent
        shutil.copytree(here, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
        assert environment(tmp_path / "copy") == environment(here)
        with open(tmp_path / "copy" / "nn" / "norm.py", "a") as stream:
            stream.write("# a comment\n")
        assert environment(tmp_path / "copy") != environment(here)
        return
    assert programs.path(name) != before
    assert Programs(programs.folder, "a test").path("a block") == before or change in ("threads", "matmul", "environment")


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").write_text("no folder")
    programs = Programs(tmp_path / "file" / "programs", "a test")
    with pytest.warns(UserWarning, match="compiled graphs are not kept, the next start compiles them again: .*Not a directory"):
        programs.keep("one", [], None)
    assert programs.find("one") is None


def test_what_is_damaged_is_not_found_and_kept_again(programs):
    text = Text("def call(args):\n    return (args[0] + 1,)", None, ())
    programs.keep("one", [text], {"n": 1})
    found = programs.find("one")
    assert found is not None and found[1] == {"n": 1} and found[0][0]([torch.ones(2)])[0].tolist() == [2, 2]
    for file in ("facts.json", "0.py", "0.json"):
        (programs.path("one") / file).write_text("{")
        assert programs.find("one") is None
        programs.keep("one", [text], {"n": 1})
        assert programs.find("one") is not None
    assert [path.name for path in programs.folder.iterdir()] == [programs.path("one").name]  # nothing half-written lies about


def test_a_program_that_needs_the_compiler_is_not_kept():
    fine = "def call(args):\n    x, = args\n    y = empty_strided_cpu((2,), (1,), torch.float32)\n    "
    fine += "extern_kernels.mm(x, x, out=y)\n    k(y)\n    return (y,)"
    assert not foreign(fine, ["k"])
    assert foreign(fine, []) == {"k"}
    assert foreign(fine.replace("extern_kernels.mm", "extern_kernels.bias_addmm"), ["k"]) == {"extern_kernels.bias_addmm"}
    assert foreign(fine.replace("extern_kernels.mm", "torch.ops.prims.inductor_seeds.default"), ["k"]) >= {"torch.ops.prims"}
    assert foreign(fine.replace("k(y)", "async_compile.wait(y)"), ["k"]) == {"async_compile"}
    assert load(Text("def call(args):\n    return (aten.sin(args[0]),)", None, ()))([torch.zeros(1)])[0].item() == 0


START = """
import sys
from fmegatron.cli import main
try:
    main(sys.argv[1:])
except SystemExit as leaves:
    assert not leaves.code, leaves.code
print("compiler:", [name for name in ("torch._dynamo", "torch._inductor", "functorch.compile") if name in sys.modules])
"""


@pytest.mark.long
def test_a_second_start_of_a_run_imports_no_compiler(tmp_path):
    words = ["train", "debug", "--training.steps", "2", "--training.compile", "true", "--optimizer.name", "muon"]
    said, losses = [], []
    for folder in ("one", "two"):
        command = [sys.executable, "-c", START, *words, "--run.dir", str(tmp_path / folder)]
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=600)
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        said.append(run.stdout)
        losses.append([(row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row])
    assert "compiler: ['" in said[0] and "compiler: []" in said[1]
    assert losses[0] == losses[1] and len(losses[0]) == 2
