"""Ranks that do something together and fail together: an error of one is raised on all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
S = TypeVar("S")
Group = dist.ProcessGroup | None


def gloo() -> Group:
    """A group of all ranks that sends what lies in host memory; every rank calls this."""
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo")


def is_first(group: Group = None) -> bool:
    """Whether this process is the group's first rank, or alone."""
    return not dist.is_initialized() or dist.get_rank(group) == 0


def share(group: Group = None) -> slice:
    """This rank's share of a list of work."""
    return slice(dist.get_rank(group), None, dist.get_world_size(group)) if dist.is_initialized() else slice(None)


def on_first(fn: Callable[[], T], group: Group = None) -> T:
    """Run `fn` on the first rank alone; every rank returns its value or raises its error. Also a barrier."""
    return together(lambda: None, lambda _: fn(), group)


def together(each: Callable[[], S], first: Callable[[list[S]], T], group: Group = None) -> T:
    """`each` on every rank, then `first` of all their values on the first; every rank returns what that returns.

    The first error, by rank, is raised on every rank.
    """
    if not dist.is_initialized():
        return first([each()])
    mine = _attempt(each)
    answer: list[Any] = [None]
    gathered: list[Any] | None = [None] * dist.get_world_size(group) if is_first(group) else None
    dist.gather_object(mine, gathered, group=group, group_dst=0)
    if gathered is not None:
        failure = next((error for _, error in gathered if error is not None), None)
        answer = [(None, failure) if failure else _attempt(lambda: first([value for value, _ in gathered]))]
    dist.broadcast_object_list(answer, group=group, group_src=0)
    value, failure = answer[0]
    if failure is not None:
        raise failure
    return value


def _attempt(fn: Callable[[], Any]) -> Any:
    try:
        return fn(), None
    except BaseException as error:
        return None, _portable(error)


def _portable(error: BaseException) -> BaseException:
    """The error, or one that says the same where it cannot be sent: not every class of exception survives pickling."""
    try:
        return pickle.loads(pickle.dumps(error)) and error
    except Exception:
        kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
        return kind(f"{type(error).__name__}: {error}")
