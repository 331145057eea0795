"""Parameter counts are the published ones, to the last parameter."""

from __future__ import annotations

import pytest

from fmegatron.models import llama3, preset
from fmegatron.models.presets import FAMILIES

PUBLISHED = {
    "gpt2:124m": 124_439_808,
    "gpt2:355m": 354_823_168,
    "gpt2:774m": 774_030_080,
    "gpt2:1.5b": 1_557_611_200,
    "llama2:7b": 6_738_415_616,
    "llama2:13b": 13_015_864_320,
    "llama2:70b": 68_976_648_192,
    "llama3:1b": 1_235_814_400,
    "llama3:3b": 3_212_749_824,
    "llama3:8b": 8_030_261_248,
    "llama3:70b": 70_553_706_496,
    "llama3:405b": 405_853_388_800,
    "qwen2.5:0.5b": 494_032_768,
    "qwen2.5:1.5b": 1_543_714_304,
    "qwen2.5:3b": 3_085_938_688,
    "qwen2.5:7b": 7_615_616_512,
    "qwen2.5:14b": 14_770_033_664,
    "qwen2.5:32b": 32_763_876_352,
    "qwen2.5:72b": 72_706_203_648,
    "qwen3:0.6b": 596_049_920,
    "qwen3:1.7b": 1_720_574_976,
    "qwen3:4b": 4_022_468_096,
    "qwen3:8b": 8_190_735_360,
    "qwen3:14b": 14_768_307_200,
    "qwen3:32b": 32_762_123_264,
    "mistral:7b": 7_241_732_096,
    "gemma:2b": 2_506_172_416,
    "gemma:7b": 8_537_680_896,
    "gemma2:2b": 2_614_341_888,
    "gemma2:9b": 9_241_705_984,
    "gemma2:27b": 27_227_128_320,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_published_ones(name):
    assert preset(name, vocab_pad=1024).count() == PUBLISHED[name]


def test_every_preset_is_a_model():
    for family, (_, sizes) in FAMILIES.items():
        for size in sizes:
            assert preset(f"{family}:{size}").chain
    assert 3e6 < llama3("quickstart").count() < 8e6


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match="unknown family 'lama', known are llama2"):
        preset("lama:8b")
    with pytest.raises(ValueError, match="llama3 has the sizes debug, quickstart"):
        preset("llama3:9b")
    with pytest.raises(ValueError, match="no setting 'headz'"):
        preset("llama3:debug", headz=3)
    with pytest.raises(ValueError, match=r"kv can be one of \[1, 2, 4\]"):
        preset("llama3:debug", kv=3)
