"""Settings that nothing reads, or that can't be used, are named with the way out."""

from pathlib import Path

import pytest
from mmengine.config import Config
from support import harness

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages.settings import Settings, read_settings
from dpa_xtuner.stages.settings_table import settings_table


def read(**changes) -> Settings:
    cfg = Config.fromfile(harness.TINY_CONFIG)
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return Settings.from_config(cfg)


def test_the_values_are_those_of_the_config():
    settings = read(align__lr=3e-3)
    assert settings.align.lr == 3e-3
    assert settings.proxy.lora.r == 4
    assert settings.tune.train_llm == "full"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"promt_template": "x"},
            "promt_template: not a known key; did you mean 'prompt_template'",
        ),
        ({"tune__trains_llm": "lora"}, "tune.trains_llm: not a setting; did you mean 'train_llm'"),
        (
            {"proxy__lora__lora_alfa": 1},
            "proxy.lora.lora_alfa: not a setting; did you mean 'lora_a",
        ),
        ({"captions__heldout": 1}, "captions.heldout: not a setting; did you mean 'held_out'"),
        ({"align__zzz": 1}, "align.zzz: not a setting$"),
        ({"align__lr": -1.0}, r"align.lr: Input should be greater than 0 \(got -1.0\)"),
        ({"proxy__lora__r": 0}, r"proxy.lora.r: .* greater than 0 \(got 0\)"),
        ({"proxy__lora__lora_dropout": 1.0}, r"lora_dropout: .* less than 1 \(got 1.0\)"),
        ({"tune__warmup_ratio": 1.5}, r"tune.warmup_ratio: .* less than 1 \(got 1.5\)"),
        ({"tune__start_from": "proxi"}, r"tune.start_from: .*'target' or 'proxy' \(got 'proxi'\)"),
        ({"tune__train_llm": "qlora"}, r"tune.train_llm: .*'full' or 'lora' \(got 'qlora'\)"),
        ({"align__batch_size": "many"}, r"align.batch_size: .* \(got 'many'\)"),
        ({"align__lora": {"r": 3}}, "align.lora: not a setting"),
        ({"proxy__loss": "cmo"}, "proxy.loss: not a setting"),
        (
            {"align__loss__type": "cmoo"},
            "align.loss: .*'cmoo' is not .*; did you mean 'cmo'",
        ),
        ({"tune__loss__window": 4}, "tune.loss: .*window=4: expected an odd whole number"),
        ({"tune__loss__d_min": 0.7}, r"tune.loss: .*d_min=0.7, d_max=0.5: expected numbers"),
        ({"tune__normalize": "globl"}, r"tune.normalize: .*'global' \(got 'globl'\)"),
    ],
)
def test_what_cannot_be_used_is_named(changes, message):
    with pytest.raises(DPAError, match=message):
        read(**changes)


def test_all_problems_are_told_at_once():
    with pytest.raises(DPAError) as error:
        read(align__lr=0.0, tune__max_epochs=0, captions__held_out=-1)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "captions.held_out",
        "align.lr",
        "tune.max_epochs",
    ]


def test_what_is_missing_is_named():
    cfg = Config.fromfile(harness.TINY_CONFIG)
    cfg.pop("llm_name_or_path")
    cfg.align.pop("lr")
    with pytest.raises(DPAError, match=r"llm_name_or_path: Field required\n +align.lr: Field re"):
        Settings.from_config(cfg)


def test_the_table_in_the_docs_is_current():
    file = Path(__file__).parents[2] / "docs/settings.md"
    command = "python -m dpa_xtuner.stages.settings_table"
    assert file.read_text() == settings_table(), f"Write it again: {command}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tune__lr": 0.5}, {"weights"}),
        ({"tune__lora__r": 8, "tune__train_llm": "lora"}, {"model"}),
        ({"tune__batch_size": 4}, {"speed"}),
        ({"tune__save_steps": 1}, {"nothing"}),
    ],
)
def test_a_setting_is_known_by_what_its_change_changes(changes, expected):
    before, after = read().tune, read(**changes).tune
    kinds = ("model", "weights", "speed", "nothing")
    assert {kind for kind in kinds if before.changing(kind) != after.changing(kind)} == expected


def test_a_launcher_in_the_config_has_no_effect_and_is_told(tiny, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(f"_base_ = [{str(harness.TINY_CONFIG)!r}]\nlauncher = 'pytorch'\n")
    cfg = Config.fromfile(file)
    read_settings(cfg)
    cfg.launcher = "none"  # as XTuner does, which takes --launcher alone
    with pytest.raises(DPAError, match="launcher: 'pytorch' has no effect: give --launcher"):
        read_settings(cfg)
