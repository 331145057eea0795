"""One executor for every schedule, over the block chain: it does what the actions say, in their order.

    F   walk the stage's nodes forward, from the batch's own values and what came from the stage before
    B   walk them backward, from the cotangents that came from the stage behind, or from the loss
    I   the same, for the cotangents of what the stage read only;  W   then the gradients of its parameters

The process does all ranks' actions, or those of its own; the transport is the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fmegatron.models.model import Node, Values
from fmegatron.train.chain import (
    Ran,
    Segment,
    Step,
    add_taps,
    backward_inputs,
    backward_visits,
    backward_weights,
    carried_of,
    walk_backward,
    walk_forward,
)
from fmegatron.train.pipeline.schedule import Action, Kind
from fmegatron.train.pipeline.stages import Placed
from fmegatron.train.pipeline.transports import Payload, Transport
from fmegatron.train.remat import Remat
from fmegatron.train.weights import Weights

NOTHING: Payload = ({}, frozenset())


@dataclass
class Flight:
    """One microbatch between its forward and the end of its backward on one stage."""

    step: Step
    tape: list[Segment]
    zeros: Values  # like what came from the stage before and depends on parameters; they hold no memory
    halves: list[Ran] = field(default_factory=list)


@dataclass
class Execution:
    """One step's actions under way."""

    placed: Placed
    parts: Sequence[Values]  # the microbatches
    new_step: Callable[[], Step]
    remat: Remat
    transport: Transport
    evaluate: Callable[[Sequence[Node], Values], Values] | None = None  # runs nodes without gradients: F alone is done
    losses: Values = field(default_factory=dict)
    taps: Values = field(default_factory=dict)
    flights: dict[tuple[int, int], Flight] = field(default_factory=dict)
    inbox: dict[Action, Callable[[], Payload]] = field(default_factory=dict)
    outbox: dict[Action, Payload] = field(default_factory=dict)
    carried: dict[int, Values] = field(default_factory=dict)  # {stage: what its last microbatch leaves the next}

    def run(self) -> None:
        """Do them all; losses and taps are then those of this process's stages."""
        for rank, action in self.placed.actions(None if self.evaluate is None else len(self.parts)):
            stage, microbatch = action.stage, action.microbatch
            shapes = _shapes(self.parts[microbatch])
            if action.kind.startswith("SEND"):
                self.transport.send(action, self.outbox.pop(action), shapes)
            elif action.kind.startswith("RECV"):
                self.inbox[action] = self.transport.receive(action, shapes)
            else:
                self.transport.flush()
                work = {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.weights}[action.kind]
                came = self.arrived(action)  # waiting is not computing
                with self.marked(rank, action):
                    work(stage, microbatch, came)
        self.transport.finish()
        assert not (self.flights or self.inbox or self.outbox), "the schedule left something undone"

    @contextmanager
    def marked(self, rank: int, action: Action) -> Iterator[None]:
        """Note when a computation starts and ends, if the pipeline is measured: on a GPU this waits for it."""
        marks = self.placed.pipeline.marks
        if marks is None:
            yield
            return
        start = _clock()
        yield
        marks.append((rank, action, start, _clock()))

    # -- computations -----------------------------------------------------------------------------------------------
    def forward(self, stage: int, microbatch: int, payload: Payload) -> None:
        """F."""
        came, moving = payload
        values, moved = {**self.parts[microbatch], **self.carried.get(stage, {}), **came}, moving
        nodes = self.placed.nodes[stage]
        if self.evaluate is not None:
            values = self.evaluate(nodes, values)
        else:
            step = self.new_step()
            values, moved, tape = walk_forward(nodes, step, values, moving, self.placed.remat(self.remat, microbatch))
            zeros = {name: came[name].new_zeros(()).expand_as(came[name]) for name in sorted(moving)}
            self.flights[stage, microbatch] = Flight(step, tape, zeros)
            self.carried[stage] = carried_of(self.placed.whole.carries, values)
            add_taps(self.taps, step.taps)
            step.taps = self.taps  # what the backward taps
        for name in values:
            if name.startswith("loss."):
                self.losses[name] = self.losses[name] + values[name] if name in self.losses else values[name]
        if stage + 1 < len(self.placed.stages):
            live = {name: values[name] for name in self.placed.live[stage] if name in values}
            self._give(Action(stage, "SEND_F", microbatch), (live, moved & live.keys()))

    def backward(self, stage: int, microbatch: int, payload: Payload) -> None:
        """B."""
        flight = self.flights[stage, microbatch]
        flight.step.cotangents.update(payload[0])
        walk_backward(flight.tape, flight.step)
        self._return(stage, microbatch, flight)
        del self.flights[stage, microbatch]

    def inputs(self, stage: int, microbatch: int, payload: Payload) -> None:
        """I."""
        flight = self.flights[stage, microbatch]
        flight.step.cotangents.update(payload[0])

        def pull(ran: Ran, step: Step, freed: bool) -> None:
            backward_inputs(ran, step, freed)
            flight.halves.append(ran)

        walk_backward(flight.tape, flight.step, pull)
        self._return(stage, microbatch, flight)

    def weights(self, stage: int, microbatch: int, payload: Payload) -> None:
        """W."""
        flight = self.flights.pop((stage, microbatch))
        while flight.halves:
            backward_weights(flight.halves.pop(0), flight.step)

    def _return(self, stage: int, microbatch: int, flight: Flight) -> None:
        """Send back the cotangents of what came."""
        if stage:
            found = {name: flight.step.cotangents.get(name, zero) for name, zero in flight.zeros.items()}
            self._give(Action(stage, "SEND_B", microbatch), (found, frozenset(found)))

    # -- between stages ---------------------------------------------------------------------------------------------
    def _give(self, action: Action, payload: Payload) -> None:
        forward = action.kind == "SEND_F"
        to = action.stage + (1 if forward else -1)
        if self.placed.schedule.rank_of[to] == self.placed.schedule.rank_of[action.stage]:
            kind: Kind = "RECV_F" if forward else "RECV_B"
            self.inbox[Action(to, kind, action.microbatch)] = lambda: payload
        else:
            self.outbox[action] = payload

    def arrived(self, action: Action) -> Payload:
        """What a computation needs of another stage, once it is here: values, or cotangents of those that were sent."""
        first, last = action.stage == 0, action.stage + 1 == len(self.placed.stages)
        if action.kind == "W" or (first if action.kind == "F" else last):
            return NOTHING
        kind: Kind = "RECV_F" if action.kind == "F" else "RECV_B"
        return self.inbox.pop(Action(action.stage, kind, action.microbatch))()


def plan_visits(placed: Placed, remat: Remat, weights: Weights, forward_only: int | None = None) -> list[Node]:
    """The order in which a step's actions ask for the nodes' parameters; what stays gathered is asked for once."""
    order: list[Node] = []
    for _, action in placed.actions(forward_only):
        if action.kind not in ("F", "B", "I", "W"):
            continue
        nodes = placed.nodes[action.stage]
        if action.kind == "F":
            order += nodes
        elif action.kind == "W":
            order += [node for node in reversed(nodes) if weights.frees(node)]
        else:
            order += backward_visits(nodes, placed.remat(remat, action.microbatch), weights)
    seen: set[int] = set()
    visits = []
    for node in order:
        if weights.keeps(node) and node.index in seen:
            continue
        seen.add(node.index)
        visits.append(node)
    return visits


def _shapes(part: Values) -> Hashable:
    return tuple((name, tuple(x.shape)) for name, x in sorted(part.items()))


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
