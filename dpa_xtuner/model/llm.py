"""The LLM of both models: load it, adapt it, compute its log-probabilities."""

from inspect import signature
from pathlib import Path
from typing import cast
from unittest.mock import patch

import torch
from mmengine.config import ConfigDict
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from xtuner.model.modules.dispatch import SUPPORT_FLASH2
from xtuner.model.utils import LoadWoInit, find_all_linear_names, traverse_dict
from xtuner.registry import BUILDER

from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import TokenLogProbs, supervised_mask, token_log_probs
from dpa_xtuner.model.adapter import read_adapter
from dpa_xtuner.model.configs import model_class, options_refused
from dpa_xtuner.versions import knows_flash_attention


def load(cfg: dict | nn.Module) -> nn.Module:
    """Build an LLM or encoder for training; return a module unchanged.

    It uses FlashAttention-2 if that is installed, there is a GPU, the model supports it and the
    config does not say otherwise. Otherwise a model that caps its attention scores (Gemma-2) gets
    eager attention, since SDPA ignores the cap (transformers 4.48).

    Args:
        cfg: a config dict whose ``type`` is a ``from_pretrained``, or a module.

    Raises:
        DPAError: as :func:`load_pretrained`.
    """
    if isinstance(cfg, nn.Module):
        return cfg
    owner = model_class(cfg)
    if SUPPORT_FLASH2 and knows_flash_attention(owner) and torch.cuda.is_available():
        cfg.setdefault("attn_implementation", "flash_attention_2")
    elif _caps_attention(owner):
        cfg.setdefault("attn_implementation", "eager")
    return load_pretrained(cfg)


def load_pretrained(cfg: dict, **more) -> nn.Module:
    """Load an LLM or encoder with all its weights.

    Args:
        cfg: a config dict whose ``type`` is a ``from_pretrained``.
        more: further arguments, which override those of the config.

    Raises:
        DPAError: it does not take an argument or its value, or weights are missing.
    """
    options = ConfigDict(cfg).to_dict() | more
    with LoadWoInit(), options_refused("model"):
        traverse_dict(options)  # "torch.bfloat16" to the dtype
        built, info = BUILDER.build(options | {"output_loading_info": True})
    if "key_mapping" in options:  # of transformers 5, which would save by the names it has read
        built._weight_conversions = None
    if info["missing_keys"]:  # transformers only warns, and without initialisation they are noise
        missing = sorted(info["missing_keys"])
        raise DPAError(
            f"{cfg['pretrained_model_name_or_path']} lacks {len(missing)} weights of a "
            f"{type(built).__name__}: {', '.join(missing[:5])}. Is it another model's folder?"
        )
    return built


def fill(module: nn.Module, state: dict[str, Tensor], what: Path | str) -> None:
    """Load weights into a module, strictly and without copying them.

    Args:
        module: may be on the meta device. Weights of its frozen parameters may be missing.
        state: the weights, by their names in the module.
        what: the origin of the weights, for the message.

    Raises:
        DPAError: weights are missing or unknown, or have another shape.
    """
    asked = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    given = {name: tuple(weight.shape) for name, weight in state.items()}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if wrong := sorted(
        name for name in trained | given.keys() if given.get(name) != asked.get(name)
    ):
        raise DPAError(
            f"{what} does not fit a {type(module).__name__}: {len(wrong)} weights are missing, "
            f"unknown or of another shape ({', '.join(wrong[:5])}). Is it of this config?"
        )
    module.load_state_dict(state, strict=False, assign=True)
    if (tie := getattr(module, "tie_weights", None)) is not None:
        tie()


def _caps_attention(owner: type) -> bool:
    config = getattr(owner, "config_class", None)
    return config is not None and "attn_logit_softcapping" in signature(config).parameters


def add_lora(llm: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """Freeze ``llm`` and add LoRA to every linear layer but the head.

    The frozen weights keep their dtype. XTuner applies peft's preparation for quantised training
    to every LoRA model, whose float32 copies of a bfloat16 LLM would double its memory for nothing.

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


def merge_adapter(llm: PreTrainedModel, folder: str) -> PreTrainedModel | PeftModel:
    """Add a PEFT LoRA adapter to the weights of ``llm``, and remove peft's wrapping.

    On a quantised LLM, the adapter stays apart from the weights, frozen and without its dropout:
    their sum, rounded to 4 bit again, would not be the model that was trained.

    Args:
        llm: the model the adapter was trained on; changed in place.
        folder: a PEFT adapter folder.

    Returns:
        The merged model, of the class of ``llm``; for a quantised one, peft's wrapping of it.
    """
    trained = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    config = PeftConfig.from_pretrained(folder)
    config.lora_dropout = 0.0
    # peft draws random numbers for an adapter that it then reads. Both ways do so, so that a
    # projector that is drawn afterwards is the same with either.
    wrapped = PeftModel.from_pretrained(llm, folder, config=config)
    if getattr(llm, "is_quantized", False):  # on loading, or published so
        return wrapped
    llm = wrapped.unload()
    for parameter in trained:  # peft has frozen them
        parameter.requires_grad_()
    read_adapter(folder).add_to(llm)
    return llm


def supervised_log_probs(
    llm: PreTrainedModel | PeftModel, inputs: dict[str, Tensor], data: dict
) -> TokenLogProbs:
    """Compute the log-probabilities of a batch's N supervised tokens.

    Args:
        llm: the LLM, wrapped by peft or not.
        inputs: the decoder's inputs: ``attention_mask`` and ``position_ids`` (B, T) and
            ``input_ids`` (B, T) or ``inputs_embeds`` (B, T, H).
        data: ``labels`` (B, T) int64, :data:`dpa_xtuner.loss.IGNORE_INDEX` for tokens that are
            not supervised, and ``ids``, the record ids.

    Raises:
        DPAError: a hidden state is not finite; the message names the samples.
    """
    supervised = supervised_mask(data["labels"])  # (B, T - 1)
    # The head is most of a small model's step, and most positions (images, prompts, padding)
    # need no logits: ask it at the positions before supervised tokens alone. A mask as an index
    # makes a GPU wait each time; so find the places once.
    rows, columns = supervised.nonzero(as_tuple=True)  # (N,) each
    hidden = decode(llm, inputs)[rows, columns]  # (B, T, H) to (N, H)
    check_finite(hidden, supervised, data["ids"], "")
    return head_log_probs(llm, hidden, data["labels"][rows, columns + 1])


def decode(llm: PreTrainedModel | PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the last hidden states (B, T, H) of the LLM's decoder."""
    return base_model(llm).get_decoder()(**inputs, use_cache=False).last_hidden_state


def check_finite(hidden: Tensor, supervised: Tensor, ids: list[str], where: str) -> None:
    """Refuse hidden states that would make the loss, and then every weight, NaN.

    Args:
        hidden: (N, H).
        supervised: (B, T) bool with N true positions.
        ids: record ids of the B samples.
        where: the pass, for the message.

    Raises:
        DPAError: they are not finite; the message names the samples.
    """
    finite = torch.isfinite(hidden).all(-1)  # (N,)
    if finite.all():
        return
    samples = supervised.nonzero()[:, 0][~finite].unique().tolist()
    names = ", ".join(repr(ids[sample]) for sample in samples)
    raise DPAError(
        f"The LLM's hidden states{where} are not finite (NaN or infinite) for the samples {names}. "
        f"If that is every sample, the weights themselves are broken: lower the learning rate, "
        f"resume from the last checkpoint, or train in bfloat16 rather than float16. If it is "
        f"some of them, look at these samples."
    )


def head_log_probs(
    llm: PreTrainedModel | PeftModel, hidden: Tensor, targets: Tensor
) -> TokenLogProbs:
    """Compute by the LLM's head the log-probabilities of the tokens after ``hidden``.

    Args:
        llm: the LLM, wrapped by peft or not.
        hidden: (N, H), the decoder's last hidden states.
        targets: (N,) int64, the token that comes next.

    Raises:
        DPAError: as :func:`output_head`.
    """
    head = output_head(llm)
    softcap = getattr(base_model(llm).config, "final_logit_softcapping", None)  # Gemma-2

    def forward(hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(token_log_probs(hidden, targets, head.weight, head.bias, softcap))

    # The chunks are computed inside one call of the module, so that DeepSpeed ZeRO-3's hooks
    # gather its parameters once for all of them and reduce their gradients.
    with patch.object(head, "forward", forward):
        return TokenLogProbs(*head(hidden))


def output_head(llm: PreTrainedModel | PeftModel) -> nn.Linear:
    """Return the LLM's head: its last linear layer.

    Raises:
        DPAError: it is not a plain linear layer.
    """
    base = base_model(llm)
    head = base.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):  # peft's copy of a head that it trains
        head = head.modules_to_save[cast("str", head.active_adapter)]
    if type(head) is not nn.Linear:
        raise DPAError(
            f"The head of {type(base).__name__} is a {type(head).__name__}, and only nn.Linear "
            f"is supported: leave the head out of LoRA's target_modules and of quantisation."
        )
    return head


def base_model(llm: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the LLM without peft's wrapping, its adapter layers still in it."""
    return llm.get_base_model() if isinstance(llm, PeftModel) else llm
