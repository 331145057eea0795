"""Training steps on one GPU, side by side with a plain nn.Module under torch.compile and with transformers, in one run.

    python benchmarks/gpu_train.py [--only 1.7B,125M] [--minutes 8] [--profile FOLDER] [--to benchmarks/RESULTS.md]

Participants take turns: one wakes up with the common parameters, makes warm steps, then timed ones (torch.cuda.Event), and
sleeps. Ratios are medians over steps of the same turn, with 95 % intervals by bootstrap. Each row is written as soon as it is
measured; rows come in order of worth, and what the minutes do not allow is named. --profile: docs/gpu.md. No network.

MFU is of the device's bf16 peak, by two formulas (fmegatron.train.flops), for fp8 too:
    whole    attention's masked half counts too, as in Megatron-LM's published tables (1.7B: 408.8 TFLOP/s, 41 % on an H100)
    half     it does not, as Megatron-LM counts today

--smoke runs every row, tiny and eager, on whatever there is: it shows that all of it runs, its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import fresh
import gpu_rows
import numpy as np
import psutil
import torch
from gpu_profile import profiled
from gpu_rows import Participant, Row
from report import machine, ratio

from fmegatron.models.gpt import gpt
from fmegatron.plan.config import PlanConfig
from fmegatron.plan.study import study
from fmegatron.train.flops import peak_flops, step_flops

Tell = Callable[[str], None]
AGREE = 2e-2  # |loss - median loss| at the first step; of fp8 five times that
HEAD = ("row", "who", "time / others' [95 %]", "step ms", "tokens/s", "TFLOP/s whole, half", "MFU whole, half", "peak GB",
        "planned GB", "first s")  # fmt: skip


@dataclass
class Found:
    """Of a participant: seconds of timed steps, by turn; of the first step, compiling included; peak bytes; what went wrong.

    turn: seconds of the last turn without the first step.
    """

    turns: list[list[float]] = field(default_factory=list)
    turn: float = 0.0
    first: float = 0.0
    loss: float = float("nan")
    peak: int = 0
    said: str = ""

    @property
    def seconds(self) -> list[float]:
        """Of all timed steps."""
        return [x for turn in self.turns for x in turn]

    def against(self, other: Found) -> tuple[float, float, float]:
        """The ratio of steps that were timed in the same turn, with its interval."""
        pairs = [p for a, b in zip(self.turns, other.turns, strict=False) for p in zip(a, b, strict=False)]
        return ratio(*zip(*pairs, strict=True))


@dataclass(frozen=True)
class Turns:
    """How long a row is measured. left: seconds until the command has to be over."""

    device: str
    compile: bool
    turns: int
    warm: int
    steps: int
    left: Callable[[], float]

    def sync(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, step: Callable[[], object], steps: int) -> list[float]:
        """Seconds of each of the steps, one after the other without a wait between them."""
        if self.device != "cuda":
            marks = [time.perf_counter()]
            for _ in range(steps):
                step()
                marks.append(time.perf_counter())
            return [b - a for a, b in zip(marks, marks[1:], strict=False)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]


def race(row: Row, how: Turns, found: dict[str, Found], begins: Callable[[str], None] = lambda who: None) -> Participant | None:
    """Fill in every participant's numbers; one that fails says why, and the others go on. Returns the first, where it runs.

    begins: is told who comes next. Raises RuntimeError where the device is broken: `found` holds what was measured until then.
    """
    made: dict[str, Participant] = {}
    for turn in range(how.turns):
        if turn and how.left() < 1.3 * sum(f.turn for f in found.values()) + 10:
            break
        for i in range(len(row.who)):
            name = row.who[(i + turn) % len(row.who)]
            if not turn and i > 1 and how.left() < 60:
                found[name].said = "left out, no time"
            if found[name].said:
                continue
            begins(name)
            try:
                if name not in made:
                    made[name] = gpu_rows.make(name, row, how.device, how.compile)
                take_turn(found[name], made[name], how)
            except Exception as error:  # of memory, or of a peer
                found[name].said = said(error)
                made.pop(name, None)
                if fresh.broken(how.device):
                    raise RuntimeError(found[name].said) from error
            if how.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    return made.get(row.who[0]) if row.who else None


def look(row: Row, first: Participant, how: Turns, folder: Path, tell: Tell) -> None:
    """A profile of the first participant; of one that fails the reason."""
    try:
        first.wake()
        profiled(first.step, how.device, folder, row.name.replace(" ", "-").replace(",", ""))
        first.sleep()
    except Exception as error:
        tell(f"\nno profile of {row.name}: {said(error)}\n")


def said(error: Exception) -> str:
    """What a table says of an error; one that nobody foresaw goes to stderr whole."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if not isinstance(error, ValueError | ImportError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:150]}".replace("|", "/")


def take_turn(found: Found, participant: Participant, how: Turns) -> None:
    """Wake up, warm up, be timed, sleep."""
    try:
        participant.wake()
        how.sync()
        begin = time.perf_counter()
        loss = float(participant.step())
        one = time.perf_counter()
        if not found.turns:
            found.first, found.loss = one - begin, loss
        for _ in range(how.warm):
            participant.step()
        how.sync()
        step = (time.perf_counter() - one) / max(how.warm, 1)
        if how.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found.turns.append(how.timed(participant.step, max(2, min(how.steps, int(4 / max(step, 1e-3))))))
        if how.device == "cuda":
            found.peak = max(found.peak, torch.cuda.max_memory_allocated())
        found.turn = time.perf_counter() - one
    finally:
        if not fresh.broken(how.device):
            participant.sleep()


# -- what is printed ------------------------------------------------------------------------------------------------
def planned(row: Row) -> int:
    """The planner's peak bytes of a row."""
    base, c = PlanConfig(), replace(row.config, loss_chunks=row.pieces)
    training = replace(base.training, global_batch=row.batch, dtype="bf16", compile=True)
    run = replace(base, training=training, data=replace(base.data, seq=row.seq, document_mask=False))
    return study(run, gpt(c)).memory["peak"]


def grown(row: Row, memory: float) -> Row:
    """The row with as many layers as fit into so many bytes, by the planner's straight line through two depths."""
    few, many = (planned(replace(row, config=replace(row.config, layers=n))) for n in (4, 8))
    layers = int(4 + (memory - few) / ((many - few) / 4))
    return replace(row, name=f"{row.name}, {layers} layers", config=replace(row.config, layers=max(layers, 1)))


def lines(row: Row, found: dict[str, Found], plan: int, name: str) -> list[str]:
    """The table's lines of a row: ours first, against each of the others."""
    losses = [f.loss for f in found.values() if f.seconds]
    middle, peak, out = float(np.median(losses)) if losses else 0.0, peak_flops(name), []
    whole, half = (step_flops(row.config, row.seq, row.batch, causal) for causal in (False, True))
    for who, f in found.items():
        cells = [row.name, who]
        if not f.seconds:
            out.append(f"| {' | '.join([*cells, f.said, *[''] * (len(HEAD) - 3)])} |")
            continue
        others = [x for x, y in found.items() if y.seconds and x != who] if who.startswith("fmegatron") else []
        ratios = ["{:.2f} [{:.2f}, {:.2f}] ".format(*f.against(found[other])) + other for other in others]
        low, mid, high = np.quantile(f.seconds, [0.25, 0.5, 0.75])
        rates = [flops / mid / 1e12 for flops in (whole, half)]
        used = [f"{100 * rate * 1e12 / peak:.1f} %" if peak else "-" for rate in rates]
        away = abs(f.loss - middle) > AGREE * (5 if "fp8" in who else 1)
        out.append("| " + " | ".join([
            *cells, "; ".join(ratios) + (f" LOSS {f.loss:.3f}, others {middle:.3f}" if away else ""),
            f"{mid * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})", f"{row.batch * row.seq / mid:,.0f}",
            ", ".join(f"{rate:.1f}" for rate in rates), ", ".join(used), f"{f.peak / 1e9:.1f}" if f.peak else "-",
            f"{plan / 1e9:.1f}" if who == "fmegatron" and plan else "", f"{f.first:.1f}",
        ]) + " |")  # fmt: skip
    return out


def deadline(seconds: float, tell: Tell, under_way: list[Callable[[], list[str]]]) -> threading.Timer:
    """A timer that ends the process, whatever it does, with what was found so far, also of the row under way."""

    def end() -> None:
        try:
            for line in under_way[-1]() if under_way else ():
                tell(line)
        finally:
            tell("\nCut off: the minutes are over; the last row is what was found until then.\n")
            os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def main(argv: Sequence[str] | None = None, began: float | None = None) -> dict[str, dict[str, Found]]:
    """Race the rows, writing each as it is measured; {row: {participant: what was found}}. began: in time.time(), None: now."""
    began = time.time() if began is None else began
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of rows, or their beginnings, by comma")
    parser.add_argument("--who", default="", help="names of participants, by comma")
    parser.add_argument("--minutes", type=float, default=8.0, help="in which the whole command ends")
    parser.add_argument("--profile", type=Path, help="folder for traces and kernels of two rows' first participants")
    parser.add_argument("--smoke", action="store_true", help="every row tiny and eager")
    parser.add_argument("--to", type=Path, help="file to which the section is added")
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=began, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    def left() -> float:
        return 60 * args.minutes - (time.time() - args.began)

    words = list(sys.argv[1:] if argv is None else argv)
    if not args.smoke and args.notes is None:
        raise SystemExit(fresh.watched(__file__, [*words, "--began", str(began)], left))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        raise SystemExit("no GPU: --smoke runs every row tiny on the CPU, its times mean nothing")

    def tell(line: str) -> None:
        print(line, flush=True)
        if args.to:
            with args.to.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    under_way: list[Callable[[], list[str]]] = []
    timer = deadline(left() - 5, tell, under_way)
    try:
        return measured(args, device, left, tell, under_way)
    finally:
        timer.cancel()


def measured(
    args: argparse.Namespace, device: str, left: Callable[[], float], tell: Tell, under_way: list[Callable[[], list[str]]]
) -> dict[str, dict[str, Found]]:
    """The rows, one after the other."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    notes, kept = fresh.Notes(args.notes), {k: v for k, v in vars(args).items() if k in ("only", "who", "minutes") and v}
    command = " ".join(["python benchmarks/gpu_train.py", *(f"--{k} {v}" for k, v in kept.items())])
    tell(f"\n## {datetime.datetime.now():%Y-%m-%d %H:%M}  `{command}`\n\n{name}; {machine()}\n")
    if args.smoke:
        tell("A smoke run: tiny models, nothing compiled. No number here is a measurement.\n")
    else:
        tell("Time below 1 is faster; MFU of the bf16 peak, with attention whole (as Megatron-LM's published 1.7B row, "
             "408.8 TFLOP/s and 41 %) and with its causal half.\n")
    tell("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    torch.set_float32_matmul_precision("high")  # what is left of fp32 products: routers, and fp8 where it is emulated
    how = Turns(device, not args.smoke, *((2, 0, 2) if args.smoke else (4, 2, 5)), left)
    chosen = [row for row in gpu_rows.rows() if row.name not in notes.done
              and (not args.only or any(row.name.startswith(x) for x in args.only.split(",")))]
    done, late = {}, []
    for row in chosen:
        if left() < (row.seconds if not done else 0.6 * row.seconds):
            late.append(row.name)
            continue
        begins, ends = partial(notes.add, "begin", row.name), partial(notes.add, "done", row.name)
        fatal = {x for name, x in notes.fatal if name == row.name}
        who = tuple(x for x in row.who if x not in fatal and (not args.who or x in args.who.split(",")))
        row = replace(row.tiny if args.smoke else row, who=who)
        try:
            if row.grows:
                row = grown(row, 0.75 * torch.cuda.get_device_properties(0).total_memory)
            plan = planned(row)
        except Exception as error:  # the planner's mistake costs its column, and a row that it sizes
            plan = 0
            tell(f"\nnot planned, {row.name}: {said(error)}\n")
            if row.grows:
                continue
        done[row.name] = found = {x: Found() for x in row.who}
        under_way.append(partial(lines, row, found, plan, name))
        try:
            first = race(row, how, found, begins)
            ends()
        except RuntimeError:
            first = None
        for line in under_way.pop()():
            tell(line)
        if args.profile is not None and len(done) < 3 and first is not None and left() > 30:
            begins("profile")
            look(row, first, how, args.profile, tell)
        if fresh.broken(device):
            fresh.end()
    if late:
        tell(f"\nLeft out, no time: {', '.join(late)}\n")
    return done


if __name__ == "__main__":
    main(began=psutil.Process().create_time())  # imports count
