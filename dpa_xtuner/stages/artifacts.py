"""What a stage writes for the next: whole folders, each with a record of where it came from."""

import json
from pathlib import Path

from mmengine.dist import is_main_process
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import whole_folder, write_json
from dpa_xtuner.layout import PROVENANCE_FILE as ORIGIN
from dpa_xtuner.model.fingerprint import gathered
from dpa_xtuner.model.llm_folder import save_llm


def save_part(
    model: nn.Module,
    part: str,
    folder: Path,
    origin: dict,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a trained part as Hugging Face reads it, with its record.

    Every rank must call it, since ZeRO-3 gathers; rank 0 writes. The LLM becomes a
    ``from_pretrained`` folder with its tokenizer, the adapter a PEFT folder, the projector a
    folder as XTuner's own conversion writes it; all weights are safetensors.

    Args:
        model: the stage's model, not wrapped by DDP or DeepSpeed.
        part: ``llm``, ``llm_adapter`` or ``projector``.
        folder: where to; replaced where it exists.
        origin: goes into the record beside the tensors' shapes.
        tokenizer: the LLM's; read where it is the LLM that is written.
    """
    module = model.projector if part == "projector" else model.llm
    state = _state_dict(module, trainable_only=isinstance(module, PeftModel))
    if not is_main_process():
        return
    with whole_folder(folder) as partial:
        if part == "llm":
            save_llm(module, tokenizer, partial, state_dict=state)
        else:
            # peft would look for the base model's config on a hub.
            extra = {"save_embedding_layers": False} if isinstance(module, PeftModel) else {}
            module.save_pretrained(partial, state_dict=state, **extra)
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        write_json(partial / ORIGIN, {"part": part, **origin, "shapes": shapes})


def read_origin(folder: Path) -> dict:
    """The record in a folder that :func:`save_part` wrote.

    Raises:
        DPAError: the folder or its record is missing or broken.
    """
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DPAError(
            f"{folder} was not written by a stage of DPA: its {ORIGIN} can't be read ({error}). "
            f"Run the stage that writes it first: DPA_STAGE={folder.parent.name}."
        ) from None


def refuse_foreign(folder: Path, origin: dict, own: dict, what: str) -> None:
    """Refuse a part that was trained on another LLM or encoder.

    Args:
        folder: where the part lies, for the message.
        origin: its record.
        own: side -> this run's facts about it, e.g. ``{"llm": {"name": ..., "fingerprint": ...}}``.
        what: the fact to compare, ``architecture`` or ``fingerprint``.

    Raises:
        DPAError: they differ; both sides are named.
    """
    for side, facts in own.items():
        theirs = origin.get(side)
        if theirs is not None and theirs[what] != facts[what]:
            raise DPAError(
                f"{folder} belongs to another {side}: it was trained with "
                f"{theirs['name']} ({what} {_short(theirs[what])}), this run uses "
                f"{facts['name']} ({what} {_short(facts[what])}). Use the {side} it was trained "
                f"with, or another --work-dir."
            )


def _short(fact) -> str:
    return fact[:12] if isinstance(fact, str) else json.dumps(fact)


def _state_dict(module: nn.Module, trainable_only: bool) -> dict[str, Tensor]:
    state = {}
    for name, parameter in module.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        with gathered([parameter]):
            if is_main_process():
                state[name] = parameter.detach().to("cpu", copy=True)
    return state
