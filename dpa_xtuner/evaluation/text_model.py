"""A language model and a scorer for OpenCompass's text-only data sets."""

import inspect
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.utils import get_object_from_string
from opencompass.models.base import LMTemplateParser
from opencompass.models.base_api import APITemplateParser
from opencompass.openicl.icl_evaluator import BaseEvaluator
from opencompass.openicl.icl_inferencer import PPLInferencer
from opencompass.registry import ICL_EVALUATORS, TEXT_POSTPROCESSORS
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from dpa_xtuner import compat
from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import failed_samples
from dpa_xtuner.evaluation.folder import computing_dtype
from dpa_xtuner.evaluation.llava import load_whole
from dpa_xtuner.evaluation.model import ChatModel, failure, in_halves
from dpa_xtuner.files import write_json
from dpa_xtuner.model.configs import caps_attention
from dpa_xtuner.versions import language_model

_ROLES = {"HUMAN": "user", "BOT": "assistant"}
_ROUND = [  # as in OpenCompass's own wrapper of chat models
    {"role": "HUMAN", "api_role": "HUMAN"},
    {"role": "SYSTEM", "api_role": "HUMAN"},
    {"role": "BOT", "api_role": "BOT", "generate": True},
]


class LanguageModel(ChatModel):
    """A causal language model, or the language model of a LLaVA folder.

    It writes answers in the chat template. Likelihoods are those of plain text, as OpenCompass
    computes them for base models.

    Attributes:
        failures: text -> why its likelihood could not be computed.
    """

    def __init__(
        self,
        path: str,
        source: str | None = None,
        adapter: str | None = None,
        max_seq_len: int | None = None,
        device: str | None = None,
    ) -> None:
        """Load the model.

        Args:
            path: folder of the LLM, or of a LLaVA.
            source: folder of tokenizer, chat template and generation config; None for ``path``.
            adapter: a PEFT folder to merge into the LLM.
            max_seq_len: longest prompt in tokens; OpenCompass drops examples beyond it.
            device: the device; None for the first GPU, or the CPU if there is none.
        """
        super().__init__(path, device, max_seq_len or 2048)
        source = source or path
        with_pictures = Path(source, "preprocessor_config.json").is_file()
        model = load_llm(path, adapter, computing_dtype(path, self.device.type))
        with suppress(OSError):  # source's, since the end of a turn belongs to the chat template
            model.generation_config = GenerationConfig.from_pretrained(source)
        self.set_up(
            model,
            model.config,
            AutoTokenizer.from_pretrained(source),
            AutoProcessor.from_pretrained(source) if with_pictures else None,
        )
        self.failures: dict[str, str] = {}
        self.chat, self.plain = APITemplateParser({"round": _ROUND}), LMTemplateParser()

    def parse_template(self, prompt_template: Any, mode: str) -> Any:
        """Return messages for an answer (``gen``), plain text for a likelihood (``ppl``)."""
        parser = self.chat if mode == "gen" else self.plain
        return parser.parse_template(prompt_template, mode)

    def encode_messages(self, messages: list[dict] | str) -> tuple[list[int], list[Tensor]]:
        """Turn a prompt of OpenCompass into token ids.

        Args:
            messages: a list of ``{"role": "HUMAN" or "BOT", "prompt": text}``, or a text. Messages
                without text, which OpenCompass's parser adds, are skipped.

        Returns:
            Token ids, and no pictures.
        """
        if isinstance(messages, str):
            messages = [{"role": "HUMAN", "prompt": messages}]
        turns: list[dict] = []
        for message in filter(lambda message: message["prompt"], messages):
            role, text = _ROLES[message["role"]], message["prompt"]
            if turns and turns[-1]["role"] == role:  # templates refuse the same role twice in a row
                turns[-1]["content"][0]["text"] += f"\n{text}"
            else:
                turns.append({"role": role, "content": [{"type": "text", "text": text}]})
        return super().encode_messages(turns)

    def get_ppl(self, inputs: Sequence[str], mask_length: None = None) -> np.ndarray:
        """Return the nats of each text, divided by its number of tokens.

        OpenCompass's own wrapper counts padding as text, so its numbers depend on the rest of the
        batch. These don't; they equal its numbers at batch size 1.

        Args:
            inputs: plain texts.
            mask_length: not supported.

        Returns:
            (N,) float64; infinite for a text that failed, with the reason in ``failures``.
        """
        assert mask_length is None, "only whole texts"
        found = in_halves(self._nats, inputs)
        self.failures |= {
            text: value for text, value in zip(inputs, found, strict=True) if isinstance(value, str)
        }
        return np.array([math.inf if isinstance(value, str) else value for value in found])

    @torch.inference_mode()
    def _nats(self, texts: Sequence[str]) -> list[float | str]:
        tokens = [self.tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, tokens))
        if self.longest is not None and longest > self.longest:
            raise DPAError(f"a text of {longest} tokens; the model has {self.longest} positions")
        batch = self.padded_batch(tokens, "right")
        logits = self.model(**batch, use_cache=False).logits  # (B, T, V)
        nats = []
        for row, ids, found in zip(logits, batch["input_ids"], tokens, strict=True):
            length = len(found)
            total = functional.cross_entropy(
                row[: length - 1].float(), ids[1:length], reduction="sum"
            )
            nats.append(total.item() / length)
        return [
            value if math.isfinite(value) else failure(DPAError(f"its likelihood is {value}"))
            for value in nats
        ]


_CLASSES = {
    "llava": "transformers.LlavaForConditionalGeneration",
    "internlm2": "dpa_xtuner.families.internlm.llm.InternLM2ForCausalLM",
    "internlm3": "dpa_xtuner.families.internlm.llm.InternLM3ForCausalLM",
}
"""By model type; ``AutoModelForCausalLM`` loads all others."""


def load_llm(
    path: str, adapter: str | None = None, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """Load a causal language model; InternLM without remote code.

    Args:
        path: its folder, or that of a LLaVA, whose language model is returned.
        adapter: a PEFT folder to merge into it.
        dtype: dtype of its weights; ``"auto"`` for the folder's own.

    Raises:
        DPAError: weights are missing.
    """
    kind = PretrainedConfig.get_config_dict(path)[0].get("model_type")
    name = _CLASSES.get(kind, "transformers.AutoModelForCausalLM")
    llm = load_whole(get_object_from_string(name), path, torch_dtype=dtype)
    if kind == "llava":
        llm = language_model(llm)
    if caps_attention(llm.config):
        llm.config._attn_implementation = "eager"
    if adapter is None:
        return llm
    compat.triton_without_ops()  # before peft imports bitsandbytes
    from peft import PeftModel

    return PeftModel.from_pretrained(llm, adapter).merge_and_unload()


def _as_text(prompt: str | list[dict]) -> str:
    """Make a prompt of OpenCompass readable."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["prompt"] for message in prompt)


class LikelihoodInferencer(PPLInferencer):
    """Picks the most probable candidate; if a candidate fails, the sample has no answer.

    OpenCompass would pick the best of the other candidates.
    """

    def inference(
        self,
        retriever: Any,
        *,
        output_json_filepath: str,
        output_json_filename: str,
        **templates: Any,
    ) -> list[str]:
        """Compute all likelihoods and write the predictions.

        Args:
            retriever: finds the examples before a question.
            output_json_filepath: folder of the predictions.
            output_json_filename: their file; it appears when they are complete.
            templates: ``ice_template``, ``prompt_template``.

        Returns:
            The predictions; empty on ranks that write no file.
        """
        unchecked = f"{output_json_filename}.unchecked"
        super().inference(
            retriever,
            output_json_filepath=output_json_filepath,
            output_json_filename=unchecked,
            **templates,
        )
        if not self.is_main_process:
            return []
        file = Path(output_json_filepath, unchecked)
        samples = json.loads(file.read_text(encoding="utf-8"))
        for sample in samples.values():
            asked = [value["prompt"] for value in sample.values() if isinstance(value, dict)]
            failed = [self.model.failures[text] for text in asked if text in self.model.failures]
            if failed:
                sample["prediction"] = failed[0]
        write_json(file.with_name(output_json_filename), samples)
        file.unlink()
        return [sample["prediction"] for sample in samples.values()]


class TextEvaluator(BaseEvaluator):
    """Scores as a data set's own evaluator does, and keeps every sample.

    A failed sample is scored with an empty answer: OpenCompass would look for an option's letter,
    or a number, in the reason.
    """

    def __init__(self, evaluator: dict, postprocessor: dict | None = None) -> None:
        """Build the data set's own scoring.

        Args:
            evaluator: config of its evaluator, which returns ``accuracy``, 0 - 100.
            postprocessor: config of the function that finds the answer in the text.
        """
        super().__init__()
        self.inner, self.postprocessor = ICL_EVALUATORS.build(evaluator), postprocessor

    def evaluate(self, k: int, n: int, original_dataset: Any, **columns: Any) -> dict:
        """Call ``score``, without OpenCompass's statistics over repeated runs.

        Args:
            k: not used.
            n: not used.
            original_dataset: not used.
            columns: arguments of ``score``.
        """
        return self.score(**columns)

    def score(
        self, predictions: list, references: list, origin_prompt: list, test_set: Any
    ) -> dict:
        """Score the samples of a data set.

        Args:
            predictions: the answers.
            references: the right answers.
            origin_prompt: the prompts.
            test_set: the rows of the data set.

        Returns:
            ``score`` (0 - 100), ``metrics``, ``samples`` (their number), ``failed`` (a list of
            index and reason) and ``details`` (index, question, image, answer, prediction,
            extracted, correct).
        """
        failed = failed_samples(range(len(predictions)), predictions)
        lost = {sample["index"] for sample in failed}
        answers = [
            "" if i in lost else self._extracted(given) for i, given in enumerate(predictions)
        ]
        columns = {
            "predictions": answers,
            "references": references,
            "origin_prompt": origin_prompt,
            "test_set": test_set,
        }
        wanted = inspect.signature(self.inner.score).parameters
        result = self.inner.score(**{name: columns[name] for name in wanted})
        details = [
            {
                "index": i,
                "question": _as_text(origin_prompt[i]),
                "image": None,
                "answer": references[i],
                "prediction": predictions[i],
                "extracted": answers[i],
                "correct": self._correct(answers[i], references[i]),
            }
            for i in range(len(answers))
        ]
        score = float(result["accuracy"])
        return {
            "score": score,
            "metrics": {"accuracy": score},
            "samples": len(answers),
            "failed": failed,
            "details": details,
        }

    def _extracted(self, given: Any) -> Any:
        if self.postprocessor is None:
            return given
        kwargs = dict(self.postprocessor)
        return TEXT_POSTPROCESSORS.get(kwargs.pop("type"))(given, **kwargs)

    def _correct(self, answer: Any, reference: Any) -> bool:
        equal = getattr(self.inner, "is_equal", lambda one, other: str(one) == str(other))
        return bool(equal(answer, reference))
