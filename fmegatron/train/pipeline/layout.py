"""Which layers lie on which stage: evenly, fewer at the ends, or written out in Megatron's grammar.

    E|(t|)*3,tL   five stages: the embedding alone; a layer on each of the next three; a layer and the loss on the last

E embedding, t layer, m layer of multi-token prediction, L last norm and loss, | next stage; x*3 and (xy|)*3 repeat, commas
and spaces are for the eye. Stage s is the s-th part, whatever rank the schedule gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmegatron.models.model import Node

Stages = tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Layout:
    """The letters of each stage: ("Et", "tt", "tL"). Raises ValueError in one line where they are no model."""

    stages: tuple[str, ...]

    def __post_init__(self) -> None:
        flat = "".join(self.stages)
        for letter, name, place in (("E", "embedding", "first"), ("L", "loss", "last")):
            if flat.count(letter) != 1 or flat[0 if letter == "E" else -1] != letter:
                found = f"{flat.count(letter)} times" if flat.count(letter) != 1 else "elsewhere"
                raise ValueError(f"layout {self}: {letter} ({name}) comes once, {place}, not {found}")
        if "t" in flat[flat.find("m") :] and "m" in flat:
            raise ValueError(f"layout {self}: layers (t) come before those of multi-token prediction (m)")
        if sum("m" in stage for stage in self.stages) > 1:
            raise ValueError(f"layout {self}: all m lie on one stage, not on {sum('m' in stage for stage in self.stages)}")

    def __str__(self) -> str:
        return "|".join(self.stages)

    def layers(self, stage: int) -> range:
        """The global numbers of a stage's layers."""
        start = sum(letters.count("t") for letters in self.stages[:stage])
        return range(start, start + self.stages[stage].count("t"))

    def check(self, layers: int, stages: int, predicted: int = 0) -> Layout:
        """Itself, where it has these numbers of layers, of stages and of m; else ValueError."""
        flat = "".join(self.stages)
        for letter, name, n in (("t", "layers", layers), ("m", "layers of multi-token prediction", predicted)):
            if flat.count(letter) != n:
                raise ValueError(f"layout {self} has {flat.count(letter)} {letter}, and the model {n} {name}")
        if len(self.stages) != stages:
            raise ValueError(f"layout {self} has {len(self.stages)} stages, and the schedule {stages}")
        return self


def parse_layout(text: str) -> Layout:
    """The layout of a string in Megatron's grammar; raises ValueError in one line, with the place of a mistake."""
    letters, rest = _items(text, 0, "")
    assert rest == len(text)
    return Layout(tuple("".join(letters).split("|")))


def _items(text: str, at: int, closing: str) -> tuple[list[str], int]:
    """Letters from `at` to `closing` (or the end), repetitions written out, and the place behind them."""
    out: list[str] = []
    while at < len(text) and text[at] != closing:
        letter, start = text[at], at
        if letter in ", ":
            at += 1
            continue
        if letter == "(":
            item, at = _items(text, at + 1, ")")
            if at >= len(text):
                raise ValueError(f"layout {text!r}: the bracket at {start} is not closed")
        elif letter in "EtmL|":
            item = [letter]
        else:
            raise ValueError(f"layout {text!r}: {letter!r} at {start} is none of E t m L | ( ) *N")
        at += 1
        if at < len(text) and text[at] == "*":
            end = at + 1
            while end < len(text) and text[end].isdigit():
                end += 1
            if end == at + 1:
                raise ValueError(f"layout {text!r}: the * at {at} needs a number")
            item, at = item * int(text[at + 1 : end]), end
        out += item
    return out, at


def split_layers(
    layers: int,
    stages: int,
    *,
    first: int | None = None,
    last: int | None = None,
    count_embedding: bool = False,
    count_loss: bool = False,
    predicted: int = 0,
) -> Layout:
    """As many layers on each stage; first, last: other numbers on these. count_*: the embedding, the loss counts as a layer.

    predicted: layers of multi-token prediction, which then lie on the last stage.

    Raises ValueError with the nearest legal choices where the layers do not divide.
    """
    if (first is not None or last is not None) and (count_embedding or count_loss):
        raise ValueError("a layout has numbers for its first and last stage, or counts embedding and loss as layers, not both")
    given = {index: n for index, n in ((0, first), (stages - 1, last)) if n is not None}
    free = stages - len(given)
    rest = layers - sum(given.values()) + count_embedding + count_loss
    if rest < 0 or (free == 0 and rest) or (free and rest % free):
        raise ValueError(_indivisible(layers, stages, rest, free))
    share = rest // free if free else 0
    counts = [given.get(stage, share) for stage in range(stages)]
    counts[0] -= count_embedding
    counts[-1] -= count_loss
    if min(counts) < 0:
        raise ValueError(f"{layers} layers over {stages} stages leave no room for embedding and loss: count neither")
    letters = ["t" * n for n in counts]
    letters[0] = "E" + letters[0]
    letters[-1] += "m" * predicted + "L"
    return Layout(tuple(letters))


def _indivisible(layers: int, stages: int, rest: int, free: int) -> str:
    base, more = divmod(layers, stages)
    counts = [base + (stage >= stages - more) for stage in range(stages)]
    counts.sort(reverse=True)
    written = "|".join("t" * n if n < 4 else f"t*{n}" for n in counts)
    near = [n for n in (layers - rest % free, layers + free - rest % free) if n > 0] if free and rest > 0 else []
    choices = f"use {' or '.join(map(str, near))} layers, or " if near else "use "
    return f"{layers} layers: {rest} do not divide over {free} of {stages} stages: {choices}a layout such as E{written}L"


def place_nodes(chain: Sequence[Node], layout: Layout) -> Stages:
    """The chain's nodes on the layout's stages: E is what comes before the first layer, L what comes after the last.

    A node between two layers goes with the one before it. What lies between the layers and the first m goes with that m.
    """
    at = [i for i, node in enumerate(chain) if node.is_layer]
    after = at[-1] + 1 if at else len(chain) - 1
    ahead = [i for i, node in enumerate(chain) if node.mtp]
    layout.check(len(at), len(layout.stages), len(ahead))
    blocks = {"E": chain[: at[0]] if at else chain[:-1], "L": chain[ahead[-1] + 1 if ahead else after :]}
    first = [after, *ahead[1:]] if ahead else []
    predicted = iter([tuple(chain[i : end + 1]) for i, end in zip(first, ahead, strict=True)])
    ends = [*at[1:], at[-1] + 1] if at else []
    layers = iter([tuple(chain[i:end]) for i, end in zip(at, ends, strict=True)])
    out = []
    for letters in layout.stages:
        nodes: list[Node] = []
        for letter in letters:
            nodes += next(layers) if letter == "t" else next(predicted) if letter == "m" else blocks[letter]
        out.append(tuple(nodes))
    return tuple(out)


def live_values(stages: Stages) -> tuple[tuple[str, ...], ...]:
    """What each stage hands to the next: values written up to it and read after it, in the order of their first write."""
    out = []
    for cut in range(1, len(stages)):
        written = dict.fromkeys(name for stage in stages[:cut] for node in stage for name in node.writes)
        wanted = {name for stage in stages[cut:] for node in stage for name in node.reads}
        out.append(tuple(name for name in written if name in wanted))
    return (*out, ())
