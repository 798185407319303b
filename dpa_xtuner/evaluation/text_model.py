"""A language model and a scorer for OpenCompass's text-only data sets."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opencompass.models.base import BaseModel, LMTemplateParser
from opencompass.models.base_api import APITemplateParser
from opencompass.openicl.icl_evaluator import BaseEvaluator
from opencompass.openicl.icl_inferencer import PPLInferencer
from opencompass.registry import ICL_EVALUATORS, TEXT_POSTPROCESSORS
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from dpa_xtuner import compat
from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import NO_ANSWER
from dpa_xtuner.evaluation.model import LlavaFolder, failure, in_halves, load_whole
from dpa_xtuner.files import write_json
from dpa_xtuner.model.configs import caps_attention
from dpa_xtuner.precision import runnable_dtype

_ROLES = {"HUMAN": "user", "BOT": "assistant"}
_ROUND = [  # as OpenCompass's own wrapper of chat models
    {"role": "HUMAN", "api_role": "HUMAN"},
    {"role": "SYSTEM", "api_role": "HUMAN"},
    {"role": "BOT", "api_role": "BOT", "generate": True},
]


class LanguageModel(LlavaFolder):
    """A causal language model, or that of a LLaVA folder, asked as :class:`LlavaFolder` is.

    Answers are written in the chat template; likelihoods are those of plain text, as OpenCompass
    takes them of base models.

    Attributes:
        failures: texts whose likelihood could not be computed, and why.
    """

    def __init__(
        self,
        path: str,
        source: str | None = None,
        adapter: str | None = None,
        max_seq_len: int | None = None,
        device: str | None = None,
    ) -> None:
        """Load it.

        Args:
            path: folder of the LLM, or of a LLaVA.
            source: folder of tokenizer, chat template and generation config; ``path`` where it
                is None.
            adapter: a PEFT folder to merge into the LLM.
            max_seq_len: longest prompt in tokens; OpenCompass leaves out examples beyond it.
            device: as of :class:`LlavaFolder`.
        """
        BaseModel.__init__(self, path=path, max_seq_len=max_seq_len or 2048, generation_kwargs={})
        source = source or path
        with_pictures = Path(source, "preprocessor_config.json").is_file()
        self.processor = AutoProcessor.from_pretrained(source) if with_pictures else None
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.template, self.as_text = self._template()
        # No text of these data sets is a picture.
        self.image_token, self.image_id, self.image_tokens = "<image>", -1, 0
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_llm(path, adapter)
        model.to(runnable_dtype(model.dtype, self.device.type))
        with suppress(OSError):  # the end of a turn belongs to the chat template
            model.generation_config = GenerationConfig.from_pretrained(source)
        self.model = model.to(self.device).eval()
        self.longest = getattr(model.config, "max_position_embeddings", None)
        ends = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad_id = next(i for i in ends if i is not None)
        self.failures: dict[str, str] = {}
        self.chat, self.plain = APITemplateParser({"round": _ROUND}), LMTemplateParser()

    def parse_template(self, prompt_template: Any, mode: str) -> Any:
        """Messages for an answer (``gen``), plain text for a likelihood (``ppl``)."""
        parser = self.chat if mode == "gen" else self.plain
        return parser.parse_template(prompt_template, mode)

    def encode_messages(self, messages: list[dict] | str) -> tuple[list[int], list[Tensor]]:
        """Turn a prompt of OpenCompass into token ids.

        Args:
            messages: ``{"role": "HUMAN" or "BOT", "prompt": text}`` each, or a text. One without
                text is left out, as OpenCompass does; its parser puts such in.

        Returns:
            Token ids, and no pictures.
        """
        if isinstance(messages, str):
            messages = [{"role": "HUMAN", "prompt": messages}]
        turns: list[dict] = []
        for message in filter(lambda message: message["prompt"], messages):
            role, text = _ROLES[message["role"]], message["prompt"]
            if turns and turns[-1]["role"] == role:  # templates refuse two of the same in a row
                turns[-1]["content"][0]["text"] += f"\n{text}"
            else:
                turns.append({"role": role, "content": [{"type": "text", "text": text}]})
        return super().encode_messages(turns)

    def get_ppl(self, inputs: Sequence[str], mask_length: None = None) -> np.ndarray:
        """Nats of each text, by its number of tokens; smaller is more probable.

        OpenCompass's own wrapper pads at the left without leaving the padding out, so that its
        numbers depend on what else is in the batch; these don't, and are its numbers at batch 1.

        Args:
            inputs: plain texts.
            mask_length: not supported.

        Returns:
            (N,) float64; infinite for a text that failed, whose reason is then in ``failures``.
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
        ids = torch.full((len(tokens), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, found in enumerate(tokens):
            ids[row, : len(found)] = torch.tensor(found)
            mask[row, : len(found)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        nats = [
            functional.cross_entropy(
                rows[: len(found) - 1].float(), row[1 : len(found)], reduction="sum"
            ).item()
            / len(found)
            for rows, row, found in zip(logits, ids, tokens, strict=True)
        ]
        return [
            value if math.isfinite(value) else failure(DPAError(f"its likelihood is {value}"))
            for value in nats
        ]


def load_llm(path: str, adapter: str | None = None) -> PreTrainedModel:
    """A causal language model in its own type; InternLM's without remote code.

    Args:
        path: its folder, or that of a LLaVA, whose language model is given.
        adapter: a PEFT folder to merge into it.

    Raises:
        DPAError: weights are missing.
    """
    kind = PretrainedConfig.get_config_dict(path)[0].get("model_type")
    if kind == "llava":
        llm = load_whole(LlavaForConditionalGeneration, path, torch_dtype="auto").language_model
    elif kind == "internlm2":
        from dpa_xtuner.families.internlm.llm import InternLM2ForCausalLM

        llm = load_whole(InternLM2ForCausalLM, path, torch_dtype="auto")
    elif kind == "internlm3":
        from dpa_xtuner.families.internlm.llm import InternLM3ForCausalLM

        llm = load_whole(InternLM3ForCausalLM, path, torch_dtype="auto")
    else:
        llm = load_whole(AutoModelForCausalLM, path, torch_dtype="auto")
    if caps_attention(llm.config):
        llm.config._attn_implementation = "eager"
    if adapter is None:
        return llm
    compat.triton_without_ops()  # before peft imports bitsandbytes
    from peft import PeftModel

    return PeftModel.from_pretrained(llm, adapter).merge_and_unload()


def _as_text(prompt: str | list[dict]) -> str:
    """A prompt of OpenCompass to be read."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["prompt"] for message in prompt)


class LikelihoodInferencer(PPLInferencer):
    """Picks the most probable candidate; a sample of which one failed has no answer.

    Left to itself, OpenCompass would credit a sample with a candidate that nothing was compared to.
    """

    def inference(
        self,
        retriever: Any,
        *,
        output_json_filepath: str,
        output_json_filename: str,
        **templates: Any,
    ) -> list[str]:
        """Ask for all likelihoods and write the predictions.

        Args:
            retriever: of the examples before a question.
            output_json_filepath: folder of the predictions.
            output_json_filename: their file; it appears when they are complete.
            templates: ``ice_template``, ``prompt_template``.

        Returns:
            The predictions; none on ranks that write no file.
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
    """Scores as a data set's own evaluator does, and keeps each sample.

    A sample that failed has the empty answer: OpenCompass would look for an option's letter, or a
    number, in the reason.
    """

    def __init__(self, evaluator: dict, postprocessor: dict | None = None) -> None:
        """Set up the data set's own scoring.

        Args:
            evaluator: config of its evaluator, which gives ``accuracy``, 0 - 100.
            postprocessor: config of the function that finds the answer in what was written.
        """
        super().__init__()
        self.inner, self.postprocessor = ICL_EVALUATORS.build(evaluator), postprocessor

    def evaluate(self, k: int, n: int, original_dataset: Any, **columns: Any) -> dict:
        """:meth:`score`, without OpenCompass's repeated runs."""
        return self.score(**columns)

    def score(
        self, predictions: list, references: list, origin_prompt: list, test_set: Any
    ) -> dict:
        """Score the samples of a data set.

        Returns:
            ``score`` (0 - 100), ``metrics``, ``samples`` (their number), ``failed`` (a list of
            index and reason) and ``details`` (index, question, image, answer, prediction,
            extracted, correct).
        """
        failed = [
            {"index": i, "reason": given.removeprefix(NO_ANSWER).removeprefix(": ")}
            for i, given in enumerate(predictions)
            if str(given).startswith(NO_ANSWER)
        ]
        without = {sample["index"] for sample in failed}
        answers = [
            "" if i in without else self._extracted(given) for i, given in enumerate(predictions)
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
