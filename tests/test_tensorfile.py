"""Files that the safetensors library reads back bit for bit, and whose hash is that of their bytes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmegatron import tensorfile
from fmegatron.tensorfile import NAMES, Lazy


def random_bits(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def same(a, b):
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]  # NaNs too
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@given(st.lists(st.tuples(st.sampled_from(list(NAMES)), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_the_library_reads_what_is_written(tmp_path_factory, kinds):
    tmp_path = tmp_path_factory.mktemp("file")
    tensors = {f"a.{i}": random_bits(shape, dtype, i) for i, (dtype, shape) in enumerate(kinds)}
    lazy = {name: Lazy(tuple(x.shape), x.dtype, lambda x=x: x) for name, x in tensors.items()}
    sha = tensorfile.write(tmp_path / "x", tensors)
    assert sha == tensorfile.write(tmp_path / "y", lazy) == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    back = load_file(tmp_path / "x")
    assert back.keys() == tensors.keys() and all(same(back[name], x) for name, x in tensors.items())
    with safe_open(tmp_path / "x", framework="pt") as file:  # slices too: alignment
        for name, x in tensors.items():
            if x.dim() and x.shape[0] > 1:
                assert same(file.get_slice(name)[1:], x[1:])


def test_large_strided_and_transposed_tensors(tmp_path):
    x = torch.arange(3 << 20, dtype=torch.float32).reshape(3, -1)  # three pieces
    tensorfile.write(tmp_path / "x", {"t": x.T, "every": x[:, ::7], "x": x})
    save_file({"t": x.T.contiguous(), "every": x[:, ::7].contiguous(), "x": x}, tmp_path / "y", {"format": "pt"})
    a, b = load_file(tmp_path / "x"), load_file(tmp_path / "y")
    assert all(torch.equal(a[name], b[name]) for name in b)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_dtype_that_has_no_name_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="z has dtype torch.complex64"):
        tensorfile.write(tmp_path / "x", {"z": torch.zeros(2, dtype=torch.complex64)})
