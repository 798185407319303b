"""The provenance of a stage's weights: written into its state file, and compared later."""

import json
from pathlib import Path
from typing import Any

from dpa_xtuner.data.formats import data_sha256
from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.configs import architecture
from dpa_xtuner.stages.build import constructor_of
from dpa_xtuner.stages.components import PUBLISHED
from dpa_xtuner.stages.inputs import check_inputs, input_hashes, lineage
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import Change, differences
from dpa_xtuner.stages.table import Stage


def provenance_of(run: Run, stage: Stage) -> dict[str, Any]:
    """Check a stage's inputs, and collect what its weights are made from, before it starts.

    Args:
        run: the run.
        stage: the row of the stage table.

    Raises:
        DPAError: the LLM or the encoder can't be found, an earlier stage has not written an input,
            ``tune.init_projector`` is not a projector of a stage, or an input belongs to another
            visual encoder, LLM or projector.
    """
    cfg, settings = run.cfg, run.settings
    published: dict[str, dict[str, Any]] = {
        component: {
            "name": component.name(settings),
            "architecture": architecture(run.config_of(component)),
        }
        for component in PUBLISHED
        if component in stage.builds
    }
    check_inputs(run, stage, published)
    stage_settings = settings.of_stage(stage.name)
    data = settings.data_of(stage.sample_format)
    wrapper = cfg.optim_wrapper
    found = {
        "stage": stage.name,
        "config": str(cfg.filename),
        "data": data.changing("weights") | {"sha256": [data_sha256(path) for path in data.files]},
        "seed": cfg.randomness.seed,
        "precision": run.precision.name,
        "settings": _of_stage(run, stage, "weights"),
        "optimizer": wrapper.optimizer.to_dict(),
        "paramwise_cfg": wrapper.get("paramwise_cfg"),
        "constructor": constructor_of(run, stage),
        "loads": input_hashes({c: run.work_dir / folder for c, folder in stage.loads.items()}),
        **published,
    }
    if (given := getattr(stage_settings, "init_projector", None)) is not None:
        found["initialised_from"] = lineage(Path(given), settings.llm_name_or_path)
    model = model_of(run, stage)
    found["settings"] |= model.pop("settings")
    return json.loads(json.dumps(found | model))  # as JSON reads it back: no tuples


def model_of(run: Run, stage: Stage) -> dict[str, Any]:
    """Collect the settings that a stage's training and its export must agree on.

    Args:
        run: the run.
        stage: the row of the stage table.
    """
    settings = run.settings
    found = {
        "prompt_template": settings.template if stage.sample_format == "chat" else "plain",
        "settings": _of_stage(run, stage, "model"),
    }
    if stage.sees_pictures:
        found |= settings.changing("model", leave_out={"prompt_template"})
        found["visual_select_layer"] = run.cfg.model.get("visual_select_layer")
    return json.loads(json.dumps(found))


def _of_stage(run: Run, stage: Stage, change: Change) -> dict[str, Any]:
    prefix, unused = f"{stage.name}.", run.settings.unused_settings
    left_out = {key.removeprefix(prefix).rstrip(".") for key in unused if key.startswith(prefix)}
    return run.settings.of_stage(stage.name).changing(change, left_out)


def refuse_changed(folder: Path, before: dict, now: dict, way_out: str) -> None:
    """Refuse a stage that was trained with other settings.

    Args:
        folder: folder of the stage, for the message.
        before: the provenance in its state file.
        now: the result of :func:`provenance_of` or :func:`model_of`.
        way_out: what to do, for the message.

    Raises:
        DPAError: they differ; lists the differences, one a line.
    """
    changes = [
        f"  {key}: was {old}, is {new}"
        for key, old, new in differences(before, now)
        # The place of the config file changes no weight, and a fingerprint is not a setting.
        if key != "config" and not key.endswith(".fingerprint")
    ]
    if changes:
        raise DPAError(
            f"{folder} was trained with settings that differ from the config's:\n"
            + "\n".join(changes)
            + f"\n{way_out}"
        )
