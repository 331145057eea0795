"""Frozen dataclasses <-> TOML <-> command line.

A configuration is a tree of frozen dataclasses in which every field has a default. There is one way in:

    config = update(config, table, origin)      # a new configuration with the table's values checked and put in place

A TOML file is a table (`read`), and so is a command line (`words`): `--training.steps 20` is {"training": {"steps":
"20"}}. Both take the same checks and end in the same one-line errors. `dumps` is the way out: the file it writes reads
back as the same configuration.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, field, fields, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")
Table = Mapping[str, Any]


class ConfigError(ValueError):
    """A mistake in a configuration, in one line: its place, the key, what was expected, the nearest choice."""


class Text(str):
    """A word from the command line or the environment: its type is decided by the field that it meets."""


def option(default: Any, doc: str, *, at_least: float | None = None) -> Any:
    """A field with a default and a line for `--help`; numbers may have a lower bound."""
    metadata = {"doc": doc, "at_least": at_least}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def unheard(group: str, config: Any, names: Sequence[str], needs: str) -> None:
    """ConfigError where a field of `names` has been changed, which does nothing without what `needs` says."""
    for f in fields(config):
        start = f.default if f.default is not MISSING or f.default_factory is MISSING else f.default_factory()
        if f.name in names and (value := getattr(config, f.name)) != start:
            raise ConfigError(f"{group}.{f.name} = {format_value(value)} does nothing without {needs}")


# ---------------------------------------------------------------------------------------------------- tables

def read(path: Path, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The table in a TOML file; `${NAME}` and `${NAME:-default}` in strings are filled in, `$${` stands for `${`."""
    try:
        return loads(path.read_text(encoding="utf-8"), env)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def loads(text: str, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Like `read`, from a string."""
    try:
        return {key: _substitute(value, env, key) for key, value in tomllib.loads(text).items()}
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from None


def words(args: Sequence[str], flags: Container[str] = ()) -> tuple[list[str], dict[str, Any]]:
    """Positional words, and the table of `--a.b value` and `--a.b=value`; keys may have `-` for `_`, the last wins.

    A word of `flags` alone means true.
    """
    positional, table = [], dict[str, Any]()
    rest = iter([f"{word}=true" if word in flags and after not in ("true", "false") else word
                 for word, after in zip_longest(args, args[1:])])  # fmt: skip
    for word in rest:
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        value = value if equals else next(rest, "--")
        if value.startswith("--"):
            raise ConfigError(f"command line: --{name} needs a value")
        *groups, last = name.replace("-", "_").split(".")
        place = table
        for group in groups:
            if not isinstance(inner := place.setdefault(group, {}), dict):
                raise ConfigError(f"command line: --{name} goes into {group}, which another option sets to {inner}")
            place = inner
        place[last] = Text(value)
    return positional, table


def _substitute(value: Any, env: Mapping[str, str], key: str) -> Any:
    if isinstance(value, dict):
        return {name: _substitute(inner, env, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_substitute(inner, env, key) for inner in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if match[0] == "$${":
            return "${"
        if name is None:
            raise ConfigError(f"{key} = {value!r}: write ${{NAME}}, ${{NAME:-default}}, or $${{ for a plain ${{")
        if name not in env and default is None:
            raise ConfigError(f"{key}: ${{{name}}} is not set in the environment (${{{name}:-x}} defaults to x)")
        return env.get(name, default)

    filled = re.sub(r"\$\$\{|\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}|\$\{", fill, value)
    return Text(filled) if re.search(r"(?<!\$)\$\{", value) else filled


# ------------------------------------------------------------------------------------------------ into fields

def update(config: C, table: Table, origin: str) -> C:
    """A new configuration with the values of `table` in place; ConfigError names `origin`: a file, the command line."""
    return _update(config, table, origin, "", type(config))


def _update(config: Any, table: Table, origin: str, prefix: str, root: type) -> Any:
    hints, metadata = get_type_hints(type(config)), {f.name: f.metadata for f in fields(config)}
    changes = {}
    for name, value in table.items():
        key = prefix + name
        if name not in metadata:
            legal = [legal for legal, *_ in options(root)]
            groups = {legal.rpartition(".")[0] for legal in legal} - {""}
            raise ConfigError(f"{origin}: there is no {key}{_nearest(key, [*legal, *sorted(groups)])}")
        old = getattr(config, name)
        if is_dataclass(old):
            if not isinstance(value, dict):
                example = next(iter(options(type(old))))[0]
                raise ConfigError(f"{origin}: {key} is a group: set {key}.{example} or another of its keys")
            changes[name] = _update(old, value, origin, key + ".", root)
            continue
        try:
            new = convert(value, hints[name])
        except TypeError:
            legal = [str(arg) for arg in get_args(hints[name])] if get_origin(hints[name]) is Literal else []
            wanted = describe(hints[name]) + (_nearest(value, legal) if isinstance(value, str) else "")
            shown = value if isinstance(value, Text) else format_value(value)
            raise ConfigError(f"{origin}: {key} = {shown}: expected {wanted}") from None
        least = metadata[name].get("at_least")
        if least is not None and isinstance(new, int | float) and not least <= new < math.inf:
            limit = "be finite" if new == math.inf else f"be at least {least}"
            raise ConfigError(f"{origin}: {key} = {format_value(new)}: must {limit}")
        changes[name] = merge(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
    try:
        return replace(config, **changes)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def convert(value: Any, hint: Any) -> Any:
    """`value` as a field of type `hint`, or TypeError. An int is a float, a list a tuple, a `Text` what it reads as."""
    if isinstance(value, Text):
        for reading in _readings(value):
            with suppress(TypeError):
                return convert(reading, hint)
        raise TypeError
    kind, args = get_origin(hint), get_args(hint)
    if value == "none" and (hint in (Any, NoneType) or NoneType in args):
        return None
    if kind in (Union, UnionType):
        for arg in args:
            with suppress(TypeError):
                return convert(value, arg)
    elif hint is Any and isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        converted = {key: convert(item, Any) for key, item in inner}
        return converted if isinstance(value, dict) else list(converted.values())
    elif kind is Literal and any(type(value) is type(arg) and value == arg for arg in args):
        return value
    elif kind is tuple and isinstance(value, list | tuple):
        each = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(each) == len(value):
            return tuple(convert(item, arg) for item, arg in zip(value, each, strict=True))
    elif kind is dict and isinstance(value, dict):
        return {key: convert(item, args[1]) for key, item in value.items()}
    elif hint is float and type(value) is int:
        return float(value)
    elif hint is Any or type(value) is hint:
        return value
    raise TypeError


def _readings(text: str) -> Iterator[Any]:
    """What a bare word may mean, first meaning first: a TOML value, True or False, itself, .5, a comma list."""
    if "\n" not in text:
        with suppress(tomllib.TOMLDecodeError):
            yield tomllib.loads(f"value = {text}")["value"]
    if text in ("True", "False"):
        yield text == "True"
    yield str(text)
    with suppress(ValueError):
        yield float(text)
    yield [Text(part.strip()) for part in text.split(",")]


def merge(old: Table, new: Table) -> dict[str, Any]:
    """Tables merged at every depth; what is new wins."""
    both = {key: merge(old[key], new[key]) for key in old.keys() & new.keys()
            if isinstance(old[key], dict) and isinstance(new[key], dict)}
    return {**old, **new, **both}


# ---------------------------------------------------------------------------------------------------- way out

def dumps(config: Any) -> str:
    """TOML that reads back as `config`. None, which TOML has not, is "none", or left out where it is the default."""
    return "".join(_sections(config, "")).lstrip("\n")


def _sections(config: Any, prefix: str) -> Iterator[str]:
    default = type(config)()
    values = [(f.name, getattr(config, f.name)) for f in fields(config)]
    plain = [(name, value) for name, value in values if not is_dataclass(value)]
    if prefix and plain:
        yield f"\n[{prefix[:-1]}]\n"
    for name, value in plain:
        if value is not None or getattr(default, name) is not None:
            yield f"{name} = {format_value(value)}\n"
    for name, value in values:
        if is_dataclass(value):
            yield from _sections(value, f"{prefix}{name}.")


def format_value(value: Any) -> str:
    """One TOML value on one line."""
    value = "none" if value is None else value
    if isinstance(value, str):
        return _quoted(value.replace("${", "$${"))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# ------------------------------------------------------------------------------------------------------- help

def options(config: type, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted key, type, default, doc) of every leaf field."""
    hints, default = get_type_hints(config), config()
    for f in fields(config):
        value = getattr(default, f.name)
        if is_dataclass(value):
            yield from options(type(value), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hints[f.name], value, f.metadata.get("doc", "")


def describe(hint: Any) -> str:
    """A type as a person writes its values: `fp32|bf16`, `int|none`, `[float, float]`, `true|false`."""
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType, Literal):
        return "|".join(describe(arg) if kind is not Literal else str(arg) for arg in args)
    if kind is tuple:
        return "[" + ", ".join("..." if arg is Ellipsis else describe(arg) for arg in args) + "]"
    if kind is dict:
        return "table"
    spelled = {bool: "true|false", NoneType: "none", str: "text"}
    return spelled[hint] if hint in spelled else str(getattr(hint, "__name__", hint))


def _nearest(word: str, legal: Sequence[str]) -> str:
    """`; did you mean …?`, by the whole dotted key, else by its last part; else nothing."""
    last = {key.rsplit(".", 1)[-1]: key for key in legal}
    close = difflib.get_close_matches(word, legal, 1, 0.6) or [
        last[name] for name in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(last), 1, 0.7)]
    return f"; did you mean {close[0]}?" if close else ""
