"""Assertions about programs on meshes, for this library and for models of your own; in the manner of chex.

    assert_mesh_invariant(model, batch)              every preset computes what one device computes, value by value
    assert_trees_all_close(actual, expected)         leaf by leaf, with paths; errors relative to a leaf's largest entry
    assert_placement(sh, local, names)               pieces have the right shape, and replicas are equal
    assert_max_traces(fn, 1)                         `fn`, which may run its Python once
    variants()                                       one program run four ways, as parameters of a pytest test

`fmegatron.testing.strategies` draws meshes, rules, configs and batches for hypothesis, which it imports.
"""

from typing import TYPE_CHECKING

from fmegatron.lazy import submodules
from fmegatron.testing.assertions import (
    assert_dtype,
    assert_max_traces,
    assert_placement,
    assert_shape,
    assert_trees_all_close,
    assert_trees_all_equal,
    error,
)
from fmegatron.testing.invariance import Measured, assert_mesh_invariant, assert_same, measure
from fmegatron.testing.variants import VARIANTS, Variant, variants

__all__ = [
    "VARIANTS",
    "Measured",
    "Variant",
    "assert_dtype",
    "assert_max_traces",
    "assert_mesh_invariant",
    "assert_placement",
    "assert_same",
    "assert_shape",
    "assert_trees_all_close",
    "assert_trees_all_equal",
    "error",
    "measure",
    "variants",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = submodules(__name__)
