"""The proxy LLM: a language model that learns the style of the captions."""

from mmengine.registry import MODELS
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from xtuner.model import SupervisedFinetune
from xtuner.registry import BUILDER

from dpa_xtuner.layout import LLM
from dpa_xtuner.loss import Objective, TokenLogProbs
from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.model.llm import add_lora, load, supervised_log_probs
from dpa_xtuner.precision import Precision


@BUILDER.register_module()  # for xtuner convert
@MODELS.register_module()
class ProxyLLM(SupervisedFinetune):
    """XTuner's text fine-tuning with this package's plain loss.

    Args:
        llm: a config dict or a module.
        lora: ``peft.LoraConfig`` or its config dict; None trains the whole LLM.
        normalize: see :func:`dpa_xtuner.loss.relevance_loss`.
        precision: what the run computes in (:class:`dpa_xtuner.precision.Precision`).
        kwargs: arguments of :class:`xtuner.model.SupervisedFinetune`.
    """

    llm: PreTrainedModel | PeftModel

    def __init__(
        self,
        llm: dict | nn.Module,
        lora=None,
        normalize: str = "micro_batch",
        precision: str = "bf16",
        **kwargs,
    ):
        llm = load(llm)
        run_precision = Precision(precision)
        of_llm = fingerprint(llm, run_precision.fingerprint_dtype)
        super().__init__(llm=llm, lora=lora, **kwargs)
        self.precision, self.fingerprints = run_precision, {LLM: of_llm}
        self.objective = Objective("uniform", normalize)

    def build_llm_from_cfg(self, llm_cfg, use_varlen_attn, max_position_embeddings):
        """Return the module: the stock method takes configs only."""
        return llm_cfg

    def _prepare_for_lora(self, peft_model=None, use_activation_checkpointing=True) -> None:
        self.llm = add_lora(self.llm, self.lora)

    def log_probs(self, data: dict) -> TokenLogProbs:
        """Compute the log-probabilities of the supervised tokens of a collated batch."""
        inputs = {key: data[key] for key in ("input_ids", "attention_mask", "position_ids")}
        return supervised_log_probs(self.llm, inputs, data)

    def compute_loss(self, data: dict, data_samples=None) -> dict[str, Tensor]:
        """Compute the loss and the log's figures of a batch of :func:`dpa_xtuner.data.collate`."""
        return self.objective(self.log_probs(data), None, data)
