"""Megatron-LM's flags out of what people keep them in: words, a launch script, YAML lines.

    flags_of('ARGS=(\\n  --num-layers $LAYERS\\n)\\nLAYERS=24 ...')     {"num_layers": 24, ...}

A script is read, not run: variables that it sets to plain values are filled in, with the default of ${NAME:-default}; of two
branches the later counts. What stays open keeps its dollar: `open_of` finds it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
ASSIGNED = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.S)
MARKS = "();\n"


def flags_of(text: str) -> dict[str, Any]:
    """{"num_layers": 24, ...}. A bare flag is True; of several words it is a list. Raises ValueError for an open quote."""
    return _read(re.sub(r"\\\n", " ", text), {})


def open_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """The flags whose value is a variable that the script does not set."""
    return {name: x for name, x in args.items() if any("$" in str(y) for y in (x if isinstance(x, list) else [x]))}


def _read(text: str, known: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    name, depth = None, 0
    for word in _words(text):
        if set(word) <= set(MARKS):  # a value stands on its flag's line, or in its array
            depth += word.count("(") - word.count(")")
            name = name if depth > 0 and ")" not in word else None
            continue
        assigned = ASSIGNED.fullmatch(word)
        inner = assigned[2] if assigned else word
        if inner.lstrip().startswith("--") and re.search(r"\s", inner.strip()):  # ARGS="--num-layers 24 ...", or of an array
            found |= _read(inner, known)
            name = None
        elif assigned and not word.startswith("-"):
            known[assigned[1]] = _filled(assigned[2], known)
            name = None
        elif word.startswith("--"):
            name, equals, value = word[2:].rstrip(":").replace("-", "_").partition("=")
            found[name] = _value(_filled(value, known)) if equals else True
        elif name is not None and "[@]" not in word:
            old, new = found[name], _value(_filled(word, known))
            found[name] = new if old is True else [*(old if isinstance(old, list) else [old]), new]
    return found


def _words(text: str) -> Iterator[str]:
    """Words as a shell has them, with parentheses, semicolons and ends of lines as words of their own."""
    for line in _lines(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();")
        lexer.whitespace_split = True
        yield from lexer
        yield "\n"


def _lines(text: str) -> Iterator[str]:
    """Lines, joined while a quote is open; a last one that never closes raises ValueError."""
    held = ""
    for line in text.splitlines():
        held += line + "\n"
        try:
            shlex.split(held, comments=True)
        except ValueError:
            continue
        yield held
        held = ""
    if held:
        shlex.split(held, comments=True)


def _filled(word: str, known: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[3]
        return known.get(name, found[0] if found[2] is None else found[2].strip("\"'"))

    return VARIABLE.sub(value, word)


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(word.lower(), word)
