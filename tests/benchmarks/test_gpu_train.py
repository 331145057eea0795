"""The GPU training benchmark runs whole on a CPU: every row tiny, participants alike, time kept, failures said."""

import importlib
import math
import threading
from pathlib import Path

import pytest
import torch

from fmegatron.models import Config
from fmegatron.models.gpt import gpt
from fmegatron.nn import param
from fmegatron.nn.moe import Moe
from fmegatron.optim import sgd
from fmegatron.sharding import SINGLE
from fmegatron.train.state import init
from fmegatron.train.step import make_step

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def here():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = torch.get_float32_matmul_precision()
        yield
        torch.set_float32_matmul_precision(before)


def load(name):
    return importlib.import_module(name)


def test_a_row_is_raced_written_and_profiled(tmp_path):
    to = tmp_path / "rows.md"
    words = ["--smoke", "--only", "8B", "--who", "fmegatron,module,fmegatron fp8"]
    found = load("gpu_train").main([*words, "--profile", str(tmp_path / "p"), "--to", str(to)])
    ours, low, module = (found["8B stack"][name] for name in ("fmegatron", "fmegatron fp8", "module"))
    assert abs(ours.loss - module.loss) < 2e-2 and abs(low.loss - module.loss) < 1e-1
    assert [len(turn) for turn in ours.turns] == [2, 2]
    text = to.read_text()
    assert text.count("| 8B stack | ") == 3 and "No number here is a measurement" in text and "] module" in text
    table = (tmp_path / "p" / "8B-stack.kernels.md").read_text()
    assert "| aten::" in table and "roofline of cpu" in table and (tmp_path / "p" / "8B-stack.trace.json.gz").stat().st_size > 0


@pytest.mark.long
def test_all_rows_are_raced():
    pytest.importorskip("transformers")
    found = load("gpu_train").main(["--smoke", "--minutes", "20"])
    assert list(found) == [row.name for row in load("gpu_rows").rows()]
    for row, participants in found.items():
        for who, f in participants.items():
            gpu = {"fmegatron triton": "TRITON_INTERPRET", "fmegatron graphs": "graphs are CUDA's"}.get(who)
            assert f.turns or (gpu and gpu in f.said), (row, who, f.said)
        losses = [f.loss for f in participants.values() if f.turns]
        assert max(losses) - min(losses) < 1e-1, row


def test_rows_that_do_not_fit_into_the_time_are_named(capsys):
    assert load("gpu_train").main(["--smoke", "--minutes", "0.5"]) == {}
    assert "Left out, no time: 1.7B, 8B stack, MoE 1B" in capsys.readouterr().out


def test_the_command_ends_itself_when_its_minutes_are_over(monkeypatch):
    gpu_train, ended, told = load("gpu_train"), threading.Event(), []
    monkeypatch.setattr(gpu_train.os, "_exit", lambda code: ended.set())
    gpu_train.deadline(0.01, told.append, [lambda: ["| what was found |"]])
    assert ended.wait(5) and told[0] == "| what was found |" and "Cut off" in told[1]


def test_a_row_that_cannot_be_planned_or_profiled_is_raced(monkeypatch, tmp_path, capsys):
    gpu_train = load("gpu_train")

    def broken(*given):
        raise RuntimeError("no such thing")

    for name in ("planned", "profiled"):
        monkeypatch.setattr(gpu_train, name, broken)
    words = ["--smoke", "--only", "1B", "--who", "module", "--profile", str(tmp_path), "--to", str(tmp_path / "rows.md")]
    assert gpu_train.main(words)["1B"]["module"].turns
    said = capsys.readouterr().out
    assert "not planned, 1B: RuntimeError" in said and "no profile of 1B: RuntimeError" in said
    assert (tmp_path / "rows.md").read_text() == said


def test_one_that_fails_is_said_and_the_others_go_on(monkeypatch):
    """Memory that is not there, at the start or in a later step; all are asleep when the next one wakes."""
    gpu_train, gpu_rows = load("gpu_train"), load("gpu_rows")
    awake, steps = set(), {"late": 0}

    def make(name, row, device, compile):
        def wake():
            assert not awake, f"{awake} still awake"
            awake.add(name)

        def step():
            steps["late"] += name == "late"
            if name == "never" or (name == "late" and steps["late"] > 3):
                raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
            return torch.tensor(1.0)

        if name == "unmade":
            raise ValueError("its Llama | has a gate")
        return gpu_rows.Participant(wake, step, awake.clear)

    monkeypatch.setattr(gpu_rows, "make", make)
    row = gpu_rows.Row("x", Config(1, 8, 1, 8, 8), 1, 8, ("good", "never", "late", "unmade"), 0)
    how = gpu_train.Turns("cpu", False, 3, 0, 2, lambda: 1e9)
    found = {name: gpu_train.Found() for name in row.who}
    gpu_train.race(row, how, found)
    assert [len(found[name].turns) for name in row.who] == [3, 0, 1, 0] and not awake
    assert found["never"].said == found["late"].said == "out of memory"
    assert found["unmade"].said == "ValueError: its Llama / has a gate"
    assert all(line.count("|") == len(gpu_train.HEAD) + 1 for line in gpu_train.lines(row, found, 0, "NVIDIA H100"))


def test_a_broken_device_ends_the_process_with_what_was_found(monkeypatch, tmp_path):
    """The second participant breaks it: the first one's turn is written, and the notes name who to leave out."""
    gpu_train, gpu_rows, fresh = load("gpu_train"), load("gpu_rows"), load("fresh")
    broken, to, notes = [], tmp_path / "rows.md", tmp_path / "notes"

    def make(name, *given):
        if name == "module":
            broken.append(name)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return gpu_rows.Participant(lambda: None, lambda: torch.tensor(1.0), lambda: None)

    def end():
        raise SystemExit(fresh.BROKEN)

    monkeypatch.setattr(gpu_rows, "make", make)
    monkeypatch.setattr(fresh, "broken", lambda device: bool(broken))
    monkeypatch.setattr(fresh, "end", end)
    monkeypatch.setattr(gpu_train, "planned", lambda row: 0)
    words = ["--smoke", "--only", "1B", "--to", str(to), "--notes", str(notes)]
    notes.write_text("")
    with pytest.raises(SystemExit):
        gpu_train.main(words)
    text = to.read_text()
    assert "| 1B | module | RuntimeError: CUDA error" in text and text.count("| 1B | fmegatron | ") == 1
    fresh.Notes(notes).add("died")
    assert fresh.Notes(notes).fatal == {("1B", "module")} and not fresh.Notes(notes).done
    broken.clear()
    assert list(gpu_train.main([*words, "--who", "module,fmegatron"])["1B"]) == ["fmegatron"]
    assert fresh.Notes(notes).done == {"1B"} and gpu_train.main(words) == {}


def test_ratios_pair_steps_of_the_same_turn():
    found = load("gpu_train").Found
    ours, theirs = found([[1.0, 1.0], [10.0]]), found([[2.0], [20.0, 20.0]])  # the device slows down tenfold between turns
    assert ours.against(theirs) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("c", [
    Config(2, 32, 4, 64, 96, kv=2),
    Config(2, 32, 4, 64, 96, activation="gelu", tied=True),
    Config(2, 32, 4, 64, 96, kv=2, moe=Moe(4, 2, mlp=16)),
], ids=["gated", "plain", "experts"])  # fmt: skip
def test_the_module_computes_the_same(c):
    llama, model = load("llama"), gpt(c)
    params = param.init(model.declare, model.sizes, 0)
    module = llama.Llama(c, pieces=2)
    llama.fill(dict(module.named_parameters()), llama.matrices(params))
    text = torch.randint(c.vocab, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:]}
    _, metrics = make_step(model, sgd(1.0), SINGLE)(init(model, sgd(1.0), SINGLE, params=params), batch)
    loss = module(batch["tokens"], batch["labels"])
    loss.backward()
    grads = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
    torch.testing.assert_close(metrics["loss"], loss.detach())
    torch.testing.assert_close(metrics["grad_norm"], grads)


@pytest.mark.parametrize("number, who", [(1, "fmegatron fp8"), (2, "fmegatron")])
def test_our_step_stays_on_its_device_and_never_waits_for_it(number, who):
    """Meta stands for the GPU: a tensor of the host among its operands, or a value read, is an error there."""
    row = load("gpu_rows").rows()[number].tiny
    participant = load("gpu_rows").make(who, row, "meta", False)
    participant.wake()
    participant.step()
    assert participant.step().is_meta


def op(number, name, dims, dur=1.0, kind="c10::BFloat16"):
    args = {"External id": number, "Input Dims": dims, "Input type": [kind] * len(dims)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "tid": 1, "ts": 10.0 * number, "dur": dur, "args": args}


def kernel(number, name, dur):
    return {"ph": "X", "cat": "kernel", "name": name, "tid": 7, "ts": 0.0, "dur": dur, "args": {"External id": number}}


def test_kernels_are_held_against_their_roofline():
    """Numbers by hand: a product bound by FLOPs, a fused kernel by bytes, an attention of two kernels counted once."""
    gpu_profile = load("gpu_profile")
    sheet = gpu_profile.hardware_of("NVIDIA H100 80GB HBM3")
    n, b, s, h, hd = 4096, 2, 1024, 8, 128
    events = [
        op(1, "aten::mm", [[n, n], [n, n]]), kernel(1, "gemm", 278.0),
        op(2, "triton_poi_fused_mul_0", [[n, n], [n, n], []]), kernel(2, "triton_poi_fused_mul_0", 40.0),
        op(3, "aten::_flash_attention_backward", [[b, s, h, hd]] * 5),
        kernel(3, "flash_bwd", 50.0), kernel(3, "flash_dot", 5.0),
    ]  # fmt: skip
    gemm, flash, mul, dot = gpu_profile.kernels(events)
    assert (gemm.flops, gemm.bytes) == (2 * n**3, 3 * 2 * n * n)
    seconds, binds = gemm.roofline(sheet)
    assert binds == "FLOPs" and math.isclose(seconds, 2 * n**3 / 989.4e12)
    assert (mul.flops, mul.bytes, mul.roofline(sheet)) == (0, 4 * n * n, (4 * n * n / 3.35e12, "bytes"))
    assert flash.flops == 5 * 2 * b * h * s * s * hd / 2 and flash.bytes == 8 * 2 * b * s * h * hd
    assert (dot.flops, dot.bytes) == (0, 0) and math.isclose(dot.seconds, 5e-6)
    work, flops = gpu_profile.work, 2 * 64 * 16 * 8
    assert work(op(1, "aten::_grouped_mm", [[64, 16], [4, 16, 8], [4]]))[0] == flops
    assert work(op(1, "aten::addmm", [[8], [64, 16], [16, 8]])) == (flops, 2 * (64 * 16 + 16 * 8 + 64 * 8))
    assert work(op(1, "aten::copy_", [[64], [64]])) == (0, 2 * 2 * 64)
    assert gpu_profile.hardware_of("NVIDIA H200").memory == 141e9


def test_layers_are_added_until_the_memory_is_full(monkeypatch):
    gpu_train, gpu_rows = load("gpu_train"), load("gpu_rows")
    monkeypatch.setattr(gpu_train, "planned", lambda row: 10 + 3 * row.config.layers)
    row = gpu_train.grown(gpu_rows.rows()[1], 60)
    assert row.config.layers == 16 and row.name == "8B stack, 16 layers"  # 58 of 60
