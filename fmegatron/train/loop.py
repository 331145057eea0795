"""A training run from its configuration: set up, resume, train, evaluate, save, and say what came out.

    run(config)

    DIR/config.toml        the run, as it can be run again          DIR/checkpoints/      the state, see checkpoint.py
    DIR/metrics.jsonl      one object a step, see metrics.py        DIR/loss.png          the loss curve
    DIR/tokenizer.json     what turns the model's tokens to text    DIR/sample.txt        text that the model wrote

The same run with the same folder goes on from its last checkpoint. Only the first process writes and speaks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fmegatron import toml
from fmegatron.config import RunConfig
from fmegatron.data.batches import batches, held_out_batches
from fmegatron.data.place import reading, shards_of
from fmegatron.models import Model
from fmegatron.sharding import Mesh, Sharding
from fmegatron.train import checkpoint, metrics, report, saving, setup
from fmegatron.train.book import Book
from fmegatron.train.evaluate import held_out, make_evaluate
from fmegatron.train.progress import progress
from fmegatron.train.replicas import make_check
from fmegatron.train.resume import Resume
from fmegatron.train.saver import Saver
from fmegatron.train.signals import any_rank, stop_on_signals
from fmegatron.train.source import Source, source_of, tokenizer_file
from fmegatron.train.state import TrainState, init
from fmegatron.train.step import make_step
from fmegatron.tree import Tree

Sampler = Callable[[Path, str], str]  # (checkpoint, prompt) -> text
OURS = ("config.toml", "metrics.jsonl", "tokenizer.json", "loss.png", "sample.txt", "checkpoints", "tensorboard")
EVALUATED = 8192  # tokens of held-out text at once, where a training batch has fewer


def run(config: RunConfig, sample: Sampler | None = None) -> None:
    """Train as `config` says, or go on with what its folder holds; `sample` writes the text of the end.

    Raises ValueError (one line) for what cannot be done. Ctrl-C and SIGTERM end the step, save, and return.
    """
    with ExitStack() as stack:
        mesh = stack.enter_context(setup.running(config.mesh))
        stack.enter_context(setup.deterministic(config.training.deterministic))
        trainer = _set_up(config, mesh)
        trainer.say(trainer.describe())
        state = trainer.start()
        state, finished = trainer.train(state)
    trainer.close(state, finished, None if dist.is_initialized() else sample)  # the first process alone


@dataclass(frozen=True)
class Trainer:
    """The parts of a run: values and functions, made once. Its methods are the chapters of the run."""

    config: RunConfig
    folder: Path
    first: bool  # whether this process writes and speaks
    say: setup.Say
    sh: Sharding
    source: Source
    model: Model
    start: Callable[[], TrainState]
    plain: Any  # the model's config as JSON gives it back
    step: Callable[..., Any]
    compiled: bool
    evaluate: Callable[..., Any]
    check: Callable[[Any], None]
    schedule: setup.Schedule

    @property
    def checkpoints(self) -> str | Path:
        """The folder of checkpoints, or the address of a bucket."""
        return _checkpoints(self.config)

    @property
    def _reading(self) -> dict[str, Any]:
        """How this process reads batches: its own rows, to where they belong."""
        drop = () if self.config.data.document_mask else ("documents",)
        return reading(self.sh) | {"drop": drop}

    def describe(self) -> str:
        """What will run, in one line."""
        c, mesh = self.config, self.sh.mesh
        name = c.model.hf or c.model.function or c.model.preset
        axes = " ".join(f"{axis.name}={axis.size}" for axis in mesh.axes if axis.size > 1) or "one device"
        how = f"{mesh.kind} mesh {axes}, rules {self.sh.rules.name}" if mesh.size > 1 else axes
        precision = f"{c.training.dtype}, {'compiled' if self.compiled else 'eager'}"
        return f"{name}: {self.model.count() / 1e6:.2f}M parameters; {how} ({mesh.device}), {precision}; {self.folder}"

    def _meta(self) -> dict[str, Any]:
        meta = {"config": toml.dumps(self.config), "tokenizer": tokenizer_file(self.source)}
        return meta | {"model": self.plain}

    # -- train ------------------------------------------------------------------------------------------------------
    def train(self, state: TrainState) -> tuple[TrainState, bool]:
        """Steps until all are done or somebody asks to stop; the state, and whether all are done."""
        c = self.config
        done, steps = saving.steps_so_far(state), c.training.steps
        saved = done if checkpoint.latest(self.checkpoints) is not None else -1
        with ExitStack() as stack:
            show: Any = stack.enter_context(progress(steps, start=done, every=c.log.every)) if self.first else None
            stop = stack.enter_context(stop_on_signals())
            book = Book(
                [show, *self._writers(stack, done)] if show is not None else [],
                self.sh.mesh,
                batch=c.training.global_batch,
                seq=c.data.seq,
                flops=setup.flops_of(self.model, c.data.seq, c.training.global_batch),
                schedule=self.schedule,
                precision=c.training.dtype,
            )
            feed = batches(
                self.source.rows,
                c.training.global_batch,
                int(state.consumed.flatten()[0]),
                **self._reading,
            )
            stack.callback(feed.close)
            saver = stack.enter_context(Saver(self._write, background=c.checkpoint.background))
            while done < steps and not any_rank(stop.requested, device=self.sh.mesh.device):
                state, numbers = self.step(state, next(feed))
                done += 1
                self._note(show, saver.check())
                if _due(done, c.training.check_replicas):
                    self.check(state.params)
                measured = _due(done, c.validation.interval) or done == steps
                book.add(done, numbers, partial(self._measure, state, whole=done == steps) if measured else None)
                if _due(done, c.checkpoint.interval) and done < steps:
                    book.write()
                    self._note(show, self.save(saver, state))
                    saved = done
                    book.restart()
            book.write()
            if done != saved:
                self._note(show, self.save(saver, state, last=done >= steps))
            self._note(show, saver.wait())
        return state, done >= steps

    def save(self, saver: Saver, state: TrainState, *, last: bool = False) -> Path | None:
        """Save a state, or begin to; what was finished. last: of a run that is done."""
        c, meta = self.config.checkpoint, self._meta()
        items = saving.items(self.model, self.sh, state)
        if last and c.last_model_only:
            items, meta = saving.params_only(items, saving.DTYPES[c.export_dtype]), meta | {"holds": "params"}
        return saver.save(items, saving.steps_so_far(state), meta)

    def _write(self, step: int, items: Any, meta: Any, group: Any) -> Any:
        c = self.config.checkpoint
        return checkpoint.save(self.checkpoints, step, items, meta, keep=c.keep, keep_every=c.keep_every, group=group)

    def _note(self, show: Any, path: Path | None) -> None:
        if show is not None and path is not None:
            show.note(f"saved {path}")

    def _writers(self, stack: ExitStack, done: int) -> list[metrics.Writer]:
        writers: list[metrics.Writer] = [metrics.JsonLines(self.folder / "metrics.jsonl", after=done)]
        if self.config.log.tensorboard:
            writers.append(metrics.TensorBoard(self.folder / "tensorboard", after=done))
        for writer in writers:
            stack.callback(writer.close)
        return writers

    def _measure(self, state: TrainState, whole: bool) -> dict[str, float]:
        """Held-out numbers, over a part of the held-out text, or all of it where compressors have read it too."""
        c = self.config
        batch = c.training.global_batch
        part = None if whole and self.source.compressors else c.validation.batches * batch
        batch *= max(1, EVALUATED // (batch * c.data.seq))
        rows = self.source.held_out(c, batch, part)
        if rows is None:
            return {}
        return held_out(self.evaluate, state.params, held_out_batches(rows, **self._reading), rows.bytes)

    # -- close ------------------------------------------------------------------------------------------------------
    def close(self, state: TrainState, finished: bool, sample: Sampler | None) -> None:
        """Say what came out, where it lies and how to go on; a picture, and text that the model wrote."""
        saved = checkpoint.latest(self.checkpoints)
        if not self.first or saved is None:
            return
        c, again = self.config, _command(self.sh.mesh, f"train {self.folder / 'config.toml'}")
        if not finished:
            self.say(f"stopped at step {saving.steps_so_far(state)}; saved {saved}\nresume  {again}")
            return
        records = metrics.read(self.folder / "metrics.jsonl")
        bits = next((r["bits_per_byte"] for r in reversed(records) if r.get("bits_per_byte")), None)
        title = f"{self.model.count() / 1e6:.1f}M parameters, {c.data.source}"
        picture = report.loss_curve(records, self.folder / "loss.png", compressors=self.source.compressors, title=title)
        text = sample(saved, c.log.prompt) if sample is not None and self.source.corpus is not None and c.log.prompt else ""
        if text:
            (self.folder / "sample.txt").write_text(text, encoding="utf-8")
        steps = c.training.steps
        self.say(
            report.closing(
                steps=steps,
                seconds=sum(float(r.get("seconds") or 0.0) for r in records),
                heldout_bits_per_byte=float(bits) if bits is not None else None,
                compressors=self.source.compressors,
                sample=text,
                checkpoint=saved,
                picture=picture,
                resume=f"{again} --training.steps {2 * steps}",
                generate=f'fmegatron generate {self.folder} "{c.log.prompt}"' if self.model.output is not None else "",
            )
        )


# -- set up -----------------------------------------------------------------------------------------------------------
def _set_up(c: RunConfig, mesh: Mesh) -> Trainer:
    first = mesh.rank in (None, 0)
    say: setup.Say = (lambda text: print(text, flush=True)) if first else (lambda text: None)
    folder = c.run.folder
    sh = Sharding(mesh, setup.rules_of(c.sharding))
    setup.check_batch(c, shards_of(sh))
    setup.check_sequence(c, sh)
    source = setup.on_first(mesh, lambda: source_of(c, say))
    model, params = setup.model_of(c, source, sh)
    c = setup.resumed(c)
    schedule = setup.schedule_of(c)
    tx = setup.optimizer_of(c, model, schedule)
    t = c.training
    dtype, compiled, pipeline = setup.dtype_of(c), setup.compiles(c, say), setup.pipeline_of(c, model)
    step = make_step(
        model,
        tx,
        sh,
        microbatches=t.microbatches,
        remat=t.remat,
        compile=compiled,
        dtype=dtype,
        prefetch=t.prefetch,
        **setup.data_axes_of(c),
        pipeline=pipeline,
        donate=t.donate and mesh.kind != "virtual",
    )
    setup.on_first(mesh, lambda: _prepare(c, folder, source) if first else None)
    plain = _json(asdict(model.config)) if is_dataclass(model.config) else None  # type: ignore[arg-type]

    def start(given: Tree) -> TrainState:
        return init(model, tx, sh, c.run.seed, params if given is None else given)

    return Trainer(
        config=replace(c, run=replace(c.run, fresh=False)),
        folder=folder,
        first=first,
        say=say,
        sh=sh,
        source=source,
        model=model,
        start=Resume(c.checkpoint, _checkpoints(c), model, sh, start, plain, say),
        plain=plain,
        step=step,
        compiled=compiled,
        evaluate=make_evaluate(model, sh, dtype=dtype, prefetch=t.prefetch, pipeline=pipeline),
        check=make_check(model, sh),
        schedule=schedule,
    )


def _prepare(c: RunConfig, folder: Path, source: Source) -> None:
    """The run's folder, with its configuration and its tokenizer; emptied of a run's files where it starts over."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in OURS if c.run.fresh else ():
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / "config.toml").write_text(toml.dumps(replace(c, run=replace(c.run, fresh=False))), encoding="utf-8")
    tokenizer = Path(tokenizer_file(source) or "")
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _command(mesh: Mesh, words: str) -> str:
    return f"torchrun --nproc-per-node {mesh.size} -m fmegatron {words}" if mesh.kind == "device" else f"fmegatron {words}"


def _checkpoints(c: RunConfig) -> str | Path:
    return c.checkpoint.folder or c.run.folder / "checkpoints"


def _json(value: Any) -> Any:
    """Plain data as JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value
