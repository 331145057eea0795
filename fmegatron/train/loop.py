"""A training run from its configuration: set up, resume, train, evaluate, save, and say what came out.

    run(config)

    DIR/config.toml        the run, as it can be run again          DIR/checkpoints/      the state, see checkpoint.py
    DIR/metrics.jsonl      one object a step, see metrics.py        DIR/loss.png          the loss curve
    DIR/tokenizer.json     what turns the model's tokens to text    DIR/sample.txt        text that the model wrote
    DIR/run.json           the machine, the mesh, each session      DIR/report.html       all of it on one page

The same run with the same folder goes on from its last checkpoint. Only the first process writes and speaks.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fmegatron import toml
from fmegatron.config import RunConfig
from fmegatron.data.batches import batches
from fmegatron.files import write_atomically
from fmegatron.train import balance, checkpoint, facts, saving, setup
from fmegatron.train.assemble import Parts, assemble
from fmegatron.train.book import Book, Feed
from fmegatron.train.closing import Sampler, close
from fmegatron.train.faults.guard import Guard, beating, watched
from fmegatron.train.faults.watch import from_json
from fmegatron.train.garbage import collecting
from fmegatron.train.meeting import settled
from fmegatron.train.meter import Meter
from fmegatron.train.node_local import place_of_run, save_local
from fmegatron.train.optimizers import numbers_of
from fmegatron.train.profile import Traces
from fmegatron.train.progress import progress
from fmegatron.train.resume import changes
from fmegatron.train.saver import Saver
from fmegatron.train.setup_batch import sizes_of
from fmegatron.train.signals import stop_on_signals
from fmegatron.train.state import TrainState
from fmegatron.train.together import Group, gloo
from fmegatron.train.validate import measure
from fmegatron.train.writers import writers


def run(config: RunConfig, sample: Sampler | None = None) -> None:
    """Train as `config` says, or go on with what its folder holds; `sample` writes the text of the end.

    Raises ValueError (one line) for what cannot be done. Ctrl-C and SIGTERM end the step, save, and return.
    """
    with ExitStack() as stack:
        pulse, launches = stack.enter_context(beating(config))
        mesh = stack.enter_context(setup.running(config.mesh))
        stack.enter_context(setup.deterministic(config.training.deterministic))
        parts = assemble(config, mesh := watched(mesh, config, launches))
        parts.say(parts.describe())
        started = time.time()
        meter = Meter(parts.config.monitors, parts.step, mesh.device)
        guard = stack.enter_context(Guard(parts.config, parts.folder, mesh, pulse, launches, meter, parts.say))
        state, meta = parts.start()
        if other := changes(meta.get("config"), parts.config):
            parts.say(other)
        if parts.first:  # a command that cannot go on with what is here has left it as it was
            write_atomically(parts.folder / "config.toml", toml.dumps(parts.config))
            facts.begin(parts.folder, started, **parts.facts)
        guard.watch = from_json(meta.get("watch"))
        state, end = train(parts, guard, meter, state)
        while end == "rollback":
            bad = _consumed(state)
            del state
            state, meta = parts.start()
            guard.past(bad, state, from_json(meta.get("watch")))
            state, end = train(parts, guard, meter, state, mark=True)
    close(parts, state, end, None if dist.is_initialized() else sample)  # the first process alone


def train(
    parts: Parts, guard: Guard, meter: Meter, state: TrainState, *, mark: bool = False
) -> tuple[TrainState, str | None]:
    """Steps until all are done or somebody asks to stop; the state, and why it ended before all were done ("rollback": bad).

    mark: save at once, because the checkpoint that it comes from does not know which samples are left out.
    """
    c, sizes = parts.config, sizes_of(parts.config)
    done, steps = saving.steps_so_far(state), c.training.steps
    saved = done if checkpoint.latest(parts.checkpoints) is not None else -1
    with ExitStack() as stack:
        show: Any = stack.enter_context(progress(steps, start=done, every=c.log.every)) if parts.first else None
        stop = stack.enter_context(stop_on_signals())
        book = Book(
            [show, *writers(parts, stack, done)] if show is not None else [],
            parts.sh.mesh,
            consumed=_consumed(state),
            seq=c.data.seq,
            flops=setup.flops_of(parts.model, c.data.seq, 1),
            numbers=numbers_of(c),
            precision=c.training.dtype,
            past=facts.past(parts.folder) if parts.first else None,
        )
        guard.begin(done)
        rows, size = guard.rows(parts.source.rows), None if c.data.step_tokens else sizes.at
        how = {"ahead": c.data.ahead, "workers": c.data.workers, **parts.reading}
        feed = Feed(parts.sh, batches(rows, size, _consumed(state), **how))
        stack.callback(feed.close)
        near = gloo() if c.local.folder else None
        saver = stack.enter_context(Saver(partial(_write, parts), partial(_items, parts), background=c.checkpoint.background))
        if mark:
            save(parts, guard, saver, state)
            _note(show, saver.wait())
        collect = stack.enter_context(collecting(c.training.collect))
        traces = stack.enter_context(Traces(c.profile, parts.folder / "traces", parts.sh.mesh))
        while done < steps and not guard.stops(stop, done):
            meter.begin(done + 1)
            traces.begin(done + 1)
            outcome = guard.step(state, feed, done + 1)
            state = outcome.state
            if outcome.then == "elsewhere":
                _note(show, save(parts, guard, saver, state) or saver.wait())
                raise guard.elsewhere()
            if outcome.then == "rollback":
                return state, "rollback"
            done += 1
            _note(show, saver.check())
            if _due(done, c.training.check_replicas):
                parts.check(state.params)
            measured = _due(done, c.validation.interval) or done == steps
            more = partial(measure, parts, state, whole=done == steps) if measured else None
            book.add(done, feed.taken, balance.numbers(outcome.numbers), meter.clock, more)
            if _due(done, c.checkpoint.interval) and done < steps:
                book.write()
                _note(show, save(parts, guard, saver, state))
                saved = done
                book.restart("checkpoint")
            elif c.local.folder and _due(done, c.local.interval) and done < steps:
                book.write()
                save_near(parts, guard, state, near)
                book.restart("checkpoint")
            collect(done)
        book.write()
        if done != saved:
            _note(show, save(parts, guard, saver, state, last=done >= steps))
        _note(show, saver.wait())
    return state, None if done >= steps else guard.why


def save(parts: Parts, guard: Guard, saver: Saver, state: TrainState, *, last: bool = False) -> Path | None:
    """Save a state, or begin to; what was finished. last: of a run that is done."""
    guard.pulse.at("save")
    c, meta, step = parts.config.checkpoint, _meta(parts, guard), saving.steps_so_far(state)
    state = state._replace(outer=settled(parts.sh, state.outer))
    if last and c.last_model_only:
        only = partial(saving.params_only, dtype=saving.DTYPES[c.export_dtype])
        return saver.save(state, step, meta | {"holds": "params"}, only)
    return saver.save(state, step, meta)


def save_near(parts: Parts, guard: Guard, state: TrainState, group: Group) -> None:
    """Save a state on the nodes' own disks."""
    guard.pulse.at("save on the node's disk")
    folder, nodes = place_of_run(parts.config)
    state = state._replace(outer=settled(parts.sh, state.outer))
    save_local(folder, saving.steps_so_far(state), _items(parts, state), _meta(parts, guard), nodes, group=group)


def _items(parts: Parts, state: TrainState) -> dict[str, Any]:
    return saving.of_stages(saving.items(parts.own, parts.own_sh, state), parts.placed)


def _meta(parts: Parts, guard: Guard) -> dict[str, Any]:
    return parts.meta | {"watch": guard.watch.as_json()}


def _write(parts: Parts, step: int, items: Any, meta: Any, group: Any) -> Any:
    c = parts.config.checkpoint
    return checkpoint.save(parts.checkpoints, step, items, meta, keep=c.keep, keep_every=c.keep_every, group=group)


def _note(show: Any, path: Path | None) -> None:
    if show is not None and path is not None:
        show.note(f"saved {path}")


def _consumed(state: TrainState) -> int:
    return int(state.consumed.flatten()[0])


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
