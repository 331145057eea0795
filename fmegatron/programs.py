"""Compiled graphs on disk, which run again without the compiler: no Dynamo, AOTAutograd or Inductor is imported.

    programs = Programs.of(config)                     a folder, and what graphs depend on beside their inputs
    found = programs.find("layer 0 ...")               the functions kept under that name, and facts about them; or None
    programs.keep("layer 0 ...", [forward, backward], facts)

A cache that is asked with a traced graph is always right and always late: importing the tracer and tracing are most of a start.
This one is asked with what the graph was made from: all sources of this package, torch, Python, the processor, the settings of
torch, `of`, and the name, which says the inputs' shapes. So `of` must say all that a block's Python reads beside its inputs: of
a run that is its configuration. Where it cannot be said, as with a function of yours, make the step without programs.

Only graphs of the CPU that Inductor wrote as one function and one library are kept, see `compiled.written`.
"""

from __future__ import annotations

import ast
import builtins
import getpass
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import torch

Call = Callable[[list[Any]], Any]  # of a list of tensors, which it empties
POINTER = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"  # where a library is told how to find a tensor's data
PRODUCTS = MappingProxyType({name: getattr(torch, name) for name in ("mm", "bmm", "addmm", "baddbmm")})
OPERATORS = ("aten", "_c10d_functional", "fmegatron")  # torch.ops that are there without Inductor


@dataclass(frozen=True)
class Text:
    """A program as it is written: `def call(args)` in Python, and the file of its kernels, by name; none without kernels."""

    python: str
    library: Path | None
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Programs:
    """A folder of programs, each under a hash of `of`, its name, and what `environment` says."""

    folder: Path
    what: str

    @staticmethod
    def of(*what: Any) -> Programs:
        """The programs of what these objects say of themselves (`repr`), in the folder where torch keeps compiled graphs."""
        user = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
        folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", user)) / "fmegatron"
        return Programs(folder, repr(what))

    @cached_property
    def environment(self) -> str:
        """A hash of what does not change while a process runs."""
        return environment(Path(__file__).parent)

    def path(self, name: str) -> Path:
        """Where the program `name` lies, if it is there."""
        words = json.dumps([self.environment, self.what, name, settings()], sort_keys=True)
        return self.folder / hashlib.sha256(words.encode()).hexdigest()

    def find(self, name: str) -> tuple[list[Call], Any] | None:
        """The functions kept as `name`, and the facts kept with them; None where they are not there, or damaged."""
        folder = self.path(name)
        try:
            facts = json.loads((folder / "facts.json").read_text())
            return [load(read(folder, i)) for i in range(facts["programs"])], facts["facts"]
        except (OSError, ValueError, KeyError, TypeError, SyntaxError, ImportError, AttributeError):
            return None

    def keep(self, name: str, texts: Sequence[Text], facts: Any) -> None:
        """Keep programs; `facts` is of JSON. Whoever writes the same name first wins: it is the same program."""
        folder = self.path(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=self.folder) as made:
                write(Path(made) / "program", texts, facts)
                if folder.exists() and self.find(name) is None:
                    shutil.rmtree(folder)  # damaged
                os.rename(Path(made) / "program", folder)
        except OSError as error:
            if not folder.exists():  # else another process was first
                warnings.warn(f"compiled graphs are not kept, the next start compiles them again: {error}", stacklevel=1)


def write(folder: Path, texts: Sequence[Text], facts: Any) -> None:
    """A new folder of programs, and facts of JSON about them."""
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.py").write_text(text.python)
        (folder / f"{i}.json").write_text(json.dumps(text.kernels))
        if text.library is not None:
            shutil.copyfile(text.library, folder / f"{i}.so")
    (folder / "facts.json").write_text(json.dumps({"programs": len(texts), "facts": facts}))


def read(folder: Path, i: int) -> Text:
    """The i-th program of a folder: the inverse of `write`."""
    kernels = tuple(json.loads((folder / f"{i}.json").read_text()))
    return Text((folder / f"{i}.py").read_text(), folder / f"{i}.so" if kernels else None, kernels)


def load(text: Text) -> Call:
    """The function of a program."""
    names = scope()
    if text.library is not None:
        module = extension(text.library)
        names |= {name: getattr(module, f"kernel{i}") for i, name in enumerate(text.kernels)}
    exec(compile(text.python, "<program>", "exec"), names)
    return names["call"]


def extension(library: Path) -> ModuleType:
    """A library of kernels as a module with functions kernel0, kernel1 and so on, see `inductor.library`."""
    guards: Any = torch._C._dynamo.guards
    os.environ[POINTER] = str(guards._torchinductor_pyobject_tensor_data_ptr)
    loader = importlib.machinery.ExtensionFileLoader("kernel", str(library))
    spec = importlib.util.spec_from_file_location("kernel", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def scope() -> dict[str, Any]:
    """The names that a program's Python may read beside its kernels; all else would need the compiler."""
    guards: Any = torch._C._dynamo.guards
    return {
        "torch": torch, "aten": torch.ops.aten, "device": torch.device, "math": math, "inf": math.inf, "nan": math.nan,
        "assert_size_stride": guards.assert_size_stride, "assert_alignment": guards.assert_alignment,
        "empty_strided": torch.empty_strided, "empty_strided_cpu": guards._empty_strided_cpu,
        "reinterpret_tensor": guards._reinterpret_tensor, "alloc_from_pool": torch.ops.inductor._alloc_from_pool,
        "extern_kernels": SimpleNamespace(**PRODUCTS),
    }  # fmt: skip


def foreign(python: str, kernels: Sequence[str]) -> set[str]:
    """What the program reads and a process without the compiler does not have."""
    tree = ast.parse(python)
    known = {*scope(), *kernels, *dir(builtins)}
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - own - known
    for node in ast.walk(tree):
        chain = dotted(node)
        if chain[:1] == ["extern_kernels"] and chain[1:] and chain[1] not in PRODUCTS:
            found.add(".".join(chain))
        if chain[:2] == ["torch", "ops"] and chain[2:] and chain[2] not in OPERATORS:
            found.add(".".join(chain))
    return found


def dotted(node: ast.AST) -> list[str]:
    """["torch", "ops", "aten"] of the expression torch.ops.aten; empty where it is not names all along."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return [*before, node.attr] if before else []
    return []


def settings() -> list[Any]:
    """Of torch, those that change what is compiled."""
    own = {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_")}
    own.pop("TORCHINDUCTOR_CACHE_DIR", None)
    flags = [torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), str(torch.get_default_dtype())]
    return [torch.get_num_threads(), *flags, own]


def environment(package: Path) -> str:
    """A hash of the package's sources, torch, Python, the processor and the compiler's name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".toml")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().split("\n\n")[0].splitlines() if cpu.exists() else [platform.processor()]
    words = [line for line in lines if line.startswith(("vendor_id", "cpu family", "model", "flags", "CPU ", "Features"))]
    words += [torch.__version__, str(torch.version.git_version), sys.version, platform.machine(), os.environ.get("CXX", "")]
    digest.update("\0".join(words).encode())
    return digest.hexdigest()
