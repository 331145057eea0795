"""Layers to stages: even, uneven, written out; Megatron's own parser reads the same letters."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.models.gpt import Config, gpt
from fmegatron.train.pipeline.layout import Layout, live_values, parse_layout, place_nodes, split_layers

megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.mark.parametrize("text, stages, layers", [
    ("Et*3|(tt|)*29,m|L", 32, 61),
    ("E|(tt|)*2,(t|)*4,mL", 8, 8),
    ("Et|(tt|)*30mL", 32, 61),
    ("EtL", 1, 1),
    ("E|t|tt|L", 4, 3),
])  # fmt: skip
def test_grammar(text, stages, layers):
    layout = parse_layout(text)
    assert (len(layout.stages), "".join(layout.stages).count("t")) == (stages, layers)
    assert parse_layout(str(layout)) == layout
    assert [i for stage in range(stages) for i in layout.layers(stage)] == list(range(layers))


def written(draw):
    piece = st.sampled_from(["t", "tt", "t*3", "|", "t|", "(t|)*2", "(tt|t)*3", ",", "t*1"])
    return st.lists(piece, max_size=6).map(lambda parts: "E" + "".join(parts) + "L")


@functools.cache
def megatrons_parser():
    """Its two files alone: importing all of the package takes 17 s."""
    folder = Path(importlib.util.find_spec("megatron.core").origin).parent / "transformer"
    loaded = {"megatron.core": types.SimpleNamespace(parallel_state=None)}
    with mock.patch.dict(sys.modules, loaded):
        for name in ("enums", "pipeline_parallel_layer_layout"):
            spec = importlib.util.spec_from_file_location(f"megatron.core.transformer.{name}", folder / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[spec.name] = module
    return module.PipelineParallelLayerLayout.parse_str_to_list


@megatron
@given(st.deferred(lambda: written(None)))
def test_megatron_reads_the_same(text):
    theirs = megatrons_parser()(text)
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    assert parse_layout(text).stages == tuple("".join(letters[layer.name] for layer in stage) for stage in theirs)


@pytest.mark.parametrize("text, message", [
    ("tt|L", "E (embedding) comes once, first, not 0 times"),
    ("Et|E|L", "E (embedding) comes once, first, not 2 times"),
    ("Et|Lt", "L (loss) comes once, last, not elsewhere"),
    ("Em|tL", "layers (t) come before"),
    ("Et|m|mL", "all m lie on one stage, not on 2"),
    ("Et|x|L", "'x' at 3 is none of E t m L"),
    ("E(t|*3L", "the bracket at 1 is not closed"),
    ("Et*L", "the * at 2 needs a number"),
    ("Et)L", "')' at 2 is none of"),
])  # fmt: skip
def test_mistakes(text, message):
    with pytest.raises(ValueError) as error:
        parse_layout(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_checked_against_model_and_schedule():
    layout = parse_layout("Ett|ttL")
    assert layout.check(4, 2) is layout
    with pytest.raises(ValueError, match="has 4 t, and the model 6 layers"):
        layout.check(6, 2)
    with pytest.raises(ValueError, match="has 2 stages, and the schedule 4"):
        layout.check(4, 4)
    with pytest.raises(ValueError, match="has 1 m, and the model 0 layers of multi-token prediction"):
        parse_layout("Et|tmL").check(2, 2)


@pytest.mark.parametrize("sizes, options, layout", [
    ((8, 4), {}, "Ett|tt|tt|ttL"),
    ((8, 4), {"first": 1, "last": 3}, "Et|tt|tt|tttL"),
    ((7, 4), {"first": 1}, "Et|tt|tt|ttL"),
    ((6, 4), {"count_embedding": True, "count_loss": True}, "Et|tt|tt|tL"),
    ((7, 4), {"count_loss": True}, "Ett|tt|tt|tL"),
    ((4, 2), {"first": 1, "last": 3}, "Et|tttL"),
    ((3, 1), {}, "EtttL"),
    ((2, 4), {"count_embedding": True, "count_loss": True}, "E|t|t|L"),
])  # fmt: skip
def test_even_and_uneven(sizes, options, layout):
    assert str(split_layers(*sizes, **options)) == layout


@pytest.mark.parametrize("sizes, options, message", [
    ((10, 4), {}, "10 layers: 10 do not divide over 4 of 4 stages: use 8 or 12 layers, or a layout such as Ettt|ttt|tt|ttL"),
    ((7, 4), {"last": 2}, "5 do not divide over 3 of 4 stages: use 5 or 8 layers, or a layout such as Ett|tt|tt|tL"),
    ((4, 2), {"first": 1, "last": 2}, "use a layout such as Ett|ttL"),
    ((4, 2), {"first": 1, "count_loss": True}, "not both"),
])  # fmt: skip
def test_layers_that_do_not_divide(sizes, options, message):
    with pytest.raises(ValueError) as error:
        split_layers(*sizes, **options)
    assert message in str(error.value)


def test_nodes_and_what_travels():
    chain = gpt(Config(layers=4, embed=8, heads=2, mlp=8, vocab=11)).chain
    stages = place_nodes(chain, parse_layout("E|ttt|t|L"))
    assert [node for stage in stages for node in stage] == list(chain)
    assert [len(stage) for stage in stages] == [1, 3, 1, 2]
    live = live_values(stages)
    assert live[0][0] == "h" and "rope.cos" in live[0] == live[1] and live[2] == ("h",) and live[3] == ()
    assert not {"tokens", "labels", "weights"} & {name for names in live for name in names}


def test_layout_is_plain_data():
    assert Layout(("Et", "tL")) == parse_layout("Et|tL") == split_layers(2, 2)
