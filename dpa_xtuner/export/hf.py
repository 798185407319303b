"""Writes a folder of transformers' LlavaForConditionalGeneration, with its processor."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AddedToken,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from xtuner.registry import BUILDER
from xtuner.utils import DEFAULT_IMAGE_TOKEN

from dpa_xtuner.errors import DPAError
from dpa_xtuner.export.chat_template import (
    chat_template,
    disagreements,
    end_of_turn,
    without_bos,
)
from dpa_xtuner.export.refusals import extra_tokens
from dpa_xtuner.export.source import Source
from dpa_xtuner.export.weights import StageWeights
from dpa_xtuner.files import write_json
from dpa_xtuner.model.configs import caps_attention
from dpa_xtuner.model.llm import fill
from dpa_xtuner.model.llm_folder import SAVED_AS_JSON, write_portably
from dpa_xtuner.stages.components import VISUAL_ENCODER
from dpa_xtuner.versions import llava_names, published_prefix

SHARD = "4GB"
# They resize, crop, rescale and normalise, each if it is asked to.
_CLIP_STEPS = ("CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor")
_PROJECTOR = {"model.0.": "linear_1.", "model.2.": "linear_2."}


def write_hf(weights: StageWeights, folder: Path) -> dict[str, Any]:
    """Write model, generation settings, tokenizer, image processor and chat template.

    Args:
        weights: the weights to write.
        folder: target folder; exists.

    Returns:
        Further entries of ``dpa.json``.

    Raises:
        DPAError: weights are missing or unknown, or the disk has no room for them.
    """
    source, dtype = weights.source, weights.dtype
    tokenizer = load_tokenizer(source)
    image_id = _add_image_token(tokenizer)
    llm, encoder = weights.llm(), weights.visual_encoder()
    grow(llm, image_id + 1)
    extra = extra_tokens(source)
    config = _config(source, llm, encoder, image_id, tokenizer, extra)
    state = _state(llm, encoder, weights.projector(), dtype)
    need_room(folder, state)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    state = llava_names(state)
    fill(model, state, f"The model of stage {source.stage.name}")
    model.generation_config = _generation(source, tokenizer, image_id)
    model.to(dtype)  # what config.json says
    # transformers 5 has other names in memory, and gives back those of files but for the encoder's.
    inside = {
        name.replace("vision_tower.", f"vision_tower.{published_prefix(encoder)}"): weight
        for name, weight in state.items()
    }
    model.save_pretrained(folder, state_dict=inside, max_shard_size=SHARD)
    jinja = chat_template(source.template, tokenizer)
    tokenizer.chat_template = jinja
    without_bos(tokenizer)
    image_processor = VISUAL_ENCODER.companion(source.run.cfg)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=extra,
        chat_template=jinja,
    ).save_pretrained(folder, **SAVED_AS_JSON)
    image_processor.save_pretrained(folder)
    if source.stage_settings.pad_image_to_square:
        _pad_by_itself(folder / "preprocessor_config.json")
    write_portably(folder, chat_template=jinja)
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    differs = disagreements(
        source.template, source.stage.sample_format, loaded, load_tokenizer(source)
    )
    return {"image_token_index": image_id, "template_differs": differs}


def _pad_by_itself(file: Path) -> None:
    """Have the image processor pad to a square, on versions of transformers that can.

    Without ``image_processor_type`` the folder gets the processor of its model type: LLaVA's own,
    which reads ``do_pad`` and pads in the mean colour; on transformers 4.48 CLIP's, which does not.
    All steps are named, since their defaults are CLIP's: the encoder's processor may crop nothing.

    Args:
        file: ``preprocessor_config.json``; a processor of other steps than CLIP's is left alone.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    kind = values.get("image_processor_type", "").removesuffix("Fast")
    if kind not in _CLIP_STEPS:
        return
    del values["image_processor_type"]
    size = values["size"]
    square = {side: size.get("shortest_edge", size.get("height")) for side in ("height", "width")}
    defaults = {"do_center_crop": False, "crop_size": square, "do_convert_rgb": True}
    write_json(file, defaults | values | {"do_pad": True})


def need_room(folder: Path, state: dict[str, Tensor]) -> None:
    """Refuse to write weights that the disk has no room for.

    Raises:
        DPAError: the disk has less room than the weights need.
    """
    size = sum(weight.numel() * weight.element_size() for weight in state.values())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DPAError(
            f"The weights take {size / 2**30:.1f} GB, but the disk of {folder} has "
            f"{free / 2**30:.1f} GB left. Make room, or export to another place with -o."
        )


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the training, padded on the left for generation."""
    tokenizer = BUILDER.build(source.run.cfg.tokenizer.to_dict())
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A tokenizer of no class of its own would give token_type_ids, which no decoder takes.
    names = ["input_ids", "attention_mask"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def _add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    token = AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)


def grow(llm: PreTrainedModel, rows: int) -> None:
    """Extend embeddings and head to at least ``rows`` rows, with zeros.

    A published embedding often has rows that no token uses; then nothing changes.
    """
    embeddings, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    new = rows - embeddings.num_embeddings
    if new <= 0:
        return
    tied = head.weight is embeddings.weight
    embeddings.weight = _with_rows(embeddings.weight, new)
    head.weight = embeddings.weight if tied else _with_rows(head.weight, new)
    if head.bias is not None:
        head.bias = _with_rows(head.bias, new)
    embeddings.num_embeddings = head.out_features = llm.config.vocab_size = rows


def _with_rows(weight: Tensor, new: int) -> nn.Parameter:
    zeros = weight.new_zeros((new, *weight.shape[1:]))
    return nn.Parameter(torch.cat([weight.data, zeros]), requires_grad=False)


def _config(
    source: Source,
    llm: PreTrainedModel,
    encoder: PreTrainedModel,
    image_id: int,
    tokenizer: PreTrainedTokenizerBase,
    extra: int,
) -> LlavaConfig:
    # A module that is saved with this set chooses no attention when it is loaded, and so gets the
    # eager one.
    llm.config._attn_implementation_autoset = caps_attention(llm.config)
    encoder.config._attn_implementation_autoset = False
    # vLLM finds the LLM by this name, which InternLM's configurations lack.
    llm.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(llm.config)].__name__]
    return LlavaConfig(
        vision_config=encoder.config,
        text_config=llm.config,
        image_token_index=image_id,
        image_seq_length=source.run.encoder_spec.tokens(source.run.encoder_config),
        vision_feature_layer=source.run.encoder_spec.layer,
        vision_feature_select_strategy="default" if extra else "full",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )


def _state(
    llm: PreTrainedModel, encoder: nn.Module, projector: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Rename all weights to LLaVA's names, and leave out a tied head."""
    tied = llm._tied_weights_keys or () if llm.config.tie_word_embeddings else ()
    state = {f"vision_tower.{name}": weight for name, weight in encoder.state_dict().items()}
    state |= {
        f"language_model.{name}": weight
        for name, weight in llm.state_dict().items()
        if name not in tied
    }
    for name, weight in projector.items():
        for ours, theirs in _PROJECTOR.items():
            name = name.replace(ours, f"multi_modal_projector.{theirs}")
        state[name] = weight.to(dtype)
    return {name: weight.contiguous() for name, weight in state.items()}


def _generation(
    source: Source, tokenizer: PreTrainedTokenizerBase, image_id: int
) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_of_turn(source.template, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[image_id],  # no training has set its row
    )
