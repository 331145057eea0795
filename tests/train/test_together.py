"""What one rank fails with reaches the others, also where its class cannot be pickled."""

from __future__ import annotations

import pickle

import processes
import pytest

from fmegatron.train.together import _attempt


class TwoWords(OSError):
    """Pickled as the class and one argument: reading that back fails."""

    def __init__(self, where, what):
        super().__init__(f"{where}: {what}")


@pytest.mark.parametrize("error, kind", [
    (ValueError("3 of 4"), ValueError),
    (TwoWords("bucket", "3 of 4"), OSError),
    (type("Local", (Exception,), {})("3 of 4"), RuntimeError),
    (ValueError("3 of 4", lambda: None), ValueError),
])
def test_every_error_can_be_sent(error, kind):
    def fail():
        raise error

    value, sent = pickle.loads(pickle.dumps(_attempt(fail)))
    assert value is None and type(sent) is kind and "3 of 4" in str(sent)


@pytest.mark.long
def test_a_mistake_is_one_line_of_the_first_process(tmp_path):
    words = ["train", "debug", "--mesh.dp", "2", "--data.source", tmp_path / "none", "--data.tokenizer", "byte"]
    first, second = processes.run(2, processes.COMMAND, *words, "--run.dir", tmp_path / "run", timeout=100)
    assert first.returncode == 2 and first.stderr.startswith("fmegatron: data.source = ") and first.stderr.count("\n") == 1
    assert not second.stderr
