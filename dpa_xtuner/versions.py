"""What transformers calls otherwise from one version to the next, told by asking and not by number.

Defects of other packages are mended in :mod:`dpa_xtuner.compat`; here are plain differences.
"""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

import dpa_xtuner
from dpa_xtuner.errors import DPAError

LLAVA_HOLDS_AN_LLM = not hasattr(transformers, "LlavaModel")
"""Whether a ``LlavaForConditionalGeneration`` holds an LLM with its head. Since transformers 4.52
it holds a decoder and a head of its own, without the LLM's cap on logits."""


TEXT_PART = (
    {"key_mapping": {r"^language_model\.model": "model"}}
    if hasattr(PreTrainedModel, "get_expanded_tied_weights_keys")
    else {}
)
"""How the text part of a multimodal Gemma-3 is loaded as an LLM. Before transformers 5 the LLM's
class finds it by itself."""


def require_transformers(since: str, what: str) -> None:
    """Refuse a model that the installed transformers is too old for.

    Raises:
        DPAError: it is older than ``since``.
    """
    installed = transformers.__version__
    if Version(installed) < Version(since):
        raise DPAError(
            f"{what} needs transformers {since} or newer; installed is {installed}. Install the "
            f"versions of constraints/default.txt, on Python 3.11 or 3.12 (README, Install)."
        )


def installed_versions() -> dict[str, str]:
    """Return the versions that are recorded with what a run writes, by package."""
    found = {"dpa_xtuner": dpa_xtuner.__version__, "torch": str(torch.__version__)}
    for package in ("transformers", "peft", "xtuner", "mmengine", "deepspeed"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def knows_flash_attention(model: Any) -> bool:
    """Whether a model class (or a loader of one) runs with FlashAttention-2.

    The class attribute was ``_supports_flash_attn_2`` before transformers 4.53.
    """
    return any(
        getattr(model, name, False) for name in ("_supports_flash_attn", "_supports_flash_attn_2")
    )


def embedding_scale(llm: Any) -> float:
    """Return the factor that image features need so that Gemma-2 is one model on all versions.

    Gemma-2 scales by the root of its hidden size: before transformers 5 in the decoder, whatever
    it is given, and since then in the embedding layer, so that image features spliced in between
    have to be scaled as well. Gemma-3 has always scaled in the embedding layer, and no features.
    """
    if llm.config.model_type != "gemma2":
        return 1.0
    return getattr(llm.get_input_embeddings(), "scalar_embed_scale", 1.0)


_NESTED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def llava_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a LLaVA by the names that its modules have, not by those that its files have.

    Since transformers 4.52 all but the head lies below ``model``; files keep the names from before.
    """
    if LLAVA_HOLDS_AN_LLM:
        return state
    renamed = {}
    for name, weight in state.items():
        old = next(prefix for prefix in _NESTED if name.startswith(prefix))
        renamed[_NESTED[old] + name.removeprefix(old)] = weight
    return renamed


def language_model(llava: Any) -> Any:
    """Return the LLM of a LLaVA, with its head; for one that caps its logits, with the cap."""
    if LLAVA_HOLDS_AN_LLM:
        return llava.language_model
    from transformers import AutoModelForCausalLM

    decoder = llava.model.language_model
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(decoder.config)
    llm.config, llm.model, llm.lm_head = decoder.config, decoder, llava.lm_head
    return llm.eval()


def published_prefix(module: nn.Module) -> str:
    """Return what stands before a weight's name in memory in the published files.

    Since transformers 5 a CLIP or SigLIP vision model has no ``vision_model`` inside; its files
    keep the names from before.
    """
    name = type(module).__name__
    inside = name in ("CLIPVisionModel", "SiglipVisionModel")
    return "vision_model." if inside and not hasattr(module, "vision_model") else ""
