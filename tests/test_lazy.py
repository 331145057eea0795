"""What a notebook finds after `import fmegatron as fm`: every module by its dotted name, and nothing that is not there."""

from __future__ import annotations

from importlib import import_module

import pytest

import fmegatron as fm

PACKAGES = {"nn": "mlp", "train": "flops", "inference": "draw", "sharding": "chunks", "testing": "formula", "plan": "hardware"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_list_their_modules(package):
    here, module = getattr(fm, package), PACKAGES[package]
    assert module in dir(here) and getattr(here, module) is import_module(f"fmegatron.{package}.{module}")
    with pytest.raises(AttributeError, match=f"'fmegatron.{package}' has no attribute 'nowhere'"):
        here.nowhere  # noqa: B018


def test_mistakes_at_the_top_are_told_with_the_choices():
    with pytest.raises(KeyError, match=r"no rules are named 'fsdp_ps': they are single, .*fsdp_tp_sp"):
        fm.RULES["fsdp_ps"]
    with pytest.raises(KeyError, match="no mesh axis is named 'pp': they are dp, tp"):
        fm.virtual_mesh(dp=2, tp=2)["pp"]
    with pytest.raises(ValueError, match="rules are a value, such as .*, not 'fsdp'"):
        fm.Sharding(fm.virtual_mesh(dp=2), "fsdp")
    assert set(fm.__all__) == set(dir(fm)) and all(hasattr(fm, name) for name in fm.__all__)
