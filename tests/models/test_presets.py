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
    "mixtral:8x7b": 46_702_792_704,
    "mixtral:8x22b": 140_620_634_112,
    "qwen3:30b-a3b": 30_532_122_624,
    "qwen3:235b-a22b": 235_093_634_560,
    "deepseek:v2-lite": 15_706_484_224,
    "gpt-oss:20b": 20_914_757_184,
    "gpt-oss:120b": 116_829_156_672,
}
ACTIVE = {  # billions, as the reports and model cards say; whether they count the table of embeddings
    "mixtral:8x7b": ("12.9", True),
    "mixtral:8x22b": ("39", True),
    "qwen3:30b-a3b": ("3.3", True),
    "qwen3:235b-a22b": ("22", True),
    "deepseek:v2-lite": ("2.4", False),
    "deepseek:v3": ("37", False),
    "gpt-oss:20b": ("3.61", False),
    "gpt-oss:120b": ("5.13", False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_published_ones(name):
    assert preset(name, vocab_pad=1024).count() == PUBLISHED[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_counts_are_published_ones(name):
    said, table = ACTIVE[name]
    model = preset(name, mtp=0)
    active = model.count(active=True) - (0 if table else model.sizes["vocab"] * model.sizes["embed"])
    assert abs(active / 1e9 - float(said)) < 10 ** -len(said.partition(".")[2])  # some round, some cut


def test_modules_that_look_ahead_are_counted_apart():
    """DeepSeek-V3: 671B, and 685B with its module's 11.6B and the two tables that the files repeat in it."""
    model, main = preset("deepseek:v3"), preset("deepseek:v3", mtp=0)
    assert main.count() == 671_026_419_200
    assert round((model.count() - main.count()) / 1e9, 1) == 11.6
    assert round((model.count() + 2 * 129280 * 7168) / 1e9) == 684


def test_what_an_override_turns_off_takes_its_settings_along():
    assert preset("gpt-oss:20b", positions="none").config.rope_scaling is None
    assert preset("llama3:8b", positions="learned").config.rope_base == 10000.0
    with pytest.raises(ValueError, match="rope_base = 2.0 does nothing without positions = rope"):
        preset("llama3:8b", positions="learned", rope_base=2.0)


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
