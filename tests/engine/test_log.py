"""What a run's log says and leaves out, and the picture at its end."""

import json
import logging
import re
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from support import harness
from xtuner.registry import BUILDER

import dpa_xtuner.plugin  # noqa: F401
from dpa_xtuner.engine import log
from dpa_xtuner.engine.runner import FlexibleRunner, Runner, _draw


def test_notes_of_mmengine_about_itself_are_left_out(caplog):
    logger = logging.getLogger("test_log")
    log.quieten(logger)
    with caplog.at_level(logging.INFO, "test_log"):
        logger.info("Hooks will be executed in the following order:\nbefore_run: ...")
        logger.warning("LengthGroupedSampler is used.")
        logger.info("Iter(train) [2/8]  eta: 0:00:09")
        logger.warning("The Hooks will be executed")
    kept = [record.getMessage() for record in caplog.records]
    assert kept == ["Iter(train) [2/8]  eta: 0:00:09", "The Hooks will be executed"]


def test_what_packages_say_while_they_are_imported_is_left_out(caplog):
    log.quieten_start()
    for name, note in (
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU"),
        ("bitsandbytes.cextension", "The installed version of bitsandbytes was compiled without"),
    ):
        logger = logging.getLogger(name)
        with caplog.at_level(logging.INFO, name):
            logger.addHandler(caplog.handler)  # DeepSpeed's does not propagate
            logger.warning(note + " GPU support.")
            logger.info("Reduce bucket size 500000000")
            logger.warning("Could not find the bitsandbytes CUDA binary")
            logger.removeHandler(caplog.handler)
    kept = {(record.name, record.getMessage()) for record in caplog.records}
    binary = "Could not find the bitsandbytes CUDA binary"
    assert kept == {
        ("DeepSpeed", binary),
        ("bitsandbytes.cextension", binary),
        ("bitsandbytes.cextension", "Reduce bucket size 500000000"),
    }


@pytest.mark.slow
def test_two_ranks_log_each_line_once(tiny, tmp_path):
    output = harness.finish("proxy", tmp_path / "run", "default_hooks.logger.interval=2", ranks=2)
    said = re.findall(r" - mmengine - \w+ - (.*)", output)
    assert "Stage proxy: 6 steps" in output and "eta: " in output
    # The config is read before the ranks know that they are two.
    twice = {line for line, count in Counter(said).items() if count > 1}
    assert {line for line in twice if "env variable" not in line} == set()


def test_xtuners_registry_is_found_in_mmengines_scope():
    scope = DefaultScope.overwrite_default_scope("mmengine")
    with scope, BUILDER.switch_scope_and_registry(None) as found:
        assert found.scope == "mmengine"
        assert BUILDER.module_dict
        assert all(found.get(name) is known for name, known in BUILDER.module_dict.items())


def test_a_picture_that_cannot_be_drawn_ends_no_training(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "dpa_xtuner.engine.runner.print_log", lambda text, *how: said.append((text, how))
    )
    _draw(tmp_path)  # has no figures
    ((text, (_, level)),) = said
    assert f"{tmp_path}/curves.png was not drawn: " in text and level == logging.WARNING


class Line(BaseModel):
    """One weight, of MMEngine's kind."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, mode):
        return {"loss": (self.weight * x).square().sum()}


@pytest.mark.parametrize("kind", [Runner, FlexibleRunner])
def test_a_stages_log_has_a_line_for_each_interval_and_no_config(kind, tmp_path):
    folder = tmp_path / "run" / "tune"
    folder.mkdir(parents=True)
    state = {
        "origin": {"settings": {"global_batch_size": 1}},
        "run": {"processes": 1, "batch_size": 1},
    }
    (folder / "stage.json").write_text(json.dumps(state))
    config = tmp_path / "my_config.py"
    config.write_text(f"work_dir = {str(folder)!r}\n")
    runner = kind(
        model=Line(),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=[1.0, 2.0], sampler=dict(type="DefaultSampler", shuffle=False), batch_size=1
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e-3)),
        default_hooks=dict(logger=dict(type="LoggerHook", interval=2, log_metric_by_epoch=False)),
        log_processor=dict(by_epoch=False),
        experiment_name=f"test_log_{kind.__name__}",
        cfg=Config.fromfile(config),
    )
    runner.state_file = SimpleNamespace(ends_noted=nullcontext)
    runner.train()
    (log,) = folder.glob("*/*.log")
    text = log.read_text()
    lines = re.findall(r"Iter\(train\) *\[(\d)/4\].* eta: \d:\d\d:\d\d .* loss: ", text)
    assert lines == ["2", "4"]
    assert f"The config of this stage: {folder / 'my_config.py'}" in text
    assert (folder / "my_config.py").is_file()
    for noise in ("Config:", "Hooks will be executed", "Failed to search", "SyncBatchNorm"):
        assert noise not in text, text
    assert (tmp_path / "run" / "curves.png").is_file()
