"""What both models do with their LLM: load it, adapt it, ask it for scores."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path

import torch
from mmengine.config import ConfigDict
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from xtuner.model.modules.dispatch import SUPPORT_FLASH2
from xtuner.model.utils import LoadWoInit, find_all_linear_names, traverse_dict
from xtuner.registry import BUILDER
from xtuner.utils import IGNORE_INDEX

from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import TokenScores, token_scores
from dpa_xtuner.model.adapter import read_adapter
from dpa_xtuner.model.configs import model_class, options_refused
from dpa_xtuner.model.last_layer import only_read
from dpa_xtuner.model.packing import depends_on_length, pack, takes_pairs
from dpa_xtuner.model.replaced import forward_replaced


def load(cfg: dict | nn.Module) -> nn.Module:
    """Build an LLM or encoder for training; a module is returned as it is.

    FlashAttention-2 is chosen where it is installed, there is a GPU, the model knows it and
    the config does not say otherwise; without it, the eager attention for a model that caps its
    attention scores (Gemma-2), which SDPA leaves uncapped (transformers 4.48).

    Args:
        cfg: a config dict whose ``type`` is a ``from_pretrained``, or a module.

    Raises:
        DPAError: as :func:`load_pretrained`.
    """
    if isinstance(cfg, nn.Module):
        return cfg
    owner = model_class(cfg)
    knows_flash = getattr(owner, "_supports_flash_attn_2", False)
    if SUPPORT_FLASH2 and knows_flash and torch.cuda.is_available():
        cfg.setdefault("attn_implementation", "flash_attention_2")
    elif _caps_attention(owner):
        cfg.setdefault("attn_implementation", "eager")
    return load_pretrained(cfg)


def load_pretrained(cfg: dict, **more) -> nn.Module:
    """Load an LLM or encoder with all its weights.

    Args:
        cfg: a config dict whose ``type`` is a ``from_pretrained``.
        more: other arguments, which go before those of the config.

    Raises:
        DPAError: it does not take one of the arguments or its value, or weights are missing.
    """
    options = ConfigDict(cfg).to_dict() | more
    with LoadWoInit(), options_refused("model"):
        traverse_dict(options)  # "torch.bfloat16" to the dtype
        built, info = BUILDER.build(options | {"output_loading_info": True})
    if info["missing_keys"]:  # transformers only warns, and without initialisation they are noise
        missing = sorted(info["missing_keys"])
        raise DPAError(
            f"{cfg['pretrained_model_name_or_path']} lacks {len(missing)} weights of a "
            f"{type(built).__name__}: {', '.join(missing[:5])}. Is it another model's folder?"
        )
    return built


def fill(module: nn.Module, state: dict[str, Tensor], path: Path | str) -> None:
    """Give a module the weights of a checkpoint, uncopied.

    Args:
        module: those of its parameters that are trained have to be in the checkpoint. It may be
            without memory (on the meta device).
        state: names as in the module.
        path: of the checkpoint, for the message.

    Raises:
        DPAError: weights are missing or unknown.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    wrong = sorted((trained - state.keys()) | (state.keys() - module.state_dict().keys()))
    if wrong:
        raise DPAError(
            f"{path} does not fit a {type(module).__name__}: {len(wrong)} weights are missing or "
            f"unknown ({', '.join(wrong[:5])}). Is it a checkpoint of this config?"
        )
    module.load_state_dict(state, strict=False, assign=True)
    if hasattr(module, "tie_weights"):
        module.tie_weights()


def _caps_attention(owner: type) -> bool:
    config = getattr(owner, "config_class", None)
    return config is not None and "attn_logit_softcapping" in signature(config).parameters


def add_lora(llm: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """Freeze ``llm`` and give it LoRA on every linear layer but the head.

    Unlike peft's preparation for quantised training, which XTuner applies to every LoRA
    model, the frozen weights keep their dtype: float32 copies of a bfloat16 LLM would
    double its memory for nothing.

    Args:
        llm: not yet wrapped by peft.
        lora: its ``target_modules`` is filled in where it is None.
    """
    llm.requires_grad_(False)
    if lora.target_modules is None:
        head = llm.get_output_embeddings()
        names = find_all_linear_names(llm)
        lora.target_modules = sorted(n for n in names if getattr(llm, n, None) is not head)
    return get_peft_model(llm, lora)


def is_quantised(llm: PreTrainedModel) -> bool:
    """Whether its weights were quantised on loading, or are published so."""
    return getattr(llm, "is_quantized", False)


def merge_adapter(llm: PreTrainedModel, folder: str) -> PreTrainedModel | PeftModel:
    """Add a PEFT LoRA adapter to the weights of ``llm``, and leave no trace of peft.

    Rounded to 4 bit again, the sum would be another model than was trained: where the LLM
    is quantised, the adapter stays beside the weights, frozen, and without its dropout.

    Args:
        llm: the model the adapter was trained on; changed in place.
        folder: a PEFT adapter folder.

    Returns:
        The merged model, of the class of ``llm``; for a quantised one, peft's wrapping of it.
    """
    if is_quantised(llm):
        llm.requires_grad_(False)
        config = PeftConfig.from_pretrained(folder)
        config.lora_dropout = 0.0
        return PeftModel.from_pretrained(llm, folder, config=config)
    read_adapter(folder).add_to(llm)
    return llm


def token_scores_of(
    llm: PreTrainedModel | PeftModel, hidden: Tensor, targets: Tensor
) -> TokenScores:
    """Ask the LLM's head about the tokens that follow ``hidden``.

    The head is called as a module, with the chunked computation in place of its own forward
    pass, so that DeepSpeed ZeRO-3 gathers its parameters once for all chunks and reduces
    their gradients.

    Args:
        llm: the LLM, wrapped by peft or not.
        hidden: (N, H), the decoder's last hidden states.
        targets: (N,) int64, the token that comes next.

    Raises:
        DPAError: as :func:`output_head`.
    """
    head = output_head(llm)
    softcap = getattr(base_model(llm).config, "final_logit_softcapping", None)  # Gemma-2

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(token_scores(hidden, targets, head.weight, head.bias, softcap))

    with forward_replaced(head, forward):
        return TokenScores(*head(hidden))


def output_head(llm: PreTrainedModel | PeftModel) -> nn.Linear:
    """The LLM's head: its last linear layer.

    Raises:
        DPAError: it is not a plain linear layer.
    """
    base = base_model(llm)
    head = base.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):  # peft's copy of a head that it trains
        head = head.modules_to_save[head.active_adapter]
    if type(head) is not nn.Linear:
        raise DPAError(
            f"The head of {type(base).__name__} is a {type(head).__name__}, and only nn.Linear "
            f"is supported: leave the head out of LoRA's target_modules and of quantisation."
        )
    return head


def base_model(llm: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The LLM without peft's wrapping, its adapter layers still in it."""
    return llm.get_base_model() if isinstance(llm, PeftModel) else llm


def decode(llm: PreTrainedModel | PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states (B, T, H) of the LLM's decoder for what it takes."""
    return base_model(llm).get_decoder()(**inputs, use_cache=False).last_hidden_state


def supervised_places(labels: Tensor) -> Tensor:
    """(B, T - 1) bool, true where ``labels`` (B, T) supervise the token *after* a position."""
    return labels[:, 1:] != IGNORE_INDEX


def supervised_scores(
    llm: PreTrainedModel | PeftModel, inputs: dict[str, Tensor], data: dict
) -> TokenScores:
    """Scores of a batch's N supervised tokens.

    The head is most of a small model's step, and most positions (images, prompts, padding)
    need no logits, so the head sees the supervised positions and no others.

    Args:
        llm: the LLM, wrapped by peft or not.
        inputs: what its decoder takes: ``attention_mask`` and ``position_ids`` (B, T) and
            ``input_ids`` (B, T) or ``inputs_embeds`` (B, T, H).
        data: its ``labels`` (B, T) int64, :data:`IGNORE_INDEX` where a token is not supervised,
            and ``ids``, the records' names.

    Raises:
        DPAError: a hidden state is not finite; the message names the samples.
    """
    supervised = supervised_places(data["labels"])
    laid, places = _without_padding(llm, inputs)
    places = places[:, :-1][supervised]  # (N,), of the tokens before
    read = torch.zeros(laid["position_ids"].shape, dtype=torch.bool, device=places.device)
    read.view(-1)[places] = True
    with only_read(base_model(llm).get_decoder(), read):
        hidden = decode(llm, laid).flatten(0, 1)[places]  # (N, H)

    def alone() -> Tensor:
        return decode(llm, inputs)[:, :-1][supervised]

    check_finite(llm, hidden, supervised, data["ids"], "", alone)
    return token_scores_of(llm, hidden, data["labels"][:, 1:][supervised])


def _without_padding(
    llm: PreTrainedModel | PeftModel, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    # Inputs of fewer rows, where samples fit side by side; and where each token went in the
    # flattened rows, (B, T). Modelling code that is not transformers' may take no mask of pairs.
    mask = inputs["attention_mask"].bool()
    base = base_model(llm)
    places = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    ours = type(base).__module__.startswith("transformers.") and takes_pairs(base.config)
    if not ours or depends_on_length(base.config, mask.shape[1]):
        return inputs, places
    packed = pack(mask, base.config.hidden_size)
    if packed.segments.numel() == mask.numel():
        return inputs, places
    tokens = {key: value for key, value in inputs.items() if key != "attention_mask"}
    dtype = llm.get_input_embeddings().weight.dtype
    laid = packed.lay_out(tokens, mask) | {"attention_mask": packed.pairs(dtype)}
    return laid, places.masked_scatter(mask, packed.slots)


def check_finite(
    llm: nn.Module,
    hidden: Tensor,
    supervised: Tensor,
    ids: list[str],
    where: str,
    alone: Callable[[], Tensor],
) -> None:
    """Refuse hidden states that would make the loss, and then every weight, NaN.

    A spoilt sample spoils its whole row, since 0 x NaN is NaN: so that the message names no
    neighbour, they are asked for again with a row for each sample. Not under ZeRO-3, where the
    other ranks would not take part.

    Args:
        llm: the LLM.
        hidden: (N, H).
        supervised: (B, T) bool with N true places.
        ids: of the B samples.
        where: of which pass, for the message.
        alone: computes ``hidden`` with each sample in a row of its own.

    Raises:
        DPAError: the message names the samples.
    """
    finite = torch.isfinite(hidden).all(-1)
    if finite.all():
        return
    if not any(hasattr(parameter, "ds_id") for parameter in llm.parameters()):
        with torch.no_grad():
            among_own = torch.isfinite(alone()).all(-1)
        finite = finite if among_own.all() else among_own
    rows = supervised.nonzero()[:, 0][~finite].unique().tolist()
    names = ", ".join(repr(ids[row]) for row in rows)
    raise DPAError(
        f"The LLM's hidden states{where} are not finite (NaN or infinite) for the samples {names}. "
        f"Where all samples are named, the weights themselves are spoilt: lower the learning "
        f"rate, resume from the last checkpoint, or train in bfloat16 rather than float16. Where "
        f"some are, look at these samples."
    )
