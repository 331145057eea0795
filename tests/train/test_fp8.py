"""[fp8] from a configuration to a run; mistakes in one line."""

from __future__ import annotations

import numpy as np
import pytest
from pieces import records_of

from fmegatron import cli, config, data, models, toml
from fmegatron.train.lowbits import lowered


def test_a_run_learns_as_in_fp32(tmp_path):
    losses = {}
    with data.IndexedWriter(tmp_path / "text", "<u2") as out:
        out.add_documents(np.array([*b"few bits are enough to learn this " * 4, 256]) for _ in range(40))
    for name in ("none", "tensorwise", "nvfp4"):
        more = ["--fp8.recipe", name, "--fp8.last", "1"] if name != "none" else []
        words = ["train", "debug", "--run.dir", str(tmp_path / name), "--training.steps", "8", "--log.prompt", "",
                 "--data.source", str(tmp_path / "text"), "--data.tokenizer", "byte", "--data.pad_vocab", "8",
                 "--training.compile", "false"]  # fmt: skip
        assert cli.main([*words, *more]) == 0
        losses[name] = [record["loss"] for record in records_of(tmp_path / name)]
    assert losses["none"][0] != losses["tensorwise"][0] and losses["tensorwise"][0] != losses["nvfp4"][0]
    for name in ("tensorwise", "nvfp4"):
        assert abs(losses[name][-1] - losses["none"][-1]) < 0.1 * (losses["none"][0] - losses["none"][-1]) + 0.02


@pytest.mark.parametrize(("said", "part"), [
    ({"recipe": "fp8"}, "known are tensorwise"),
    ({"recipe": "rowwise", "match": ["mlp"]}, "'mlp': no weight"),
    ({"others": {"layers.*": "tensorwse"}}, "recipe 'tensorwse'"),
])  # fmt: skip
def test_mistakes(said, part):
    c = toml.update(config.RunConfig(), {"fp8": said}, "test")
    with pytest.raises(ValueError, match="^fp8: ") as error:
        lowered(c, models.preset("llama3:debug"))
    assert part in str(error.value) and "\n" not in str(error.value)
