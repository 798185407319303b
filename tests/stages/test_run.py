"""One start of a stage looks nothing up twice."""

import builtins
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from support import harness
from transformers import AutoTokenizer, CLIPImageProcessor

from dpa_xtuner.loss.weighting import Uniform
from dpa_xtuner.registry import SCHEMES
from dpa_xtuner.stages.pipeline import next_stage


@pytest.fixture
def counts(monkeypatch, method) -> Counter:
    """How often each file was opened, and each object was made."""
    counted = Counter()
    opened, loaders = builtins.open, (AutoTokenizer, CLIPImageProcessor)

    def counting_open(file, *args, **kwargs):
        counted[str(file)] += 1
        return opened(file, *args, **kwargs)

    def counting(owner):
        load = owner.from_pretrained

        def from_pretrained(*args, **kwargs):
            counted[owner.__name__] += 1
            before = counted.copy()
            loaded = load(*args, **kwargs)
            counted.clear()  # without the loader's own look into config.json
            counted.update(before)
            return loaded

        return from_pretrained

    for owner in loaders:
        monkeypatch.setattr(owner, "from_pretrained", counting(owner))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", counting_open)

    @dataclass(frozen=True)
    class Counted(Uniform):
        def __post_init__(self):
            counted["scheme"] += 1

    SCHEMES.register_module(f"counted for {method}", module=Counted)
    yield counted
    del SCHEMES.module_dict[f"counted for {method}"]


@pytest.mark.parametrize("method", ["dpa", "vanilla"])
def test_models_are_read_once_and_the_tokenizer_is_loaded_once(
    method, tiny, tmp_path, counts, monkeypatch
):
    monkeypatch.setenv("DPA_CACHE", str(tmp_path / "cache"))
    cfg = Config.fromfile(harness.TINY_CONFIG)
    loss = f"counted for {method}"
    cfg.merge_from_dict({"method": method, "align.loss": loss, "tune.loss": loss})
    cfg.work_dir, cfg.launcher = str(tmp_path / "run"), "none"
    counts.clear()
    with DefaultScope.overwrite_default_scope("mmengine"):
        config = next_stage(cfg)
    first = {"dpa": "proxy", "vanilla": "align"}[method]
    assert Path(config.work_dir).name == first
    files = {name: counts[f"{tiny}/{name}/config.json"] for name in ("llm", "visual_encoder")}
    assert files == {"llm": 1, "visual_encoder": 1}
    made = {name: counts[name] for name in ("AutoTokenizer", "CLIPImageProcessor", "scheme")}
    assert made == {"AutoTokenizer": 1, "CLIPImageProcessor": 1, "scheme": 1}
