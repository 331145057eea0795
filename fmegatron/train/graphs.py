"""A train step recorded once for each set of shapes, as a CUDA graph, and replayed: its launches no longer wait for the host.

    step = Graphed(make_step(model, tx, sh, donate=True), CudaGraphs())
    state, metrics = step(state, batch)

    calls 1 to warm_up     the step itself, on the stream of the recording: it compiles, tunes, and fills caches
    the next call          is recorded, which runs nothing, and replayed
    all later calls        inputs to where the recording reads them, replay, metrics out of where it wrote them

State goes in and comes out as ever, but it lies in buffers that all recordings share. The tensors of the first state that is
recorded become them, in place of copies of them: it is donated. A recording ends with writing the new state over them, which
copies no more than what the step did not write in place. What a call returns are views of the buffers; given to the next
call they cost nothing, and any other state (of a checkpoint, say) is copied into them. As with a donating step, the tensors of
a state that was given are empty afterwards. A batch and limits have buffers by recording; metrics are copied out, because the
next replay writes over them.

Recordings share one pool of memory: a replay may write over what another one left there, and nothing is left there that is
read later. A step is replayed on the stream of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.config import ConfigError, RunConfig
from fmegatron.models import Model
from fmegatron.sharding import Sharding
from fmegatron.train.clock import Mark, unmarked
from fmegatron.train.microbatches import Batches
from fmegatron.train.remat import parse_remat
from fmegatron.train.state import TrainState, check_there
from fmegatron.tree import Tree

Metrics = dict[str, Tensor]
Run = Callable[[], Any]


class Backend(Protocol):
    """What records. pool_bytes: of memory that recordings hold beside their inputs."""

    def warm_up(self, run: Run) -> Any:
        """`run()`, where it will be recorded."""

    def capture(self, run: Run) -> tuple[Any, Callable[[], None]]:
        """What `run()` returns, its values undefined, and a function that runs it again on the same memory.

        Raises RuntimeError where run reads a value on the host, or does what cannot be recorded otherwise.
        """

    def pool_bytes(self) -> int: ...


class CudaGraphs:
    """torch.cuda.CUDAGraph, all of them in one pool."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Run) -> Any:
        """`run()` on the stream of captures."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            out = run()
        here.wait_stream(self.stream)
        return out

    def capture(self, run: Run) -> tuple[Any, Callable[[], None]]:
        """See Backend. Other threads (that read batches) may go on with what they do."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            out = run()
        return out, graph.replay

    def pool_bytes(self) -> int:
        """Bytes of the pool's segments."""
        segments = torch.cuda.memory_snapshot()
        return sum(x["total_size"] for x in segments if tuple(x.get("segment_pool_id", ())) == tuple(self.pool))


@dataclass(frozen=True)
class Recording:
    """A recorded step: what it reads beside the state, what it writes, and how it is run again."""

    inputs: list[Tensor]
    metrics: Metrics
    replay: Callable[[], None]


class Graphed:
    """`step` by recordings of it, one for each set of shapes, dtypes, names of limits and statistics that are watched.

    step: of `make_step(..., donate=True)`. say: told of each recording, and of the memory that all of them hold. Raises
    ValueError where a step cannot be recorded, and for a state that was given away.
    """

    def __init__(
        self, step: Callable[..., Any], backend: Backend, *, warm_up: int = 3, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.step, self.backend, self.warm_up, self.say = step, backend, warm_up, say
        self.state: TrainState | None = None  # the buffers
        self.calls: dict[Hashable, int] = {}  # before a recording
        self.recordings: dict[Hashable, Recording] = {}

    def __call__(
        self, state: TrainState, batch: Batches, limits: Mapping[str, float] | None = None, clock: int | None = None,
        watch: frozenset[str] = frozenset(), mark: Mark = unmarked,
    ) -> tuple[TrainState, Metrics]:
        """The step. mark: of a replay, "step" alone: its parts cannot be told apart. clock: of no use, replicas do not meet."""
        check_there(state)
        limits, data = dict(limits or {}), dict(batch) if isinstance(batch, Mapping) else [dict(one) for one in batch]
        key = (shapes(state), shapes(data), tuple(sorted(limits)), watch)
        if key not in self.recordings:
            if self.calls.setdefault(key, 0) < self.warm_up:
                self.calls[key] += 1
                new, metrics = self.backend.warm_up(lambda: self.step(state, data, limits, clock, watch, mark))
                own = places(leaves(new))  # it may become the buffers: a number that lies there would change with them
                return new, {name: x.clone() if place(x) in own else x for name, x in metrics.items()}
            self.recordings[key] = self._record(state, data, limits, watch)
        recording = self.recordings[key]
        self._take(state)
        write(recording.inputs, [*leaves(data), *(limits[name] for name in sorted(limits))])
        recording.replay()
        mark("step")
        return self._views(), {name: x.clone() for name, x in recording.metrics.items()}

    def _record(self, state: TrainState, batch: Tree, limits: Mapping[str, float], watch: frozenset[str]) -> Recording:
        if self.state is None or shapes(self.state) != shapes(state):
            self.recordings.clear()  # of another state
            self.state = apart(state)
        held = leaves(self.state)
        device, dtype = held[0].device, torch.promote_types(leaves(state.params)[0].dtype, torch.float32)
        data = tree.map(lambda x: x.to(device, copy=True, memory_format=torch.contiguous_format), batch)
        most = {name: torch.full((), limits[name], dtype=dtype, device=device) for name in sorted(limits)}

        def run() -> Metrics:
            with torch.no_grad():
                new, metrics = self.step(self._views(), data, most, None, watch)
                write(held, leaves(new))
            return dict(metrics)

        try:
            metrics, replay = self.backend.capture(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"this step cannot be recorded as a graph (training.graphs): {why}") from error
        recording = Recording([*leaves(data), *most.values()], metrics, replay)
        held_bytes = self.backend.pool_bytes() / 1e9
        self.say(f"recorded the step as a graph, number {len(self.recordings) + 1}; their pool holds {held_bytes:.2f} GB")
        return recording

    def _views(self) -> TrainState:
        views: TrainState = tree.map(lambda x: x.detach(), self.state)
        return views

    def _take(self, state: TrainState) -> None:
        """A state's values into the buffers; its own tensors are emptied."""
        write(leaves(self.state), leaves(state))
        for x in tree.to_paths(state).values():
            x.set_()


def leaves(values: Tree) -> list[Tensor]:
    """The tensors of a tree."""
    return tree.leaves(values)


def shapes(values: Tree) -> Hashable:
    """What tells one recording's inputs from another's: structure, shapes and dtypes."""
    found, spec = tree.flatten(values)
    return spec, tuple((x.shape, x.dtype) for x in found)


def write(into: Sequence[Tensor], values: Sequence[Tensor | float]) -> None:
    """Copy values into tensors. A value may be the very tensor, which costs nothing, or lie in another one of them."""
    own = places(into)
    moving: list[tuple[Tensor, Tensor | float]] = []
    for x, y in zip(into, values, strict=True):
        if not isinstance(y, Tensor):
            moving.append((x, y))
        elif not same(x, y):
            moving.append((x, y.clone() if place(y) in own else y))
    for x, y in moving:
        if isinstance(y, Tensor):
            x.copy_(y, non_blocking=True)
        else:
            x.fill_(y)


def place(x: Tensor) -> int:
    """Where a tensor's memory is."""
    return x.untyped_storage().data_ptr()


def places(tensors: Sequence[Tensor]) -> set[int]:
    """Where tensors' memory is."""
    return {place(x) for x in tensors if x.numel()}


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are one in memory."""
    return x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype and x.device == y.device


def apart(state: TrainState) -> TrainState:
    """The state's own memory, of which each leaf has its own: what two of them share is copied."""
    seen: set[int] = set()

    def own(x: Tensor) -> Tensor:
        shared = place(x) in seen or not x.is_contiguous()
        seen.add(place(x))
        return x.detach().clone(memory_format=torch.contiguous_format) if shared else x.detach()

    held: TrainState = tree.map(own, state)
    return held


# -- of a run -------------------------------------------------------------------------------------------------------
def check(c: RunConfig, sh: Sharding) -> None:
    """ConfigError, in one line, where a run has no graphs, or its step is decided on the host while it runs."""
    mesh = sh.mesh
    reasons = (
        (mesh.stacked, f"a {mesh.kind} mesh runs all ranks in one process, drop mesh.virtual"),
        (torch.device(mesh.device).type != "cuda", f"graphs are CUDA's, and this run is on {mesh.device}: leave it out"),
        (c.mesh.pp > 1, f"stages of a pipeline (mesh.pp = {c.mesh.pp}) wait for each other on the host, use mesh.pp = 1"),
        (bool(c.semisync.params), "when replicas meet (semisync.params) is decided on the host, use plain data parallelism"),
        (not c.training.donate, "a graph writes over the state that it was recorded with, set training.donate = true"),
        (parse_remat(c.training.remat).held is not None, f"with remat = {c.training.remat} host memory is part of a step, "
         "use none, full or selective"),
        (sh.rules.dispatch == "ragged", "rows go to experts by counts that the host reads, use dispatch = padded"),
    )
    for holds, why in reasons if c.training.graphs else ():
        if holds:
            raise ConfigError(f"training.graphs = true: {why}")


def check_model(c: RunConfig, model: Model, compiled: bool) -> None:
    """ConfigError where an eager block of the model reads values on the host."""
    if c.training.graphs and not compiled and getattr(model.config, "moe", None) is not None:
        said = "experts of an eager step are given rows by counts that the host reads"
        raise ConfigError(f"training.graphs = true: {said}, set training.compile = true")
