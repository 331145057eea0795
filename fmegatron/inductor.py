"""How Inductor is asked: one traced graph in, a function of its tensors out.

All kernels of a CPU graph are compiled as one C++ library, in the background: the Python that traces the next graph goes on,
and the first call of a kernel waits. Inductor's own way is a library a kernel, and to wait for all of them after each graph:
of a compiler's run of a second on one kernel nine tenths are the same for every kernel (headers, also precompiled; linking).
"""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.codecache import CacheBase, CppPythonBindingsCodeCache, torch_key
from torch._inductor.codegen.common import device_codegens, init_backend_registration
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

INDUCTOR = {
    # The vector unit that /proc/cpuinfo names is there: no trial library, compiled once and loaded in a child in every process.
    "cpp.vec_isa_ok": True,
    # No line numbers for debuggers: an eighth of the C++ compiler's time. Torch 2.11 writes none.
    **({"aot_inductor.enable_line_tables": False} if hasattr(config.aot_inductor, "enable_line_tables") else {}),
}

HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"  # precompiled by Inductor
# What turns C++ functions, kernel0::kernel and so on, into a Python module called kernel.
MODULE = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <utility>

static void* (*data_of)(PyObject*);

template <typename T> T argument(PyObject* x) {
    if constexpr (std::is_pointer_v<T>) return static_cast<T>(data_of(x));
    else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(PyFloat_AsDouble(x));
    else return static_cast<T>(PyLong_AsSsize_t(x));
}

template <auto f> struct Call;
template <typename... T, void (*f)(T...)> struct Call<f> {
    template <size_t... i> static void run(PyObject* const* args, std::index_sequence<i...>) {
        std::tuple<T...> given{argument<T>(args[i])...};
        if (!PyErr_Occurred()) f(std::get<i>(given)...);
    }
    static PyObject* python(PyObject*, PyObject* const* args, Py_ssize_t n) {
        try {
            if (n != sizeof...(T)) throw std::runtime_error("a kernel got another number of arguments than it has");
            run(args, std::index_sequence_for<T...>{});
        } catch (std::exception const& e) {
            PyErr_SetString(PyExc_RuntimeError, e.what());
        }
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
    }
};

static PyMethodDef methods[] = {%s{NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernel", NULL, -1, methods};

PyMODINIT_FUNC PyInit_kernel(void) {
    const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");  // set by torch, which loads this
    if (!address) {
        PyErr_SetString(PyExc_RuntimeError, "torch did not say where its tensors' data lies");
        return nullptr;
    }
    data_of = reinterpret_cast<decltype(data_of)>(std::strtoull(address, NULL, 10));
    return PyModule_Create(&module);
}
"""


def compile_graph(gm: Any, inputs: Any, backward: bool) -> Callable[..., Any]:
    """A traced graph of fixed shapes, compiled; one with collectives in its own order, in which they overlap with products.

    (Inductor would wait as soon as it can, to have the memory of what is sent back.)
    """
    from torch._inductor.compile_fx import compile_fx_inner

    settings = {**INDUCTOR, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if any("wait_tensor" in str(node.target) for node in gm.graph.nodes):
        settings["reorder_for_peak_memory"] = False
    with config.patch(settings), one_library_a_graph():
        return compile_fx_inner(gm, inputs, is_backward=backward)


def warm_up() -> None:
    """Begin what every first compilation needs and no graph: the precompiled header, the hash of torch that keys its cache."""
    with config.patch(INDUCTOR):
        for work in (partial(CppPythonBindingsCodeCache.load, library([])), torch_key, CacheBase.get_system):
            in_background(work)


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """`work()` in a thread of its own, under the caller's settings of torch."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(contextvars.copy_context().run, work)
    pool.shutdown(wait=False)
    return future


def library(sources: list[str]) -> str:
    """The C++ of kernels as Inductor writes them, together: a module `kernel` with functions kernel0, kernel1 and so on."""
    spaces = []
    for i, source in enumerate(sources):
        body = re.sub(r'extern "C"\s+void\s+kernel\(', "static void kernel(", source.replace(HEADER.strip(), ""))
        spaces.append(f"namespace kernel{i} {{\n{body}\n}}\n")
    call = '{{"kernel{0}", (PyCFunction)(void(*)(void))Call<&kernel{0}::kernel>::python, METH_FASTCALL, ""}}, '
    return HEADER + "".join(spaces) + MODULE % "".join(call.format(i) for i in range(len(sources)))


class Kernels:
    """The kernels of one graph, as the Python that Inductor writes for it sees them; `scope` is that module's names."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope, self.sources = scope, dict[str, str]()
        self.module: Future[ModuleType] = Future()

    def add(self, name: str, types: list[str], source: str) -> Callable[..., None]:
        """The kernel `name`; its first call puts all kernels in the place of what is returned here."""
        self.sources[name] = source
        return partial(self._first, name)

    def build(self) -> None:
        """Compile and load what was added."""
        if self.sources:
            self.module = in_background(partial(CppPythonBindingsCodeCache.load, library(list(self.sources.values()))))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all kernels, in the library's order."""
        return tuple(self.sources)

    def file(self) -> Path | None:
        """The library, when it is built; None without kernels."""
        return Path(str(self.module.result().__file__)) if self.sources else None

    def _first(self, name: str, *args: Any) -> None:
        module = self.module.result()
        self.scope |= {name: getattr(module, f"kernel{i}") for i, name in enumerate(self.sources)}
        self.scope[name](*args)


class Together(PythonWrapperCodegen):
    """Inductor's writer of a graph's Python, whose kernels on a CPU are `Kernels`."""

    @staticmethod
    def create(is_subgraph: bool, *args: Any, **options: Any) -> PythonWrapperCodegen:
        return PythonWrapperCodegen.create(is_subgraph, *args, **options) if is_subgraph else Together()

    def write_header(self) -> None:
        super().write_header()
        self.imports.writeline("from fmegatron.inductor import Kernels")
        self.header.writeline("kernels = Kernels(globals())")

    def write_async_compile_wait(self) -> None:
        self.prefix.writeline("kernels.build()")
        super().write_async_compile_wait()

    def define_kernel(self, kernel_name: str, kernel_body: str, *args: Any, **options: Any) -> None:
        alone = "async_compile.cpp_pybinding("
        if kernel_body.startswith(alone):
            kernel_body = f"kernels.add({kernel_name!r}, {kernel_body[len(alone):]}"
        super().define_kernel(kernel_name, kernel_body, *args, **options)


@contextmanager
def one_library_a_graph() -> Iterator[None]:
    """Inside, CPU graphs are written by `Together`: Inductor takes another writer from its register of devices only."""
    init_backend_registration()
    before = device_codegens["cpu"]
    device_codegens["cpu"] = replace(before, wrapper_codegen=Together)
    try:
        yield
    finally:
        device_codegens["cpu"] = before
