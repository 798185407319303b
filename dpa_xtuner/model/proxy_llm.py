"""The proxy LLM: a language model with LoRA that learns the captions' way of writing."""

from mmengine.registry import MODELS
from torch import Tensor, nn
from xtuner.model import SupervisedFinetune
from xtuner.registry import BUILDER

from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.model.llm import add_lora, find_loss, load, supervised_logits
from dpa_xtuner.model.parts import CANONICAL


@BUILDER.register_module()  # for xtuner convert
@MODELS.register_module()
class ProxyLLM(SupervisedFinetune):
    """XTuner's text fine-tuning with the loss of this package at its seam.

    Args:
        llm: a config dict or a module.
        lora: ``peft.LoraConfig`` or its config dict.
        loss: name of a loss in :data:`dpa_xtuner.registry.LOSSES`.
        kwargs: of :class:`xtuner.model.SupervisedFinetune`.
    """

    def __init__(self, llm: dict | nn.Module, lora, loss: str = "cross_entropy", **kwargs):
        llm = load(self, llm)
        of_llm = fingerprint(llm, CANONICAL)
        super().__init__(llm=llm, lora=lora, **kwargs)
        self.fingerprints = {"llm": of_llm}
        self.loss = find_loss(loss)

    def build_llm_from_cfg(self, llm_cfg, use_varlen_attn, max_position_embeddings):
        """Take the module as it is: the stock method knows configs only."""
        return llm_cfg

    def _prepare_for_lora(self, peft_model=None, use_activation_checkpointing=True) -> None:
        self.llm = add_lora(self.llm, self.lora)

    def logits(self, data: dict) -> tuple[Tensor, Tensor]:
        """Logits (N, V) and targets (N,) of a batch of :func:`dpa_xtuner.data.collate`."""
        inputs = {key: data[key] for key in ("input_ids", "attention_mask", "position_ids")}
        return supervised_logits(self.llm, inputs, data["labels"])

    def compute_loss(self, data: dict, data_samples=None) -> dict[str, Tensor]:
        """The loss of a batch of :func:`dpa_xtuner.data.collate`."""
        return {"loss": self.loss(*self.logits(data))}
