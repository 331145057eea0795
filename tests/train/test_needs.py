"""Settings that do nothing by themselves: every key of a configuration is listed, with what it needs, or as one that needs
nothing; each that is set in vain is named."""

from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from fmegatron import toml
from fmegatron.config import SHIPPED, ConfigError, RunConfig, load
from fmegatron.train.needs import NEEDS, Need, check_needs, unused

# What acts in every run, names a thing that others are of, or is refused elsewhere where something else is missing
# (by toml.unheard; faults.*, local.*, semisync.*, profile.shapes, data.fim, mesh axes that no rule names).
ACT = {
    "run": "name dir fresh seed minutes exit_interval",
    "model": "preset hf function overrides loss",
    "data": "source kind masked seq document_mask reset_positions cache sft step_tokens mixture fim ahead skip",
    "training": "dtype param_dtype accumulate_dtype loss_scale clip_norm clip_value skip_norm count_zeros rampup_batch "
    "batch_sizes steps collect global_batch microbatches remat kernels compile prefetch reshard sum_dtype donate graphs "
    "deterministic batch_unit initial_loss_scale min_loss_scale loss_scale_window loss_scale_growth loss_scale_backoff "
    "hysteresis",
    "fp8": "recipe others",
    "optimizer": "mu_dtype nu_dtype name lr betas vs eps momentum weight_decay decouple clip schedule unit warmup "
    "warmup_fraction weight_decay_start min_lr decay_steps decay_shape weight_decay_shape switch groups offload on_resume",
    "mesh": "replica dp fsdp cp cpa tp ep pp virtual threads",
    "sharding": "rules reduce",
    "semisync": "params moments order outer outer_lr outer_arguments fragments pattern keep delay dtype",
    "checkpoint": "interval keep background folder resume strict verify last_model_only",
    "validation": "interval batches full sets",
    "log": "every tensorboard wandb report prompt",
    "faults": "rerun spike spike_samples tolerance recheck on_fault on_bad elsewhere rollback_batches rollbacks device "
    "stragglers straggler_ratio heartbeat init_timeout compile_timeout train_timeout memory memory_history inject",
    "local": "interval factor jump",
    "monitors": "norms optimizer per_parameter activations attention unigram",
    "profile": "steps shapes stack memory",
}
MET: dict[str, dict[str, Any]] = {  # where a need is met by default: what takes it away
    "model.mup": {"model": {"hf": "folder"}},
    "training.async_tp": {"mesh": {"virtual": True, "tp": 2}, "sharding": {"rules": "fsdp"}},
    "optimizer.warmup_init": {"optimizer": {"warmup": 0, "lr": 9.0}},
    "optimizer.arguments": {"model": {"mup": {"embed": 8}}},
    "pipeline": {"pipeline": {"layout": "Et*4L"}},
    "checkpoint.keep_every": {"checkpoint": {"keep": 0}},
    "data.blend": {"data": {"sft": "talk.jsonl"}},
    "data.streams": {"data": {"sft": "talk.jsonl"}},
    "data.pad_vocab": {"model": {"hf": "folder"}},
    "data.workers": {"data": {"ahead": 0}},
    "data.vocab_size": {"data": {"source": "text"}},
    "streaming.shuffle_algo": {"streaming": {"shuffle": False}, "data": {"streams": ({"local": "x"},)}},
    "streaming.shuffle_block_size": {"streaming": {"shuffle": False}, "data": {"streams": ({"local": "x"},)}},
}


def keys_of(need: Need) -> list[str]:
    """The dotted keys of a need."""
    names = [f.name for f in fields(getattr(RunConfig(), need.group))] if need.keys == "*" else need.keys.split()
    return [f"{need.group}.{name}" for name in names]


def other(hint: Any, default: Any) -> Any:
    """A value of a type that is not the default."""
    if get_origin(hint) is Literal:
        return next(x for x in get_args(hint) if x != default)
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if get_origin(kinds[0]) is Literal:
        return other(kinds[0], default)
    if get_origin(hint) is tuple or get_origin(kinds[0]) is tuple:
        item = get_args(hint)[0] if get_origin(hint) is tuple else get_args(kinds[0])[0]
        return ({"local": "x"},) if get_origin(item) is dict else (default[0] + 1 if default else 1,) if item is int else ("x",)
    if hint is dict or get_origin(hint) is dict:
        return {"x": 1.0}
    if kinds[0] is str:
        return "x"
    return not default if kinds[0] is bool else kinds[0]((default or 0) + 2)


def with_key(c: RunConfig, key: str) -> RunConfig:
    """The run with a key set to another value."""
    group, _, name = key.partition(".")
    part = getattr(c, group)
    hint = get_type_hints(type(part))[name]
    value = "sequential" if key == "pipeline.schedule" else other(hint, getattr(type(part)(), name))
    return replace(c, **{group: replace(part, **{name: value})})


def with_table(table: dict[str, Any]) -> RunConfig:
    """The default run with some keys set, past the checks of types."""
    c = RunConfig()
    for group, values in table.items():
        c = replace(c, **{group: replace(getattr(c, group), **values)})
    return c


def test_every_key_is_known_here():
    needy = {key for need in NEEDS for key in keys_of(need)}
    act = {f"{group}.{name}" for group, names in ACT.items() for name in names.split()}
    every = {key for key, *_ in toml.options(RunConfig)}
    assert needy | act == every, f"say in needs.py or here what they need: {sorted(needy | act ^ every)}"
    assert not needy & act


@pytest.mark.parametrize(("number", "key"), [(i, key) for i, need in enumerate(NEEDS) for key in keys_of(need)])
def test_a_setting_in_vain_is_named_with_what_it_needs(number, key):
    need = NEEDS[number]
    c = RunConfig()
    if need.met(c):
        c = with_table(MET[key] if key in MET else MET[need.group])
    assert not need.met(c), "the test does not take away what the key needs"
    c, said = with_key(c, key), []
    assert any(line.startswith(f"{key} = ") and need.words in line for line in unused(c, need.refused))
    if need.refused:
        with pytest.raises(ConfigError):
            check_needs(c, said.append)
    else:
        with_lines = [line for line in unused(c, False) if line.startswith(key)]
        assert len(with_lines) == 1 and "\n" not in with_lines[0]


def test_defaults_and_shipped_runs_set_nothing_in_vain():
    for c in (RunConfig(), *(load(path.stem) for path in SHIPPED.glob("*.toml"))):
        assert [*unused(c, True), *unused(c, False)] == []


@pytest.mark.parametrize("table", [
    {"training": {"async_tp": 3}, "mesh": {"virtual": True, "threads": True, "tp": 2}},
    {"pipeline": {"virtual": 2}, "mesh": {"pp": 2}},
    {"data": {"source": "prefix", "split": "9,1,0", "order": "megatron", "eod_mask_loss": True}},
    {"data": {"mixture": {"0": {"prefix": 1}}, "tokenizer": "byte", "valid": "held_out"}},
    {"data": {"sft": "my.module:talks", "arguments": {"n": 1}, "pack": False, "valid": "held_out.jsonl"}},
    {"fp8": {"others": {"layers.*": "delayed"}, "history": 4, "margin": 1}},
    {"local": {"folder": "near", "interval": 5, "factor": 1}},
], ids=str)  # fmt: skip
def test_a_setting_that_has_what_it_needs_passes(table):
    check_needs(with_table(table), pytest.fail)


@pytest.mark.parametrize(("table", "line"), [
    ({"groups": {"head": {"match": "table", "frozen": True, "lr": 0.1}}}, r"groups.head.lr does nothing: this group is frozen"),
    ({"groups": {"head": {"match": "table", "offload": True}}}, r"groups.head.offload does nothing: it is of all groups"),
    ({"switch": {"at": 5}}, r"optimizer.switch does nothing: give what changes then"),
])  # fmt: skip
def test_keys_of_tables(table, line):
    with pytest.raises(ConfigError, match=line):
        check_needs(with_table({"optimizer": table}), pytest.fail)
