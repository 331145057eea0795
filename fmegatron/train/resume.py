"""How a run takes up a state: its own last good checkpoint, else that of another run, whole or its parameters only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmegatron import config as configs
from fmegatron import toml, tree
from fmegatron.config import ConfigError, RunConfig
from fmegatron.models.model import Model
from fmegatron.sharding import Sharding
from fmegatron.train import checkpoint, remote, saving
from fmegatron.train.node_local import find_local, load_local
from fmegatron.train.state import TrainState
from fmegatron.train.steps import step_of
from fmegatron.train.together import gloo
from fmegatron.tree import Tree


@dataclass(frozen=True)
class Resume:
    """What is needed to take up a state; `init(params)` makes a new one, from parameters or (None) drawn from the seed."""

    config: configs.Checkpoint
    folder: Path | str
    model: Model
    sh: Sharding
    init: Callable[[Tree], TrainState]
    plain: Any  # the model's config as JSON gives it back
    say: Callable[[str], None]
    local: Path | None = None  # on this node's own disk

    def __call__(self) -> tuple[TrainState, dict[str, Any]]:
        """The state to train from: the folder's newest good checkpoint, else `checkpoint.resume`, else a new one; its meta."""
        c, fresh = self.config, self.init(None)
        found, said = checkpoint.newest_good(self.folder, verify=c.verify)
        own = found is not None
        if found is None and c.resume:
            found, said = checkpoint.newest_good(c.resume, verify=c.verify)
            found = checkpoint.find(c.resume) if found is None else found
        for line in said:
            self.say(line)
        near = find_local(self.local, group=gloo()) if self.local is not None else None
        if near is not None and self.local is not None and (found is None or not own or near.step > (step_of(found.name) or 0)):
            store = near.manifest(self.local)
            self._same_model(store.folder, store.meta)
            state = tree.map(saving.own_memory, fresh)
            load_local(self.local, saving.items(self.model, self.sh, state, copies=True), found=near, group=gloo())
            self.say(f"resumed at step {saving.steps_so_far(state)} from the nodes' own disks, {self.local}")
            return state, store.meta
        if found is None:
            return fresh, {}
        meta = checkpoint.read_meta(found)
        self._same_model(found, meta)
        options: dict[str, Any] = {"strict": c.strict, "say": self.say, "verify": False}
        if c.load == "params" and not own:
            params = saving.load_params(found, self.model, self.sh, start=fresh.params, **options)
            self.say(f"starts from the parameters of {found}")
            return self.init(params), {}
        if meta.get("holds") == "params":
            raise ConfigError(
                f"{found} holds parameters only: resume from an earlier step, or start a new --run.dir from it with "
                f"--checkpoint.resume {found} --checkpoint.load params"
            )
        state = saving.load(found, self.model, self.sh, fresh, **options)
        self.say(f"resumed at step {saving.steps_so_far(state)} from {found}")
        return state, meta

    def _same_model(self, found: Path | str, meta: dict[str, Any]) -> None:
        """One line where a checkpoint's model is another one."""
        old, new = meta.get("model"), self.plain
        changed = [name for name in new or {} if old and old.get(name, new[name]) != new[name]]
        if changed and self.config.strict == "both":
            name = changed[0]
            raise ConfigError(
                f"{found} has a model of {name} = {old[name]}, this run's is {new[name]}: "  # type: ignore[index]
                "use another --run.dir, or start over with --run.fresh true"
            )


def config_of(source: str, table: toml.Table) -> RunConfig:
    """The configuration that a checkpoint, or a run's folder, was written with; `table` (the command line) over it.

    One step goes on in the folder of its run only where it is the last one: elsewhere --run.dir names a new one.
    """
    path = Path(source)
    inner = path / "checkpoints"
    found = checkpoint.find(inner if not remote.is_remote(source) and inner.is_dir() else source)
    text = checkpoint.read_meta(found).get("config")
    if not text:
        raise ConfigError(f"{found} says no configuration: name a file, and --checkpoint.resume {found}")
    run = toml.update(RunConfig(), toml.loads(text, {}), str(found))
    run = toml.update(run, table, "command line")
    last = checkpoint.latest(found.parent)
    if Path(found).resolve().parent == (run.run.folder / "checkpoints").resolve() and found != last:
        raise ConfigError(f"{found} is not the last of its run: name a new --run.dir to branch off from it")
    own = {} if run.checkpoint.resume and "resume" in table.get("checkpoint", {}) else {"resume": str(found)}
    return toml.update(run, {"checkpoint": own}, str(found))
