"""run.json: what is true of a run beside settings and numbers: machine, versions, mesh, model, each session's start."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from fmegatron.files import write_atomically
from fmegatron.train import metrics
from fmegatron.train.book import Past

NAME = "run.json"
PACKAGES = ("fmegatron", "torch", "numpy", "triton", "safetensors", "tokenizers")


def environment(device: torch.device | str) -> dict[str, Any]:
    """The machine and the versions of what runs on it."""
    cuda = torch.device(device).type == "cuda"
    found: dict[str, Any] = {"host": socket.gethostname(), "platform": platform.platform(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found |= {"device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()}
    found |= {"cuda": torch.version.cuda} if cuda else {}
    found |= {"cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total, "threads": torch.get_num_threads()}
    return found | {"command": " ".join(sys.argv)}


def begin(folder: Path, started: float, **said: Any) -> None:
    """Note that a session of the run in `folder` began at that time. said: of the model and the mesh, as JSON has it."""
    old = read(folder)
    sessions = [*old.get("sessions", []), {"started": started, "steps": _done(folder)}]
    text = json.dumps({"started": sessions[0]["started"], "sessions": sessions, **said}, indent=1)
    write_atomically(folder / NAME, text + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The facts of a run; none where it has never begun."""
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def past(folder: Path) -> Past:
    """What the run has done before, for its goodput."""
    path = folder / "metrics.jsonl"
    records = metrics.read(path) if path.is_file() else []
    useful, skipped = 0.0, 0
    for r in records:
        now = int(r.get("skipped") or 0)
        useful += float(r.get("seconds") or 0.0) if now <= skipped else 0.0
        skipped = now
    return Past(useful, skipped, read(folder).get("started"))


def _done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    records = metrics.read(path) if path.is_file() else []
    return int(records[-1]["step"] or 0) if records else 0
