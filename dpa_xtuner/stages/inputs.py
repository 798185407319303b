"""What a stage begins with: what earlier stages wrote, or a projector that the config gives."""

from pathlib import Path

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import file_sha256
from dpa_xtuner.layout import PROVENANCE_FILE
from dpa_xtuner.model.projectors import read_projector
from dpa_xtuner.stages.artifacts import (
    KIND,
    is_finished,
    read_origin,
    read_provenance,
    refuse_foreign,
    trained_key,
)
from dpa_xtuner.stages.components import LLM, PROJECTOR, PUBLISHED
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import differences
from dpa_xtuner.stages.table import Stage

_FILES = (PROVENANCE_FILE, "config.json", "model.safetensors")


def check_inputs(run: Run, stage: Stage) -> None:
    """Refuse what a stage would begin with if it is missing, or belongs to other models.

    Args:
        run: the run.
        stage: the row of the stage table.

    Raises:
        DPAError: an earlier stage has not written it, ``tune.init_projector`` is no projector that
            a stage wrote, or it was made for another visual encoder, LLM or projector.
    """
    own = {component: run.facts(component) for component in PUBLISHED if component in stage.builds}
    for component, place in stage.loads.items():
        folder, given = run.work_dir / place, Path(place).is_absolute()
        if given:  # by tune.init_projector
            _refuse_no_projector(folder)
        else:
            _refuse_unfinished(stage, component, folder)
        record = record_of_loaded(folder, run.settings.llm_name_or_path)
        refuse_foreign(folder, record, own, "architecture")
        if given:
            _refuse_other_kind(run, folder, record)


def _refuse_unfinished(stage: Stage, component: str, folder: Path) -> None:
    writer, finished = folder.parent.name, is_finished(folder.parent)
    if not finished or not folder.is_dir():
        what = "does not exist" if finished else "is not finished"
        raise DPAError(
            f"Stage {stage.name} starts from the {component} of stage {writer}, but {folder} "
            f"{what}. Run DPA_STAGE={writer} first, or all stages without DPA_STAGE."
        )


def _refuse_other_kind(run: Run, folder: Path, record: dict) -> None:
    now = {
        "encoder": run.settings.encoder,
        "model.visual_select_layer": run.cfg.model.get("visual_select_layer"),
    }
    before = {key: record.get(key.removeprefix("model.")) for key in now}
    changes = [f"{key}: was {old}, is {new}" for key, old, new in differences(before, now)]
    if changes:
        raise DPAError(
            f"tune.init_projector={str(folder)!r} was trained with another visual encoder "
            f"({'; '.join(changes)}). Set it as it was trained."
        )
    read_projector(run.projector, str(folder))


def _refuse_no_projector(folder: Path) -> None:
    where = f"tune.init_projector={str(folder)!r}"
    advice = (
        "Give the folder of a projector that a stage wrote, such as work_dirs/RUN/tune/projector "
        "or work_dirs/RUN/align/projector."
    )
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DPAError(f"{where} {what}. {advice}")
    if missing := [name for name in _FILES if not (folder / name).is_file()]:
        raise DPAError(f"{where} has no {', '.join(missing)}. {advice}")
    holds = read_provenance(folder, advice).get(KIND)
    if holds != PROJECTOR:
        raise DPAError(f"{where} holds {holds or 'an export'}, not a projector. {advice}")


def record_of_loaded(folder: Path, llm: str) -> dict:
    """The record of a component that a stage begins with, naming the models that belong to it.

    Those are the LLM and the encoder it was trained on. Only a projector of tune was trained while
    they changed: to it belong those that the same stage trained. An LLM's own record has to say
    so; an encoder is known by its fingerprint.

    Args:
        folder: of the component, as a stage wrote it.
        llm: the run's ``llm_name_or_path``.

    Raises:
        DPAError: there is no record, or the LLM was not tuned together with the projector.
    """
    record = read_origin(folder)
    if record.get(KIND) != PROJECTOR or "train_llm" not in record.get("settings", {}):
        return record
    tuned, together = _record_of_llm(llm), folder.parent / LLM
    if reason := _not_together(folder, record, llm, tuned):
        by = f", which python tools/export.py {record['config']} --format llm writes"
        raise DPAError(
            f"The projector {folder} was tuned together with an LLM, and llm_name_or_path={llm!r} "
            f"is not that LLM: {reason}. Set llm_name_or_path to {together}"
            f"{by * (record['settings']['train_llm'] == 'lora')}."
        )
    left = {component: record.get(trained_key(component)) for component in PUBLISHED}
    left[LLM] = tuned[trained_key(LLM)]  # a record of an adapter says nothing of the LLM
    return record | {
        component: record[component]
        | {"name": str(folder.parent / component), "fingerprint": trained}
        for component, trained in left.items()
        if trained is not None
    }


def _record_of_llm(llm: str) -> dict:
    return read_provenance(Path(llm), "Restore it, or write the LLM again.")


def _not_together(folder: Path, record: dict, llm: str, tuned: dict) -> str:
    """Why an LLM is not the one that a projector was tuned with; nothing where it is."""
    began = f"the projector's began as {record[LLM]['name']}"
    if not tuned:
        return f"it has no {PROVENANCE_FILE} of a stage that tuned it ({began})"
    if tuned.get(KIND) == LLM:
        own, its = ({k: v for k, v in one.items() if k not in (KIND, "shapes")}
                    for one in (tuned, record))  # fmt: skip
        if changes := differences(own, its):
            listed = "; ".join(f"{key}: {a}, the projector's {b}" for key, a, b in changes[:3])
            return f"stage {tuned.get('stage')} of another run or step wrote it ({listed})"
    elif tuned.get("format") == LLM:
        name = f"{record['stage']}/{PROJECTOR}/model.safetensors"
        digest = file_sha256(folder / "model.safetensors")
        if tuned.get("weights", {}).get(name) != digest:
            return f"it was exported from another run or checkpoint, {tuned.get('run')} ({began})"
    else:
        what = tuned.get(KIND) or f"an export in format {tuned.get('format')}"
        return f"it holds {what}, not an LLM"
    if trained_key(LLM) not in tuned:
        return (
            f"its {PROVENANCE_FILE} is of an older version and does not say which weights were "
            f"trained; write it again with python tools/export.py {record['config']} --format llm "
            f"-o FOLDER"
        )
    return ""


def lineage(folder: Path, llm: str) -> dict:
    """What a further round begins with, and what that was made from, back to the first round.

    Args:
        folder: of the projector.
        llm: the run's ``llm_name_or_path``.
    """
    projector, tuned = read_origin(folder), _record_of_llm(llm)
    return {
        PROJECTOR: {key: value for key, value in projector.items() if key != "shapes"},
        LLM: {key: tuned[key] for key in (trained_key(LLM), "weights") if key in tuned},
    }


def input_hashes(stage: Stage, work_dir: Path) -> dict[str, str]:
    """SHA-256 of the weight files that a stage loads and earlier ones wrote, by component/file."""
    return {
        f"{component}/{file.name}": file_sha256(file)
        for component, folder in stage.loads.items()
        for file in sorted((work_dir / folder).glob("*.safetensors"))
    }
