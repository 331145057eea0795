"""The house rules of docs/architecture.md, read off the source: import order, file size, no globals, documented API.

Each rule is a function from parsed files to a list of complaints; each is shown to complain about a planted violation.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = 300
FLOORS = [  # a module imports from floors below its own, and inside its own folder
    {"lazy", "tree", "toml", "files", "tensorfile", "programs"}, {"config"}, {"sharding", "kernels"}, {"random", "inductor"},
    {"transforms", "tracing"}, {"split", "offload", "compiled"}, {"nn"}, {"models", "optim", "data"}, {"train"},
    {"inference", "rl", "plan"}, {"testing", "cli"}, {"__main__", "__init__"}]
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter", "bytearray"}
CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}
Source = tuple[Path, ast.Module]


def sources(package: Path) -> list[Source]:
    return [(path.relative_to(package), ast.parse(path.read_text())) for path in sorted(package.rglob("*.py"))]


def room(path: Path) -> str:
    """The house's room that a file lies in: sharding/mesh.py -> sharding, tree.py -> tree, __init__.py -> __init__."""
    return path.parts[0].removesuffix(".py")


def imported(tree: ast.Module, path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import inside the package, lazy ones too; `fmegatron` alone is the public face."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ["fmegatron", *path.parts[:-1]][: len(path.parts) - node.level + 1] if node.level else []
            base = ".".join([*here, *filter(None, [node.module])])
            found += [(node.lineno, f"{base}.{alias.name}" if base == "fmegatron" else base) for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "fmegatron"]


def import_order(files: list[Source]) -> list[str]:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    rooms = {room(path) for path, _ in files}
    complaints = [f"{name}: has no floor in the house" for name in sorted(rooms - floor.keys())]
    for path, tree in files:
        for line, name in imported(tree, path):
            target = (name.split(".") + ["__init__"])[1]
            target = target if target in rooms else "__init__"
            mine = room(path)
            if target != mine and floor.get(target, 99) >= floor.get(mine, 99):
                complaints.append(f"{path}:{line}: {mine} imports {name}, which lies on its own floor or above")
    return complaints


def file_size(files: list[Source], package: Path) -> list[str]:
    counts = [(path, len((package / path).read_text().splitlines())) for path, _ in files]
    return [f"{path}: {count} lines, at most {LINES}" for path, count in counts if count > LINES]


def no_globals(files: list[Source]) -> list[str]:
    """No `global`; a table at the top of a module or class is a CONSTANT, not empty, that nobody changes."""
    complaints = []
    for path, tree in files:
        nodes = list(ast.walk(tree))
        complaints += [f"{path}:{n.lineno}: global {', '.join(n.names)}" for n in nodes if isinstance(n, ast.Global)]
        tables = set()
        scopes = [tree, *(node for node in nodes if isinstance(node, ast.ClassDef))]
        for node in (node for scope in scopes for node in scope.body):
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            name = ", ".join(target.id for target in targets if isinstance(target, ast.Name))
            call = value.func if isinstance(value, ast.Call) else None
            made = getattr(call, "id", getattr(call, "attr", None))
            if isinstance(value, MUTABLE) or made in MUTABLE_CALLS:
                tables.add(name)
                parts = [getattr(value, part, None) for part in ("args", "keywords", "elts", "keys", "generators")]
                if name != "__all__" and (not any(parts) or not name.isupper() or made == "defaultdict"):
                    complaints.append(f"{path}:{node.lineno}: {name} is a global variable: make it an argument, or a "
                                      "CONSTANT with all its values")
        complaints += [f"{path}:{node.lineno}: {name} is a constant, and is changed here"
                       for node in nodes for name in tables & changed(node)]
    return complaints


def changed(node: ast.AST) -> set[str]:
    """Names whose value this one statement or call changes in place: X[k] = v, del X[k], X += y, X.append(v)."""
    places: list[ast.AST] = []
    if isinstance(node, ast.Assign | ast.Delete):
        places = [target.value for target in node.targets if isinstance(target, ast.Subscript)]
    elif isinstance(node, ast.AugAssign):
        places = [node.target.value if isinstance(node.target, ast.Subscript) else node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        places = [node.func.value]
    return {getattr(place, "id", getattr(place, "attr", "")) for place in places}


def documented(files: list[Source]) -> list[str]:
    """Modules, public functions and classes have docstrings; public functions and methods are annotated."""
    complaints = []
    for path, tree in files:
        if not ast.get_docstring(tree) and tree.body:
            complaints.append(f"{path}:1: the module has no docstring")
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        for node in [node for node in functions + classes if not node.name.startswith("_")]:
            if not ast.get_docstring(node):
                complaints.append(f"{path}:{node.lineno}: {node.name} has no docstring")
        methods = [node for item in classes for node in item.body if isinstance(node, ast.FunctionDef)]
        for node in [node for node in functions + methods if not node.name.startswith("_") or node.name == "__init__"]:
            spec = node.args
            takes = [arg for arg in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg] if arg]
            bare = [arg.arg for arg in takes if arg.annotation is None and arg.arg not in ("self", "cls", "ctx")]
            if bare or node.returns is None:
                what = ", ".join(bare) or "its result"
                complaints.append(f"{path}:{node.lineno}: {node.name} does not annotate {what}")
    return complaints


def complaints(rule: str, package: Path) -> list[str]:
    files = sources(package)
    rules = {"imports": import_order, "globals": no_globals, "documented": documented}
    return file_size(files, package) if rule == "size" else rules[rule](files)


@pytest.mark.parametrize("rule", ["imports", "size", "globals", "documented"])
def test_the_house_is_in_order(rule):
    found = complaints(rule, ROOT / "fmegatron")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule, path, source, word", [
    ("imports", "tree.py", "from fmegatron.nn import norm", "tree imports fmegatron.nn"),
    ("imports", "nn/norm.py", "def f():\n    import fmegatron.models.gpt", "nn imports fmegatron.models.gpt"),
    ("imports", "nn/norm.py", "from fmegatron import train", "nn imports fmegatron.train"),
    ("imports", "nn/norm.py", "from ..models import gpt", "nn imports fmegatron.models"),
    ("imports", "nn/norm.py", "import fmegatron as fm", "nn imports fmegatron"),
    ("imports", "kernels/norm.py", "from fmegatron.sharding import mesh", "kernels imports fmegatron.sharding"),
    ("imports", "attic/old.py", "", "attic: has no floor"),
    ("size", "tree.py", "\n" * 301, "301 lines"),
    ("globals", "tree.py", "CACHE = {}", "CACHE is a global variable"),
    ("globals", "tree.py", "sizes = {'a': 1}", "sizes is a global variable"),
    ("globals", "tree.py", "class A:\n    seen: list[int] = []", "seen is a global variable"),
    ("globals", "tree.py", "import collections\nSEEN = collections.defaultdict(list)", "SEEN is a global variable"),
    ("globals", "tree.py", "SIZES = {'a': 1}\ndef f():\n    SIZES['b'] = 2", ":3: SIZES is a constant"),
    ("globals", "tree.py", "SIZES = {'a': 1}\ndef f():\n    del SIZES['a']", ":3: SIZES is a constant"),
    ("globals", "tree.py", "SIZES = [1]\ndef f():\n    SIZES.append(2)", ":3: SIZES is a constant"),
    ("globals", "tree.py", "SIZES = [1]\nSIZES += [2]", ":2: SIZES is a constant"),
    ("globals", "tree.py", "def f():\n    global x\n    x = 1", "global x"),
    ("documented", "tree.py", "def f(x: int) -> int:\n    return x", "f has no docstring"),
    ("documented", "tree.py", "def f(x) -> int:\n    'doc'", "f does not annotate x"),
    ("documented", "tree.py", "class A:\n    'doc'\n    def f(self):\n        pass", "f does not annotate its result"),
])
def test_each_rule_can_fail(rule, path, source, word, tmp_path):
    rooms = ["nn", "models", "train", "sharding", "kernels"]
    for name in rooms:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "__init__.py").write_text("")
    assert complaints(rule, tmp_path) == []
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    assert any(word in complaint for complaint in complaints(rule, tmp_path))


def test_imports_downwards_and_constants_are_fine(tmp_path):
    files = {"nn/a.py": "from . import b\nfrom .b import c\nfrom fmegatron import tree", "tree.py": "import torch",
             "nn/b.py": "SIZES = {'a': 1}\nc = SIZES['a']", "__init__.py": "from fmegatron import nn"}
    for path, source in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    assert complaints("imports", tmp_path) == complaints("globals", tmp_path) == []


def test_budgets_speak(request):
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location("budgets", ROOT / "tests/conftest.py")
    conftest = module_from_spec(spec)
    spec.loader.exec_module(conftest)
    assert conftest.suite("tests/optim/test_adam.py::test_x[1/2]") == "optim"
    assert conftest.suite("tests/test_house.py::test_x") == "."
    assert conftest.verdicts({"optim": 3.0}, {"optim": 5}) == []
    assert len(conftest.verdicts({"optim": 7.0, "attic": 1.0}, {"optim": 5})) == 2
