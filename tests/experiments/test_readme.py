"""README's trainer runs as it is printed, its commands fit each other, and its table names presets that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from fmegatron import config, toml
from fmegatron.sharding import RULES, Rules

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_trainer_runs_and_learns(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text(CODE[0])
    done = subprocess.run([sys.executable, "trainer.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.2
    assert len(CODE[0].splitlines()) <= 25


def test_the_rules_of_the_example_are_rules() -> None:
    rules = eval(CODE[1], {"fm": sys.modules["fmegatron"]})
    assert isinstance(rules, Rules) and rules.axes == {"dp", "tp"}


def test_commands_in_a_row_leave_each_other_something_to_train() -> None:
    block = re.search(r"```\n(fmegatron train.*?)```", README, re.DOTALL)
    assert block is not None
    steps: dict[Path, int] = {}
    for line in block[1].splitlines():
        command = shlex.split(line, comments=True)
        word, *rest = command[command.index("fmegatron") + 1 :]
        if word in ("train", "explain"):
            (name,), table = toml.words(rest)
            run = config.load(name, table)
        if word == "train":
            assert run.training.steps > steps.get(run.run.folder, 0), line
            steps[run.run.folder] = run.training.steps
    assert len(steps) == 2


def test_the_table_names_every_kind_of_preset() -> None:
    table = README[README.index("| preset |") : README.index("Any of them")]
    named = {name for row in table.split("\n|") for name in re.findall(r"`(\w+)`", row.lstrip("|").split("|")[0])}
    assert named <= set(RULES)
    assert {name for name in RULES if "_tp" not in name} | {"tp", "tp_sp"} <= named | {"ddp_tp", "ddp_tp_sp"}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
