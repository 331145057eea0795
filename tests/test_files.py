"""A file is whole or absent, whenever its writer dies."""

from __future__ import annotations

import os

import pytest

from fmegatron.files import write_atomically


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
    (tmp_path / "latest").write_text("old")

    def killed(*_):
        assert (tmp_path / "latest").read_text() == "old"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        write_atomically(tmp_path / "latest", "new")
    write_atomically(tmp_path / "latest", "new")
    assert (tmp_path / "latest").read_text() == "new" and os.listdir(tmp_path) == ["latest"]
