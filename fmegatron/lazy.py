"""Packages whose modules are imported when they are first named: after `import fmegatron as fm`, `fm.train.mup` is there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def submodules(package: str) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """A package's `__getattr__`, its module of that name (AttributeError where there is none), and `__dir__`."""

    def find(name: str) -> ModuleType:
        try:
            return import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None

    def known() -> list[str]:
        here = sys.modules[package]
        return sorted({*vars(here), *(module.name for module in iter_modules(here.__path__))})

    return find, known
