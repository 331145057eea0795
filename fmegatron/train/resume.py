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

LEARNING = ("model", "data", "training", "fp8", "optimizer", "semisync")  # groups that say what is learned, and how


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


def steps_of(source: str) -> Path | remote.Url:
    """Where the steps lie that a run's folder means; an address, a folder of steps or one step is itself."""
    if remote.is_remote(source):
        return remote.Url(source)
    path = Path(source)
    settings = path / "config.toml"
    said = toml.read(settings).get("checkpoint", {}).get("folder") if settings.is_file() else None
    inner = path / "checkpoints"
    return (remote.Url(said) if remote.is_remote(said) else Path(said)) if said else inner if inner.is_dir() else path


def config_of(source: str, table: toml.Table) -> RunConfig:
    """The configuration that a checkpoint, or a run's folder, was written with; `table` (the command line) over it.

    The run goes on in the folder where it lies, from its last step; from another step, --run.dir names a new one. Raises
    ConfigError where the run would not start from what `source` names.
    """
    steps = steps_of(source)
    found, _ = checkpoint.newest_good(steps, verify=False)
    found = checkpoint.find(steps) if found is None else found
    text = checkpoint.read_meta(found).get("config")
    if not text:
        raise ConfigError(f"{found} says no configuration: name a file, and --checkpoint.resume {found}")
    run = toml.update(RunConfig(), toml.loads(text, {}), str(found))
    home = found.parent.parent
    if not remote.is_remote(found) and found.parent.name == "checkpoints" and (Path(home) / "config.toml").is_file():
        run = toml.update(run, {"run": {"dir": str(home)}}, str(found)) if "name" not in table.get("run", {}) else run
    run = toml.update(run, table, "command line")
    if "resume" in table.get("checkpoint", {}):
        return run
    own, _ = checkpoint.newest_good(run.checkpoints, verify=False)
    if own is not None and _where(own) != _where(found) and not _branch(own, found):
        new = "--checkpoint.folder" if run.checkpoint.folder else "--run.dir"
        line = f"{found} is not the last of its run: name a new {new} to branch off from it"
        if _where(own.parent) != _where(found.parent):
            line = f"{run.checkpoints} has steps of its own, the last is {own.name}: name a new {new} to start from {found}"
        raise ConfigError(line)
    return toml.update(run, {"checkpoint": {"resume": str(found)}}, str(found))


def changes(saved: str | None, c: RunConfig) -> str:
    """One line on what a run learns otherwise than its checkpoint's configuration (TOML) says; empty where nothing."""
    if not saved:
        return ""
    default, old, new = (toml.loads(text, {}) for text in (toml.dumps(RunConfig()), saved, toml.dumps(c)))
    said = []
    for group in LEARNING:
        now, before = new[group], default[group] | old.get(group, {})  # which may be older than the setting
        said += [f"{group}.{key} = {toml.format_value(now.get(key))}, was {toml.format_value(before.get(key))}"
                 for key in before | now if now.get(key) != before.get(key)]
    return f"other settings than before: {'; '.join(said)}" if said else ""


def _where(address: checkpoint.Address) -> str:
    return address.rstrip("/") if isinstance(address, remote.Url) else str(Path(address).resolve())


def _branch(own: checkpoint.Address, found: checkpoint.Address) -> bool:
    """Whether a run's own checkpoint is of a run that began from this one: the same command again."""
    return toml.loads(checkpoint.read_meta(own).get("config") or "", {}).get("checkpoint", {}).get("resume") == str(found)
