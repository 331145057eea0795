"""Does the planner predict what others measured? Two rows of Megatron-LM's H100 table calibrate its two efficiencies; every
other row, and TorchTitan's, is predicted.

    python experiments/plan_vs_published/plan_vs_published.py       writes rows.json, table.md, predicted.png beside itself

Each row is a run on its published mesh, rehearsed on meta tensors. What the tables do not say is assumed alike for all rows of
a table, see README.md. Nothing is fitted but the two efficiencies.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fmegatron.models import presets
from fmegatron.plan.estimate import Estimate, estimate
from fmegatron.plan.hardware import HARDWARE, Efficiency, Hardware, capped
from fmegatron.plan.options import request
from fmegatron.plan.seconds import Execution
from fmegatron.plan.study import Study, study
from fmegatron.train.explain import model_from

HERE = Path(__file__).parent
PEAK = HARDWARE["h100"].flops["bf16"]
# TorchTitan's tables were measured on H100s with 96 GB of HBM2e, 2.4 TB/s, at a limit of 500 W of their 700 W
H100_HBM2E = capped(replace(HARDWARE["h100"], memory=96e9, bandwidth=2.4e12), 500)


@dataclass(frozen=True)
class Published:
    """A row: tokens/s of a GPU as measured, and the run. remat: none, full, or "op" (see `predict`)."""

    table: str
    name: str
    measured: float
    preset: str
    settings: dict[str, Any]
    execution: Execution
    device: Hardware
    remat: str = "none"


def megatron() -> list[Published]:
    """Megatron-LM's README, H100: TFLOP/s a GPU by its formula of the time, attention whole; sequences of 4096."""
    # size, tp, pp, dp, batch, TFLOP/s a GPU, virtual stages: of two layers, of one where they are odd
    table = [("1.7b", 1, 1, 48, 192, 408.8, 1), ("7.1b", 2, 1, 48, 192, 465.9, 1), ("16b", 4, 1, 48, 192, 489.1, 1),
             ("32b", 8, 1, 48, 192, 459.6, 1), ("70b", 8, 2, 48, 384, 419.7, 21), ("119b", 8, 4, 48, 768, 420.5, 23),
             ("177b", 8, 6, 48, 1152, 432.8, 8), ("314b", 8, 8, 48, 1536, 474.4, 6), ("462b", 8, 16, 48, 3072, 459.9, 7)]
    how = Execution(fused_ends=False, overlap=True, narrow=True, async_tp=True, balanced=True)
    rows = []
    for size, tp, pp, dp, batch, tflops, virtual in table:
        pipeline = {"schedule": "interleaved_1f1b" if pp > 1 else "1f1b", "virtual": virtual}
        settings = {"mesh": {"tp": tp, "pp": pp, "dp": dp}, "sharding": {"rules": "zero1_tp_sp"}, "pipeline": pipeline,
                    "training": {"global_batch": batch, "microbatches": batch // dp if pp > 1 else 1}}
        row = Published("Megatron-LM", f"{size} tp{tp} pp{pp} dp{dp}", 0.0, f"gpt-{size}", settings, how, HARDWARE["h100"])
        rows.append(replace(row, measured=tflops * 1e12 / flops_a_token(row)))
    return rows


def torchtitan() -> list[Published]:
    """TorchTitan's llama3_h100 tables of December 2024, and its async TP figures of June 2025: tokens/s a GPU."""
    rows = []

    def add(table: str, name: str, measured: float, preset: str, mesh: dict[str, int], local: int, seq: int, *,
            fused: bool = True, fp8: bool = False, async_tp: bool = False, remat: str = "full",
            parts: int = 1, virtual: int = 1) -> None:
        batch = local * mesh["dp"]
        schedule = "interleaved_1f1b" if virtual > 1 else "1f1b"
        rules = "zero1_tp_sp" if "pp" in mesh else "fsdp_tp_sp" if "tp" in mesh else "fsdp"  # a pipeline gathers once a step
        settings = {"mesh": mesh, "sharding": {"rules": rules}, "data": {"seq": seq},
                    "pipeline": {"schedule": schedule, "virtual": virtual},
                    "training": {"global_batch": batch, "microbatches": parts}}
        how = Execution(fused=fused, fused_ends=False, overlap=True, narrow=True, async_tp=async_tp, balanced=True, fp8=fp8)
        rows.append(Published(f"TorchTitan {table}", name, measured, preset, settings, how, H100_HBM2E, remat))

    for table, ranks, numbers in (("1", 8, (5762, 6667, 8532)), ("3", 128, (5605, 6514, 8380))):
        for code, measured in zip(("eager", "compile", "fp8"), numbers, strict=True):
            add(table, f"8B {ranks} GPU {code}", measured, "llama3-8b", {"dp": ranks}, 2, 8192,
                fused=code != "eager", fp8=code == "fp8", remat="op")
    for cp, measured in ((1, 3890), (2, 2540), (4, 1071), (8, 548)):
        add("2", f"8B 8 GPU fp8 {32 * cp}K cp{cp}", measured, "llama3-8b", {"dp": 8 // cp, "cp": cp}, 1, 32768 * cp, fp8=True)
    for name, measured, fp8, hidden in (("fp8", 829, True, False), ("fp8 async", 876, True, True)):
        add("4", f"70B 256 GPU tp8 {name}", measured, "llama3-70b", {"dp": 32, "tp": 8}, 16, 8192, fp8=fp8, async_tp=hidden)
    june = (("bf16", 597.3, False, False), ("bf16 async", 652.4, False, True),
            ("fp8", 809.8, True, False), ("fp8 async", 942.4, True, True))
    for name, measured, fp8, hidden in june:
        add("async TP", f"70B 256 GPU tp8 {name}, June", measured, "llama3-70b", {"dp": 32, "tp": 8}, 16, 8192, fp8=fp8,
            async_tp=hidden)
    for name, measured, virtual in (("1f1b", 100, 1), ("interleaved", 128, 2)):
        add("5", f"405B 512 GPU tp8 pp8 {name}", measured, "llama3-405b", {"dp": 8, "tp": 8, "pp": 8}, 32, 8192, fp8=True,
            async_tp=True, parts=8, virtual=virtual)
    for cp, measured in ((1, 76), (2, 47), (4, 31), (8, 16)):
        add("6", f"405B 512 GPU {32 * cp}K tp8 pp8 cp{cp}", measured, "llama3-405b",
            {"dp": 8 // cp, "tp": 8, "pp": 8, "cp": cp}, 8, 32768 * cp, fp8=True, async_tp=True, parts=8)
    return rows


@cache
def _studied(preset: str, settings: str, remat: str) -> Study:
    table = json.loads(settings)
    run = request(preset, table | {"training": table["training"] | {"remat": remat}}).run
    return study(run, model_from(run))


def policies(row: Published) -> tuple[str, ...]:
    """What is studied of a row: "op" lies between two."""
    return ("none", "full") if row.remat == "op" else (row.remat,)


def studied(row: Published, remat: str) -> Study:
    """A row's rehearsal, once."""
    return _studied(row.preset, json.dumps(row.settings), remat)


def flops_a_token(row: Published) -> float:
    """Model FLOPs of a token, attention whole."""
    found = studied(row, policies(row)[0])
    return found.whole / (found.run.training.global_batch * found.run.data.seq)


def predict(row: Published, efficiency: Efficiency) -> float:
    """Tokens/s of a GPU. "op": every second product runs again, and all between them, but not attention."""
    plans = [estimate(row.name, studied(row, remat), row.device, efficiency, row.execution) for remat in policies(row)]
    none, full = plans[0], plans[-1]
    seconds = full.seconds | {"attention": none.seconds["attention"]}
    seconds["products"] = (none.seconds["products"] + full.seconds["products"]) / 2
    if full.mesh.get("cp", 1) > 1:
        more = torch_ring(row, full, efficiency)
        seconds["cp traffic"] += more
        seconds["pipeline waits"] += full.bubble * more
    return full.batch[0] * full.batch[1] / full.ranks / sum(seconds.values())


def torch_ring(row: Published, plan: Estimate, efficiency: Efficiency) -> float:
    """Seconds a step by which torch's context parallelism sends longer than the gather that was planned; of full remat.

    torch.distributed.tensor.experimental._attention: keys and values, which TorchTitan's model has repeated for every query
    head, are gathered by forward, its repetition and backward, each beside the first of n blocks; their gradients go around
    in fp32, each hop beside the next block, the last beside none.
    """
    named = presets.config(row.preset.replace("-", ":"))
    kv_heads = named.kv or named.heads
    n, tp, axes = plan.mesh["cp"], plan.mesh.get("tp", 1), list(plan.mesh)
    stride = math.prod(plan.mesh[axis] for axis in axes[axes.index("cp") + 1 :])
    link = row.device.link(stride, n)[1] * efficiency.links
    times = studied(row, row.remat).layers * plan.microbatches
    rows = plan.batch[0] // plan.mesh.get("dp", 1) // plan.microbatches
    kv = 2 * rows * plan.batch[1] // n * kv_heads // tp * named.head_dim * 2 / link  # seconds of a rank's own, in bf16
    block = plan.seconds["attention"] / times / 4.5 / n  # of a forward; a backward is 2.5 of them
    gather, hop = (n - 1) * kv * named.heads / kv_heads, 2 * kv * named.heads / kv_heads
    waits = 2 * max(0.0, gather - block) + max(0.0, gather - 2.5 * block)
    waits += (n - 1) * max(0.0, hop - 2.5 * block) + hop
    return (waits - 3 * (n - 1) * kv) * times  # less what the plan has: two gathers and the reduce_scatter of their gradients


def calibrate(first: Published, second: Published) -> Efficiency:
    """The efficiencies for which both rows are predicted exactly: times fall as either grows, so bisect one in the other."""

    def solve(row: Published, make: Any) -> float:
        low, high = 0.01, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if predict(row, make(middle)) < row.measured else (low, middle)
        return (low + high) / 2

    def flops_at(data: float) -> float:
        return solve(second, lambda flops: Efficiency(flops, data))

    data = solve(first, lambda data: Efficiency(flops_at(data), data))
    return Efficiency(round(flops_at(data), 4), round(data, 4))


def errors(rows: Sequence[dict[str, Any]], key: str) -> float:
    """The mean of |predicted / measured - 1|."""
    return statistics.mean(abs(row[key] / row["measured"] - 1) for row in rows)


def compare() -> dict[str, Any]:
    """Every row with what was measured, what is predicted, and what a constant MFU, that of the two rows, predicts."""
    ours, theirs = megatron(), torchtitan()
    used = (ours[0], ours[-1])
    efficiency = calibrate(*used)
    constant = statistics.mean(row.measured * flops_a_token(row) for row in used)
    rows = [
        {"table": row.table, "name": row.name, "measured": row.measured, "predicted": predict(row, efficiency),
         "constant": constant / flops_a_token(row), "flops_a_token": flops_a_token(row), "calibrates": row in used}
        for row in [*ours, *theirs]
    ]  # fmt: skip
    return {"efficiency": vars(efficiency), "constant_mfu": constant / PEAK, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    heads = ("table", "row", "measured", "predicted", "error", "constant MFU", "error", "MFU measured", "MFU predicted")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found["rows"]:
        cells = [row["table"], row["name"], f"{row['measured']:,.0f}", f"{row['predicted']:,.0f}"]
        off = [f"{row[key] / row['measured'] - 1:+.0%}" for key in ("predicted", "constant")]
        cells += ["calibrates" if row["calibrates"] else off[0], f"{row['constant']:,.0f}", off[1]]
        cells += [f"{row[key] * row['flops_a_token'] / PEAK:.1%}" for key in ("measured", "predicted")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(found: dict[str, Any], path: Path) -> None:
    """Predicted over measured tokens/s a GPU, by table."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True)
    for ax, key, title in zip(axes, ("predicted", "constant"), ("planner", "constant MFU"), strict=True):
        for name in dict.fromkeys(row["table"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["table"] == name]
            mfu = [[100 * row[of] * row["flops_a_token"] / PEAK for row in rows] for of in ("measured", key)]
            ax.plot(*mfu, "o", label=name, alpha=0.8)
        ax.plot([0, 70], [0, 70], "k-", lw=0.7)
        ax.set(title=title, xlabel="measured MFU, % of the bf16 peak", xlim=(0, 70), ylim=(0, 70))
    axes[0].set_ylabel("predicted MFU, % of the bf16 peak")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Write what was found."""
    found = compare()
    (HERE / "rows.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "table.md").write_text(table(found))
    picture(found, HERE / "predicted.png")
    print(table(found))
    print(found["efficiency"], f"constant MFU {found['constant_mfu']:.1%}")
    for name in ("Megatron-LM", "TorchTitan"):
        rows = [row for row in found["rows"] if row["table"].startswith(name) and not row["calibrates"]]
        print(f"{name}: mean error {errors(rows, 'predicted'):.1%}, of the constant {errors(rows, 'constant'):.1%}")


if __name__ == "__main__":
    main()
