"""Loads an exported LLaVA, or any other LLaVA folder, with all its weights."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from mmengine.logging import print_log
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.folder import check_llava, computing_dtype
from dpa_xtuner.model.configs import caps_attention, caps_logits
from dpa_xtuner.versions import LLAVA_HOLDS_AN_LLM


def load_llava(path: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Load a folder's model, in ``computing_dtype`` and not yet on the device, and its processor.

    The LLM's attention is FlashAttention-2 on a GPU where that is installed. Otherwise it is
    transformers' choice, or eager if the scores are capped (Gemma-2), since SDPA ignores the cap.

    Args:
        path: the folder.
        device: where the model will compute.

    Raises:
        DPAError: it is not a LLaVA folder, its tokenizer has no image token, or weights are
            missing.
    """
    check_llava(Path(path))
    config = LlavaConfig.from_pretrained(path)
    if caps_logits(config.text_config) and not LLAVA_HOLDS_AN_LLM:
        raise DPAError(
            f"{path}: its LLM caps its logits, and LLaVA does not in transformers "
            f"{transformers.__version__}: it would be another model. Use one before 4.52."
        )
    processor = AutoProcessor.from_pretrained(path)
    processor.image_token = getattr(processor, "image_token", "<image>")
    image_id = config.image_token_index
    if processor.tokenizer.convert_tokens_to_ids(processor.image_token) != image_id:
        raise DPAError(
            f"{path}: its tokenizer has no token {processor.image_token!r} with the id "
            f"{image_id}, the image_token_index of config.json."
        )
    dtype = computing_dtype(path, device.type)
    for inner in (config.text_config, config.vision_config):
        # transformers 4.48 saves this key with some models, and then uses eager attention.
        inner._attn_implementation_autoset = False
    model = load_whole(
        LlavaForConditionalGeneration,
        path,
        config=config,
        torch_dtype=dtype,
        low_cpu_mem_usage=True,
        attn_implementation={"text_config": _attention(config, dtype, device)},
    )
    return model, processor


def image_features(llava: Any, pixel_values: Tensor) -> Tensor:
    """Turn pictures (N, 3, H, W) into vectors for the LLM, (N, image tokens, its width)."""
    found = llava.get_image_features(
        pixel_values.to(llava.device, llava.dtype),
        vision_feature_layer=llava.config.vision_feature_layer,
        vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
    )
    # A tensor; since transformers 4.52 a list of images, and since 5 that in an output.
    return torch.stack(list(getattr(found, "pooler_output", found)))


def load_whole(kind: Any, path: str, **options: Any) -> PreTrainedModel:
    """Call ``kind.from_pretrained`` and refuse a folder that lacks weights.

    transformers would initialise missing weights at random.

    Args:
        kind: a model class of transformers, or an auto class.
        path: the folder.
        options: arguments of ``from_pretrained``.

    Raises:
        DPAError: weights are missing, or have another shape than the config says.
    """
    model, found = kind.from_pretrained(
        path, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    # On the meta device, transformers treats weights of equal size as tied, and misses none.
    left = [name for name, weight in model.state_dict().items() if weight.is_meta]
    lost = dict.fromkeys(sorted({*found["missing_keys"], *left}), "is missing")
    for name, there, wanted in found["mismatched_keys"]:
        lost[name] = f"has the shape {tuple(there)}, expected {tuple(wanted)}"
    if lost:
        raise DPAError(
            f"{path}: {len(lost)} weights are missing or have another shape than config.json says, "
            f"the first: {' '.join(next(iter(lost.items())))}. Copy or export the folder again."
        )
    if unknown := found["unexpected_keys"]:
        print_log(
            f"{path}: {len(unknown)} weights belong to no module of the model and are ignored, the "
            f"first: {min(unknown)}.",
            "current",
            logging.WARNING,
        )
    return model


def _attention(config: LlavaConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available():
        return "flash_attention_2"
    return "eager" if caps_attention(config.text_config) else None
