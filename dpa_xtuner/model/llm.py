"""What both models do with their LLM: load it, adapt it, ask it for logits."""

import torch
from mmengine.model import BaseModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from xtuner.model.modules.dispatch import SUPPORT_FLASH2
from xtuner.model.utils import LoadWoInit, find_all_linear_names

from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.model.configs import model_class
from dpa_xtuner.model.fingerprint import gathered
from dpa_xtuner.registry import LOSSES


def load(model: BaseModel, cfg: dict | nn.Module) -> nn.Module:
    """Build an LLM or encoder from its config with XTuner's builder; a module is returned as it is.

    FlashAttention-2 is chosen where it is installed, there is a GPU, the model knows it and
    the config does not say otherwise.

    Args:
        model: XTuner's model that the part is for.
        cfg: a config dict whose ``type`` is a ``from_pretrained``, or a module.

    Raises:
        DPAError: it does not take one of the arguments, or weights are missing.
    """
    if isinstance(cfg, nn.Module):
        return cfg
    knows_flash = getattr(model_class(cfg), "_supports_flash_attn_2", False)
    if SUPPORT_FLASH2 and knows_flash and torch.cuda.is_available():
        cfg.setdefault("attn_implementation", "flash_attention_2")
    with LoadWoInit():
        try:
            built, info = model._build_from_cfg_or_module(dict(cfg, output_loading_info=True))
        except TypeError as error:
            raise DPAError(
                f"model: {error}. Check the keys beside its type in the config."
            ) from error
    if info["missing_keys"]:  # transformers only warns, and without initialisation they are noise
        missing = sorted(info["missing_keys"])
        raise DPAError(
            f"{cfg['pretrained_model_name_or_path']} lacks {len(missing)} weights of a "
            f"{type(built).__name__}: {', '.join(missing[:5])}. Is it another model's folder?"
        )
    return built


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


def merge_adapter(llm: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Add a PEFT LoRA adapter to the weights of ``llm``, and leave no trace of peft.

    Args:
        llm: the model the adapter was trained on; changed in place.
        folder: a PEFT adapter folder.

    Returns:
        The merged model, of the class of ``llm``.
    """
    wrapped = PeftModel.from_pretrained(llm, folder)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            with gathered(list(module.get_base_layer().parameters()), modify=True):
                module.merge()
    return wrapped.unload()


def supervised_logits(
    llm: PreTrainedModel | PeftModel, inputs: dict[str, Tensor], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Next-token logits at the supervised positions alone.

    The head is most of a small model's step, and most positions (images, prompts, padding)
    need no logits, so the head sees the N supervised positions and no others.

    Args:
        llm: the LLM, wrapped by peft or not.
        inputs: what its decoder takes: ``attention_mask`` and ``position_ids`` (B, T) and
            ``input_ids`` (B, T) or ``inputs_embeds`` (B, T, H).
        labels: (B, T) int64, -100 where a token is not supervised.

    Returns:
        Logits (N, V) in the LLM's dtype and targets (N,) int64.
    """
    base = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    hidden = base.get_decoder()(**inputs).last_hidden_state  # (B, T, H)
    supervised = labels[:, 1:] != -100
    logits = base.get_output_embeddings()(hidden[:, :-1][supervised])  # (N, V)
    cap = getattr(base.config, "final_logit_softcapping", None)  # Gemma-2
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits, labels[:, 1:][supervised]


def find_loss(name: str):
    """The loss of that name.

    Raises:
        DPAError: there is none.
    """
    loss = LOSSES.get(name)
    if loss is None:
        known = sorted(LOSSES.module_dict)
        near = nearest(name, known) or "."
        raise DPAError(f"loss={name!r} is not known{near} Known losses: {', '.join(known)}.")
    return loss
