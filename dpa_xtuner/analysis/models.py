"""The model of a stage as it was trained, and the samples that it is looked at on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, DefaultScope

from dpa_xtuner.data import DPADataset
from dpa_xtuner.errors import DPAError
from dpa_xtuner.export.source import Source, read_source
from dpa_xtuner.export.weights import read_checkpoint
from dpa_xtuner.layout import ALIGN, STAGE_NAMES, TUNE
from dpa_xtuner.model.adapter import read_adapter
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.stages.artifacts import is_finished, read_state
from dpa_xtuner.stages.build import dataset_config, model_config, usable_data
from dpa_xtuner.stages.components import LLM_ADAPTER, PUBLISHED
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.table import Stage


def find_source(
    given: Path,
    stage: str | None = None,
    work_dir: Path | None = None,
    checkpoint: Path | None = None,
    options: dict | None = None,
) -> Source:
    """Find a stage of a run that sees pictures.

    Args:
        given: a DPA config, or the folder of a run, which knows its config and data.
        stage: its name; None for ``tune`` if that is finished, else for ``align``.
        work_dir: work dir of the run; None for ``work_dirs/<config's name>``.
        checkpoint: look at this in place of what the stage wrote.
        options: as of ``--cfg-options``.

    Raises:
        DPAError: the stage is not finished, or sees no picture; or as
            :func:`dpa_xtuner.export.source.read_source`.
    """
    if stage not in (None, *STAGE_NAMES):
        raise DPAError(f"--stage {stage!r} is no stage: give one of {', '.join(STAGE_NAMES)}.")
    if given.is_dir() and work_dir is not None:
        raise DPAError(
            f"{given} is the folder of a run, and --work-dir {work_dir} is given too: give one of "
            f"them, or a config and --work-dir."
        )
    base = given if given.is_dir() else Path(work_dir or f"work_dirs/{given.stem}")
    stage = stage or (TUNE if is_finished(base / TUNE) else ALIGN)
    config = _config_of(base / stage) if given.is_dir() else given
    if given.is_dir():
        options = _data_of(base / stage, stage) | (options or {})
    source = read_source(config, stage, base, checkpoint, options)
    if not source.stage.sees_pictures:
        raise DPAError(f"Stage {stage} sees no picture: give --stage {ALIGN} or {TUNE}.")
    return source


def _config_of(folder: Path) -> Path:
    config = read_state(folder).get("origin", {}).get("config")
    if config is None:
        raise DPAError(
            f"{folder.parent} is not the folder of a run in which {folder.name} has begun: give "
            f"a folder such as work_dirs/RUN, or a config."
        )
    if not Path(config).is_file():
        raise DPAError(
            f"{folder} was trained with {config}, which is not there. Go to the folder in which "
            f"it was trained, or give the config and --work-dir {folder.parent}."
        )
    return Path(config)


def _data_of(folder: Path, stage: str) -> dict[str, Any]:
    """Return the settings of the data that a stage was trained on, as options."""
    data = dict(read_state(folder)["origin"].get("data", {}))
    data.pop("sha256", None)
    return {f"{'instructions' if stage == TUNE else 'captions'}.{k}": v for k, v in data.items()}


def build_model(run: Run, stage: Stage, **changes: Any) -> Any:
    """Build a stage's model by the stage's own builder.

    Args:
        run: the run.
        stage: the row of the stage table.
        changes: arguments in place of those of the stage.
    """
    with DefaultScope.overwrite_default_scope("mmengine"):
        return MODELS.build(model_config(run, stage) | changes)


def trained_model(source: Source) -> DPALLaVAModel:
    """Build a stage's model with the weights that it left; frozen.

    Raises:
        DPAError: the checkpoint is not of this stage, or the published models have changed.
    """
    stage, inputs = source.stage, source.inputs()
    written = {name: path for name in stage.writes if (path := source.written(name))}
    places = inputs | written
    adapters = [found[LLM_ADAPTER] for found in (inputs, written) if LLM_ADAPTER in found]
    if adapters:  # the first is added by the model itself
        places[LLM_ADAPTER] = adapters[0]
    loads = {name: str(path.absolute()) for name, path in places.items()}
    row = stage if source.checkpoint else replace(stage, loads=loads, trains=())
    model = build_model(source.run, row, use_activation_checkpointing=False)
    for folder in adapters[1:]:
        read_adapter(folder).add_to(model.llm)
    for component in PUBLISHED:
        if component not in loads:
            source.refuse_other(component, model.fingerprints[component])
    if source.checkpoint:
        state = read_checkpoint(source.checkpoint)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        if wrong := sorted((state.keys() - model.state_dict().keys()) | (trained - state.keys())):
            raise DPAError(
                f"{source.checkpoint} is not of stage {stage.name} of this config: {len(wrong)} "
                f"weights are missing or unknown ({', '.join(wrong[:3])})."
            )
        model.load_state_dict(state, strict=False)
    return model.requires_grad_(False).eval().to(get_device())


def split_data(run: Run, stage: Stage) -> tuple[DPADataset, DPADataset | None]:
    """Build a stage's samples.

    Args:
        run: the run.
        stage: the row of the stage table.

    Returns:
        Those that are trained on, and those held out, None where none are.

    Raises:
        DPAError: too much of the data can't be used.
    """
    with DefaultScope.overwrite_default_scope("mmengine"):
        train = usable_data(run, stage)
        if not (count := train.cache_key["held_out"]):
            return train, None
        config = dataset_config(run, stage) | {"held_out": count, "split": "held_out"}
        return train, DATASETS.build(config)


def spread(total: int, count: int) -> list[int]:
    """Up to ``count`` of the numbers below ``total``, evenly spread."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
