"""A component that is added to a row of the stage table is trained and written, and no other."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import harness
from support.harness import Layout

from dpa_xtuner.errors import DPAError
from dpa_xtuner.stages import build, pipeline, table
from dpa_xtuner.stages.components import LLM, LLM_ADAPTER, PROJECTOR, VISUAL_ENCODER
from dpa_xtuner.stages.table import Stage

FULL = Layout(dropout=0.0, train_llm="full")


def added(stage: str, component: str, then: Callable[[], None]) -> Callable[[], None]:
    """For `prepare`: `stage` trains and writes a component more, which the next one loads."""

    def prepare() -> None:
        stock = table.stage_table

        def changed(settings) -> dict[str, Stage]:
            rows, wrote = stock(settings), {component: f"{stage}/{component}"}
            builds = tuple(dict.fromkeys((*rows[stage].builds, component)))
            trains = (*rows[stage].trains, component)
            rows[stage] = replace(rows[stage], builds=builds, trains=trains)
            assert rows[stage].writes.items() >= wrote.items()
            if stage == table.ALIGN:
                rows[table.TUNE] = replace(rows[table.TUNE], loads=rows[table.TUNE].loads | wrote)
            return rows

        for module in (table, build, pipeline):
            module.stage_table = changed
        then()

    return prepare


def _bare(name: str) -> str:
    """A weight's name in its component; only files and transformers 4 say ``vision_model``."""
    return re.sub(r"^(visual_encoder\.|llm\.)?(vision_model\.)?", "", name)


def names_of(component: str, names) -> set[str]:
    return {name for name in names if name.split(".")[0] == component}


@pytest.mark.parametrize("component", [VISUAL_ENCODER, LLM], ids=str)
def test_a_component_added_to_align_is_trained_written_and_loaded(component, reference, tmp_path):
    work_dir = tmp_path / "run"
    harness.copy_stage(reference(FULL).work_dir, work_dir, "proxy")
    seen = {}
    for stage in ("align", "tune"):
        file = tmp_path / f"{stage}.pt"
        prepare = added("align", component, harness.watch(file))
        harness.finish(stage, work_dir, prepare=prepare)
        seen[stage] = torch.load(file)
    trainable = seen["align"]["trainable"]
    assert {name.split(".")[0] for name in trainable} == {component, PROJECTOR}
    changed = set(harness.differing(seen["align"]["before"], seen["align"]["after"]))
    assert names_of(component, changed) and changed <= trainable
    written = load_file(work_dir / "align" / component / "model.safetensors")
    after = {_bare(k): v for k, v in seen["align"]["after"].items() if k.startswith(component)}
    assert harness.differing({_bare(k): v for k, v in written.items()}, after) == []
    begun = seen["tune"]["before"]
    assert names_of(component, begun)
    for name in names_of(component, begun):
        expected = after[_bare(name)]
        assert torch.equal(begun[name], expected.to(begun[name].dtype))


def test_an_adapter_in_align_is_answered_with_the_setting_that_it_needs(reference, tmp_path):
    harness.copy_stage(reference(FULL).work_dir, tmp_path / "run", "proxy")
    prepare = added("align", LLM_ADAPTER, lambda: None)
    message = harness.refusal("align", tmp_path / "run", prepare=prepare)
    assert "Stage align trains llm_adapter" in message and "align.lora is not a setting" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": ("visual_encodr",)}, "did you mean 'visual_encoder'"),
        ({"trains": (VISUAL_ENCODER,)}, "trains visual_encoder, which it does not build"),
        ({"builds": (LLM, LLM_ADAPTER), "trains": (LLM, LLM_ADAPTER)}, "choose one of them"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes, message):
    row = {
        "name": "x",
        "sample_format": "chat",
        "builds": (LLM,),
        "loads": {},
        "trains": (),
    }
    assert Stage(**row)
    with pytest.raises(DPAError, match=message):
        Stage(**row | changes)
