"""Real runs whose last batch of an epoch holds a single sample, so that ranks have none."""

import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from support import harness
from support.harness import Layout
from torch import nn
from transformers import get_cosine_schedule_with_warmup

pytestmark = pytest.mark.slow

STEPS, WARMUP, LR = 4, 2, 1e-2  # 29 samples, 28 a step, 2 epochs; 34 % of 4 steps are 1.36


def notes_ids(folder: Path):
    """For `prepare`: a hook that writes down the samples of each iteration."""

    def prepare() -> None:
        @HOOKS.register_module()
        class NoteIdsHook(Hook):
            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
                with open(folder / f"ids-{get_rank()}.jsonl", "a") as out:
                    out.write(json.dumps(data_batch["data"]["ids"]) + "\n")

    return prepare


def rates() -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=LR)
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero2"])
def test_each_epoch_passes_each_sample_once_at_its_steps_rate(
    ranks, deepspeed, reference, tiny, tmp_path
):
    work_dir, config = tmp_path / "run", tmp_path / "config.py"
    harness.copy_stage(reference(Layout()).work_dir, work_dir, "proxy")
    config.write_text(
        f"_base_ = [{str(harness.TINY_CONFIG)!r}]\n"
        f"custom_hooks = [dict(type='NoteIdsHook')]\n"
        f"align = dict(global_batch_size=28, max_steps=None, max_epochs=2)\n"
    )
    options = ["default_hooks.logger.interval=1"]
    if ranks == 2:  # one of them has no sample in the last step
        options.append(f"align.contrast_cache={tmp_path / 'p_wo'}")
    how = dict(ranks=ranks, deepspeed=deepspeed, config=config, prepare=notes_ids(tmp_path))
    output = harness.finish("align", work_dir, *options, **how)

    files = sorted(tmp_path.glob("ids-*.jsonl"))
    seen = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    accumulate = 14 // ranks
    assert [len(batches) for batches in seen] == [STEPS * accumulate] * ranks
    for epoch in range(2):
        part = slice(epoch * 2 * accumulate, (epoch + 1) * 2 * accumulate)
        ids = [name for batches in seen for batch in batches[part] for name in batch]
        assert sorted(ids) == sorted(harness.held_out_split(tiny)[1])
    assert "no supervised token: they train nothing" not in output
    state = json.loads((work_dir / "align" / "stage.json").read_text())
    balanced = {"balanced": 2} if ranks > 1 else {}
    assert state["run"] == {
        "processes": ranks, "batch_size": 2, "zero": 2 if deepspeed else None, **balanced,
    }  # fmt: skip

    (file,) = (work_dir / "align").glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    rows = [row for row in rows if row["step"] % accumulate == 0]
    assert [row["step"] for row in rows] == [accumulate * (k + 1) for k in range(STEPS)]
    assert [row["lr"] for row in rows] == pytest.approx(rates(), abs=1e-9 * LR)
    assert all(math.isfinite(row["loss"]) for row in rows)
