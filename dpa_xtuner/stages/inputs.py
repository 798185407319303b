"""A stage's inputs: components of earlier stages, or a projector that the config names.

They must belong to the run's models, by the provenance that lies next to them.
"""

from collections.abc import Mapping
from pathlib import Path

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import file_sha256
from dpa_xtuner.layout import PROVENANCE_FILE
from dpa_xtuner.model.projectors import read_projector
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.artifacts import (
    KIND,
    is_finished,
    read_component_provenance,
    read_provenance,
    refuse_foreign,
    trained_key,
)
from dpa_xtuner.stages.components import LLM, PROJECTOR, PUBLISHED
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import differences
from dpa_xtuner.stages.table import Stage

_FILES = (PROVENANCE_FILE, "config.json", "model.safetensors")


def check_inputs(run: Run, stage: Stage, published: dict[str, dict]) -> None:
    """Check that a stage's inputs are there and belong to the run's models.

    Args:
        run: the run.
        stage: the row of the stage table.
        published: provenance of the LLM and the encoder that the config names.

    Raises:
        DPAError: an earlier stage has not written an input, ``tune.init_projector`` is not a
            projector of a stage, or an input belongs to another visual encoder, LLM or projector.
    """
    for component, path in stage.loads.items():
        folder, given = run.work_dir / path, Path(path).is_absolute()
        if given:  # by tune.init_projector
            _refuse_no_projector(folder)
        else:
            _refuse_unfinished(stage, component, folder)
        provenance = provenance_of_loaded(folder, run.settings.llm_name_or_path)
        refuse_foreign(folder, provenance, published, "architecture")
        if given:
            _refuse_other_kind(run, folder, provenance)


def _refuse_unfinished(stage: Stage, component: str, folder: Path) -> None:
    writer, finished = folder.parent.name, is_finished(folder.parent)
    if not finished or not folder.is_dir():
        what = "does not exist" if finished else "is not finished"
        raise DPAError(
            f"Stage {stage.name} starts from the {component} of stage {writer}, but {folder} "
            f"{what}. Run DPA_STAGE={writer} first, or all stages without DPA_STAGE."
        )


def _refuse_other_kind(run: Run, folder: Path, provenance: dict) -> None:
    # A rehearsal's stand-in, and a projector of an older version, don't say their precision.
    trained_in = Precision(provenance.get("precision", run.precision.name))
    if trained_in.fingerprint_dtype != run.precision.fingerprint_dtype:
        raise DPAError(
            f"tune.init_projector={str(folder)!r} was trained in precision={trained_in.name!r}, "
            f"and this run computes in {run.precision.name!r}: weights rounded to another type "
            f"can't be recognised. Set precision={trained_in.name!r}, on a device that has it."
        )
    now = {
        "encoder": run.settings.encoder,
        "model.visual_select_layer": run.cfg.model.get("visual_select_layer"),
    }
    before = {key: provenance.get(key.removeprefix("model.")) for key in now}
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


def provenance_of_loaded(folder: Path, llm: str) -> dict:
    """Read the provenance of an input, with the LLM and the encoder that belong to it.

    A component belongs to the models it was trained on. A projector of tune was trained while these
    changed, so it belongs to the models that the same stage trained. The ``dpa.json`` of the LLM
    must say so; an encoder is known by its fingerprint.

    Args:
        folder: folder of the component, written by a stage.
        llm: the run's ``llm_name_or_path``.

    Raises:
        DPAError: there is no ``dpa.json``, or the LLM was not tuned together with the projector.
    """
    provenance = read_component_provenance(folder)
    if provenance.get(KIND) != PROJECTOR or "train_llm" not in provenance.get("settings", {}):
        return provenance
    tuned, together = _provenance_of_llm(llm), folder.parent / LLM
    if reason := _not_together(folder, provenance, llm, tuned):
        by = f", which python tools/export.py {provenance['config']} --format llm writes"
        raise DPAError(
            f"The projector {folder} was tuned together with an LLM, but llm_name_or_path={llm!r} "
            f"is not that LLM: {reason}. Set llm_name_or_path to {together}"
            f"{by * (provenance['settings']['train_llm'] == 'lora')}."
        )
    left = {component: provenance.get(trained_key(component)) for component in PUBLISHED}
    # A LoRA stage trained an adapter: only the LLM's own dpa.json has the LLM's fingerprint.
    left[LLM] = tuned[trained_key(LLM)]
    return provenance | {
        component: provenance[component]
        | {"name": str(folder.parent / component), "fingerprint": trained}
        for component, trained in left.items()
        if trained is not None
    }


def _provenance_of_llm(llm: str) -> dict:
    return read_provenance(Path(llm), "Restore it, or write the LLM again.")


def _not_together(folder: Path, projector: dict, llm: str, tuned: dict) -> str:
    """Say why an LLM is not the one that a projector was tuned with; nothing if it is."""
    began = f"the projector's began as {projector[LLM]['name']}"
    if not tuned:
        return f"it has no {PROVENANCE_FILE} of a stage that tuned it ({began})"
    if tuned.get(KIND) == LLM:
        llms, projectors = ({k: v for k, v in one.items() if k not in (KIND, "shapes")}
                            for one in (tuned, projector))  # fmt: skip
        if changes := differences(llms, projectors):
            listed = "; ".join(f"{key}: {a}, the projector's {b}" for key, a, b in changes[:3])
            return f"stage {tuned.get('stage')} of another run or step wrote it ({listed})"
    elif tuned.get("format") == LLM:
        name = f"{projector['stage']}/{PROJECTOR}/model.safetensors"
        digest = file_sha256(folder / "model.safetensors")
        if tuned.get("weights", {}).get(name) != digest:
            return f"it was exported from another run or checkpoint, {tuned.get('run')} ({began})"
    else:
        what = tuned.get(KIND) or f"an export in format {tuned.get('format')}"
        return f"it holds {what}, not an LLM"
    if trained_key(LLM) not in tuned:
        return (
            f"its {PROVENANCE_FILE} is of an older version and does not say which weights were "
            f"trained; write it again with python tools/export.py {projector['config']} "
            f"--format llm -o FOLDER"
        )
    return ""


def lineage(folder: Path, llm: str) -> dict:
    """Collect the provenance of a further round's inputs, back to the first round.

    Args:
        folder: folder of the projector.
        llm: the run's ``llm_name_or_path``.
    """
    projector, tuned = read_component_provenance(folder), _provenance_of_llm(llm)
    return {
        PROJECTOR: {key: value for key, value in projector.items() if key != "shapes"},
        LLM: {key: tuned[key] for key in (trained_key(LLM), "weights") if key in tuned},
    }


def input_hashes(inputs: Mapping[str, Path]) -> dict[str, str]:
    """Hash (SHA-256) the weight files of a stage's inputs, by component/file.

    Args:
        inputs: component -> its folder.
    """
    return {
        f"{component}/{file.name}": file_sha256(file)
        for component, folder in inputs.items()
        for file in sorted(folder.glob("*.safetensors"))
    }
