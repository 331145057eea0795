"""Where a run's numbers go: one flat record a step, to a JSON-lines file, to TensorBoard, to a line of text.

A record maps names to numbers. The trainer writes `FIELDS`; held-out numbers are further fields of the same step's
record; anything else may join.

    {"step": 120, "loss": 3.21, "grad_norm": 0.8, "tokens_per_second": 5120.0, ..., "bits_per_byte": 1.93}
"""

from __future__ import annotations

import importlib
import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from fmegatron.files import write_atomically

Record = Mapping[str, Any]
Clean = dict[str, float | int | str | bool | None]

# name: (how people read it, what it is). mfu is there where the device's peak is known, the last two where held-out
# text was measured.
FIELDS = MappingProxyType(
    {
        "step": ("", "steps so far, the skipped ones too"),
        "loss": ("loss {:.4f}", "training loss of this step, nats a token"),
        "grad_norm": ("grad norm {:.3g}", "before clipping"),
        "lr": ("lr {:.2e}", "learning rate"),
        "tokens_per_second": ("{:,.0f} tokens/s", "all devices together"),
        "tflops": ("{:.3g} TFLOP/s", "model FLOPs as flops.py counts them, all devices together"),
        "mfu": ("MFU {:.1%}", "tflops over the devices' dense peak, of 1"),
        "memory_bytes": ("{:.2f} GB", "resident memory of the process on CPU, peak allocation on GPU"),
        "loss_scale": ("loss scale {:.3g}", "factor on the loss of this step, where there is one"),
        "zeros": ("", "zeros among the gradient's elements, where they are counted"),
        "skipped": ("skipped {:.0f}", "steps so far whose gradients were not finite, or larger than training.skip_norm"),
        "consumed": ("", "samples so far"),
        "heldout_loss": ("held-out loss {:.4f}", "mean loss on held-out text, nats a token"),
        "bits_per_byte": ("held-out bits/byte {:.4f}", "the same, in bits for each byte of that text"),
        "perplexity": ("", "e to the training loss's cross-entropy; heldout_perplexity: of held-out text"),
        "seconds": ("", "wall time of the step; time/data, forward_backward, optimizer are its parts, time/validation and"
                    " time/checkpoint come beside it"),
        "time": ("", "of the day, in seconds since 1970, when the record was written"),
        "goodput": ("", "seconds of steps that count (not skipped, not lost at a restart) over wall time since the run began"),
        "param_norm": ("", "of the parameters after the step"),
    }
)


class Writer(Protocol):
    """What a trainer calls with every record."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends one JSON object a step to a file, flushed at once; non-finite numbers become null.

    A run that resumes at step s gives `after=s`: records of later steps, which it will write again, are dropped, and so
    is a line that a kill has torn. The file is replaced whole, so a kill here loses nothing. `after=None` keeps all
    whole lines.
    """

    def __init__(self, path: str | Path, *, after: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            old = self.path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in old.splitlines(keepends=True) if _whole_and_not_after(line, after)]
            if (new := "".join(kept)) != old:
                write_atomically(self.path, new)
        self._stream = open(self.path, "a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._stream.write(json.dumps(clean(record), allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class TensorBoard:
    """Writes every number of a record as a scalar. `after` hides what an earlier run wrote of later steps."""

    def __init__(self, folder: str | Path, *, after: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional
        except ImportError as error:
            raise ValueError("TensorBoard is asked for and not installed: pip install tensorboard") from error
        purge = None if after is None else after + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def write(self, record: Record) -> None:
        values = clean(record)
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Logs every number of a record to Weights & Biases; WANDB_MODE=offline keeps it in files under `folder`.

    The run keeps its id in the folder, so that a resumed one goes on; `step` is the axis of all charts.
    """

    def __init__(self, folder: str | Path, project: str, name: str, settings: Mapping[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")  # optional
        except ImportError as error:
            raise ValueError("log.wandb is set and wandb is not installed: pip install wandb") from error
        known = Path(folder) / "wandb-id"
        number = known.read_text(encoding="utf-8").strip() if known.is_file() else secrets.token_hex(4)
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(number + "\n", encoding="utf-8")
        where = {"project": project, "name": name, "id": number, "dir": str(folder)}
        try:
            self._run: Any = wandb.init(**where, resume="allow", config=dict(settings))
        except wandb.errors.UsageError as error:  # no key, a name that it refuses
            said = str(error).splitlines()[0]
            raise ValueError(f"log.wandb = {project}: {said} Or keep it here: WANDB_MODE=offline") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log({name: value for name, value in clean(record).items() if value is not None})

    def close(self) -> None:
        self._run.finish()


def read(path: str | Path) -> list[Clean]:
    """The records of a JSON-lines file; a torn last line is left out."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if _whole_and_not_after(line, None)]


def clean(record: Record) -> Clean:
    """Plain numbers: 0-D tensors and arrays become theirs, non-finite ones None."""
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in plain.items()
    }


def step_line(record: Record, steps: int | None = None) -> str:
    """One line for people. Fields that the record has not are left out; a number that is not finite reads "not finite".

    step  120/2000  loss 3.2100  grad norm 0.80  lr 3.00e-04  5,120 tokens/s  0.11 TFLOP/s  MFU 41.2%  1.23 GB
    """
    values = clean(record)
    step = f"step {values['step']:>{len(str(steps))}}/{steps}" if steps else f"step {values['step']}"
    return "  ".join([step, *(text for name in FIELDS if (text := describe(name, values)))])


def describe(name: str, values: Clean) -> str:
    """A field as people read it, "" where there is nothing to say: `describe("memory_bytes", ...)` -> "1.23 GB"."""
    form = FIELDS[name][0]
    if not form or name not in values or (name in ("mfu", "skipped") and not values[name]):
        return ""
    value = values[name]
    if value is None:
        return f"{form.split('{')[0].strip() or name} not finite"
    assert isinstance(value, int | float)
    return form.format(value / 1e9 if name == "memory_bytes" else value)


def _whole_and_not_after(line: str, after: int | None) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return after is None or record["step"] <= after
