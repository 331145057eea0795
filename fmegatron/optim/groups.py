"""Groups of parameters, each with a transform of its own; and transforms for some leaves only.

    multi({"matrices": muon_like, "rest": adamw(1e-3)}, [("embed.*", "rest"), ("*norm*", "rest"), ("*", "matrices")])
    masked(add_decayed_weights(0.1), lambda path, leaf: leaf.dim() > 1)

Labels: a list of (pattern, label), the first that fits a path (`*`, `?`, `[]` as in a shell); a function (path, leaf) ->
label; or a tree of labels. The state is {label: state of its transform on its leaves}, with the leaves' own paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from fmegatron import tree
from fmegatron.optim.base import LOCAL, Over, Transform, Tree, chain

Labels = Sequence[tuple[str, str]] | Callable[[str, Any], str] | Tree


@dataclass(frozen=True)
class Groups:
    """The form of `multi`: what `fuse` looks into, to run each group in a pass of its own."""

    transforms: Mapping[str, Transform]
    labels: Labels

    def split(self, params: Tree, *trees: Tree) -> dict[str, tuple[Tree, ...]]:
        """{label: (its part of params, of each tree)}: nested dicts of its leaves by path."""
        of, every = labelled(self.labels, params, tuple(self.transforms)), [tree.to_paths(x) for x in (params, *trees)]
        return {name: tuple(tree.from_paths({path: x[path] for path in of if of[path] == name}) for x in every)
                for name in self.transforms}


def join(parts: Sequence[Tree], like: Tree) -> Tree:
    """One tree of the structure of `like` from its parts: the inverse of `split`."""
    of = {path: x for part in parts for path, x in tree.to_paths(part).items()}
    return tree.map_with_path(lambda path, _: of[path], like)


def multi(transforms: Mapping[str, Transform], labels: Labels) -> Transform:
    """The transform of each leaf's label; ValueError where a leaf has none or an unknown one."""
    groups = Groups(dict(transforms), labels)

    def init(params: Tree) -> Tree:
        parts = groups.split(params)
        return {name: tx.init(parts[name][0]) for name, tx in groups.transforms.items()}

    def update(grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL) -> tuple[Tree, Tree]:
        done = {name: groups.transforms[name].update(g, state[name], own, over=over)
                for name, (own, g) in groups.split(params, grads).items()}
        return join([u for u, _ in done.values()], params), {name: new for name, (_, new) in done.items()}

    return Transform(init, update, groups)


def masked(tx: Transform, mask: Callable[[str, Any], bool] | Tree) -> Transform:
    """tx on the leaves of the mask; the updates of the others pass as they are."""
    of = {} if callable(mask) else tree.to_paths(mask)

    def label(path: str, leaf: Any) -> str:
        return "on" if (mask(path, leaf) if callable(mask) else of[path]) else "off"

    return multi({"on": tx, "off": chain()}, label)


def freeze() -> Transform:
    """Updates of zero."""
    def update(grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL) -> tuple[Tree, Tree]:
        return tree.map(torch.zeros_like, params), state

    return Transform(lambda params: {}, update)


def labelled(labels: Labels, params: Tree, known: Sequence[str]) -> dict[str, str]:
    """{path: label} of the leaves of params; ValueError in one line where a leaf's label is not among the known ones."""
    if isinstance(labels, list | tuple):
        found = {path: next((label for pattern, label in labels if fnmatchcase(path, pattern)), None)
                 for path in tree.to_paths(params)}
    elif callable(labels):
        found = {path: labels(path, leaf) for path, leaf in tree.to_paths(params).items()}
    else:
        of = tree.to_paths(labels)
        found = {path: of.get(path) for path in tree.to_paths(params)}
    for path, label in found.items():
        if label is None:
            raise ValueError(f"{path} fits no pattern of the groups: end them with ('*', LABEL)")
        if label not in known:
            raise ValueError(f"{path} has the label {label!r}, and there are groups {', '.join(known)} only")
    return {path: label for path, label in found.items() if label is not None}
