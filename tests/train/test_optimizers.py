"""A run's optimizer from its configuration: names, keywords, groups, schedules, the switch, and what a resumed run keeps."""

from __future__ import annotations

import pytest
import torch

from fmegatron import optim, toml, tree
from fmegatron.config import ConfigError, RunConfig
from fmegatron.models.gpt import Config, gpt
from fmegatron.train import checkpoint
from fmegatron.train.optimizers import NAMES, _keywords, follow, optimizer_of, resumed, schedule_of
from fmegatron.train.setup_batch import sizes_of

MODEL = gpt(Config(layers=2, embed=8, heads=2, mlp=12, vocab=11))


def run(**optimizer):
    table = {"optimizer": {"warmup": 0, **optimizer}, "training": {"steps": 20, "clip_norm": "none"}}
    return toml.update(RunConfig(), table, "test")


def stepped(tx, n=3):
    params = MODEL.init(0, torch.float64)
    state = tx.init(params)
    for i in range(n):
        updates, state = tx.update(MODEL.init(i + 1, torch.float64), state, params)
        params = optim.apply_updates(params, updates)
    return tree.to_paths(params)


def same(a, b):
    return all(torch.equal(x, b[path]) for path, x in a.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_its_function(name):
    kwargs = {"declare": MODEL.declare} if name in ("muon", "adafactor") else {}
    c = run(name=name)
    assert same(stepped(optimizer_of(c, MODEL)), stepped(getattr(optim, name)(schedule_of(c), **kwargs)))


def test_keywords():
    c = run(name="aggmo_adopt", betas=[0.9, 0.99, 0.999], vs=[0.5, 0.3], eps=1e-5, weight_decay=0.1, decouple=True, clip="off")
    expected = optim.aggmo_adopt(schedule_of(c), (0.9, 0.99, 0.999), (0.5, 0.3), 1e-5, 0.1, True, None)
    assert same(stepped(optimizer_of(c, MODEL)), stepped(expected))
    c = run(name="adopt", clip="0.5", weight_decay=0.2, weight_decay_start=0.0, weight_decay_shape="cosine")
    expected = optim.adopt(schedule_of(c), clip=0.5, weight_decay=optim.increment(0, 0.2, steps=20, shape="cosine"))
    assert same(stepped(optimizer_of(c, MODEL)), stepped(expected))


def test_groups():
    c = run(lr=1e-2, groups={"ends": {"match": ["embed.*", "head.*"], "lr": 1e-3, "name": "sgd"},
                             "norms": {"match": "*norm*", "frozen": True}})
    got, start = stepped(optimizer_of(c, MODEL)), tree.to_paths(MODEL.init(0, torch.float64))
    ends, rest = stepped(optimizer_of(run(lr=1e-3, name="sgd"), MODEL)), stepped(optimizer_of(run(lr=1e-2), MODEL))
    for path, x in got.items():
        expected = start if "norm" in path else ends if path.startswith(("embed", "head")) else rest
        assert torch.equal(x, expected[path]), path


def test_the_switch():
    c = run(name="qhadamw", schedule="constant", switch={"at": 2, "betas": [0.99, 0.999], "vs": [0.98], "lr_scale": 4.0,
                                                         "reset": True})
    expected = optim.qhadamw(optim.scaled(1e-3, 2, 4.0), vs=(optim.Switch(0.7, 0.98, 2),),
                             betas=(optim.Switch(0.9, 0.99, 2, reset=True), optim.Switch(0.95, 0.999, 2)))
    assert same(stepped(optimizer_of(c, MODEL), 5), stepped(expected, 5))
    c = run(name="qhadamw", schedule="constant", switch={"at": 2, "reset": ["nu"]})
    expected = optim.qhadamw(1e-3, betas=(0.9, optim.Switch(0.95, 0.95, 2, reset=True)))
    assert same(stepped(optimizer_of(c, MODEL), 5), stepped(expected, 5))


def test_schedules_in_samples_and_fractions():
    updates, samples = run(warmup=4, decay_steps=16), run(warmup=4 * 32, decay_steps=16 * 32, unit="samples")
    fraction = run(warmup_fraction=0.2, schedule="wsd", decay_steps=10, warmup_init=1e-5)
    for t in range(25):
        count = torch.tensor(t)
        assert float(schedule_of(updates)(count)) == pytest.approx(float(schedule_of(samples)(count)), rel=1e-12)
        expected = optim.wsd(1e-3, warmup=2, steps=20, decay=10, init=1e-5)
        assert float(schedule_of(fraction)(count)) == pytest.approx(float(expected(count)))
        ended = schedule_of(run(warmup=4, decay_steps=6, schedule="inverse_sqrt", min_lr=1e-5))
        assert float(ended(count)) == pytest.approx(1e-3 * min(t / 4, (4 / max(t, 4)) ** 0.5) if t <= 10 else 1e-5)


def test_decay_grows_with_samples_as_megatrons_does():
    """Where batches grow, its weight decay follows the samples, and not the steps."""
    table = {"optimizer": {"warmup": 0, "weight_decay_start": 0.0, "weight_decay": 0.1, "weight_decay_shape": "linear",
                           "unit": "samples"}, "training": {"steps": 20, "global_batch": 8, "rampup_batch": [2, 2, 24]}}
    c = toml.update(RunConfig(), table, "test")
    decay = _keywords(c)[2]["weight_decay"]
    before = [int(sizes_of(c).before(torch.tensor(t))) for t in range(21)]
    assert [float(decay(torch.tensor(t))) for t in range(21)] == pytest.approx([0.1 * n / before[20] for n in before])


def test_what_a_resumed_run_keeps():
    old, new = run(lr=1e-2, schedule="linear"), run(lr=1e-3, on_resume="restore", eps=1e-5)
    assert follow(new, toml.dumps(old)).optimizer.lr == 1e-2
    assert follow(new, toml.dumps(old)).optimizer.schedule == "linear"
    assert follow(new, toml.dumps(old)).optimizer.eps == 1e-5
    assert follow(run(lr=1e-3), toml.dumps(old)).optimizer.lr == 1e-3
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.001, the checkpoint's is 0.01"):
        follow(run(lr=1e-3, on_resume="match"), toml.dumps(old))
    assert follow(run(lr=1e-2, schedule="linear", on_resume="match"), toml.dumps(old)).optimizer.lr == 1e-2


def test_the_schedule_of_a_checkpoint_in_a_folder_of_its_own(tmp_path):
    old = run(lr=1e-2)
    checkpoint.save(tmp_path / "far", 1, {}, {"config": toml.dumps(old)})
    places = {"run": {"dir": str(tmp_path / "run")}, "checkpoint": {"folder": str(tmp_path / "far")}}
    assert resumed(toml.update(run(lr=1e-3, on_resume="restore"), places, "test")).optimizer.lr == 1e-2


@pytest.mark.parametrize("settings, word", [
    ({"vs": [0.7]}, r"optimizer.vs = \(0.7,\): adamw has no vs, it has betas, eps, weight_decay"),
    ({"name": "sgd", "betas": [0.9, 0.9]}, "sgd has no betas, it has momentum, weight_decay"),
    ({"name": "lion", "eps": 1e-8}, "lion has no eps"), ({"name": "adopt", "clip": "much"}, "a number, t\\*\\*0.25, or off"),
    ({"groups": {"a": {"match": "nothing.*"}}}, "'nothing.\\*' fits no parameter"), ({"groups": {"a": {}}}, "match"),
    ({"groups": {"a": {"match": "*", "betaz": 1}}}, "betaz"), ({"switch": {"at": 1, "vs": [0.5]}}, "adamw has no vs"),
    ({"switch": {"betas": [0.9, 0.9]}}, "switch.at"), ({"arguments": {"wd": 1}}, "adamw has no wd, it has"),
    ({"name": "muon", "arguments": {"scal": 1}}, "it has nesterov, scale, scale_factor, steps, dtype, adam_lr"),
    ({"weight_decay_start": 0.1}, "the value at the end"), ({"lr": float("inf")}, "must be finite"),
    ({"min_lr": 1.0}, "at most 0.001"), ({"warmup_init": 1.0}, "at most 0.001"), ({"warmup_fraction": 1.5}, "at most 1"),
    ({"schedule": "constant", "decay_steps": 7}, "decay_steps = 7 does nothing without a schedule that decays"),
    ({"decay_shape": "cosine"}, "does nothing without schedule = wsd, and not cosine"),
    ({"weight_decay_shape": "cosine"}, "does nothing without optimizer.weight_decay_start"),
    ({"switch": {"at": 2}}, "and what changes then"), ({"switch": {"at": -1, "reset": True}}, "at = -1: expected the update"),
    ({"switch": {"at": 1, "betas": 0.9}}, "betas = 0.9: expected a list of numbers"),
    ({"switch": {"at": 1, "lr_scale": "big"}}, "a factor on the learning rate"),
    ({"switch": {"at": 1, "reset": ["exp_avg"]}}, "'exp_avg' is none of mu, nu"),
    ({"name": "lion", "switch": {"at": 1, "reset": True}}, "lion has no momenta that can be reset"),
    ({"name": "lion", "switch": {"at": 1, "betas": [0.9, 0.9]}}, "lion has no betas that change"),
    ({"name": "sgd", "switch": {"at": 1, "reset": True}}, "sgd has no momenta that can be reset"),
    ({"groups": {"a": {"match": "*", "frozen": True, "lr": 1e-4}}}, "what is frozen takes no steps"),
    ({"groups": {"a": {"match": "*"}, "b": {"match": "embed.*"}}}, "groups.b: all that it matches is of a, which comes first")])
def test_mistakes_are_one_line(settings, word):
    with pytest.raises(ConfigError, match=word) as error:
        optimizer_of(run(**settings), MODEL)
    assert "\n" not in str(error.value)
