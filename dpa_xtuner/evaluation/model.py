"""A Hugging Face LLaVA folder as an OpenCompass model: batched greedy generation."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from opencompass.models.base import BaseModel
from opencompass.utils import get_logger
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import NO_ANSWER
from dpa_xtuner.evaluation.folder import pictures_in_training
from dpa_xtuner.evaluation.llava import image_features, load_llava
from dpa_xtuner.pictures import WHITE, as_rgb, padded

LLAVA_1_5 = (  # llava-v1.5's template (conv_vicuna_v1): its first folders have none
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.{% for message in messages %}"
    "{{ ' ' + {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message['role'], '') }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_LITERAL = "\ue0d1\ue0d2"  # replaces '<image>' in the text of a question; no template changes it
_LONGEST_REASON = 300


class ChatModel(BaseModel):
    """A model that answers messages in its chat template.

    Attributes:
        model: a causal language model of transformers, or a LLaVA, in evaluation mode.
        tokenizer: its tokenizer.
        longest: the number of positions of the LLM; None for no limit.
        template: the chat template.
        as_text: whether the template takes a message as text with image tokens in it, as the
            template of an LLM's tokenizer does; that of a processor takes pictures and texts.
        image_token: the text that stands for a picture in a prompt.
        image_id: id of that token; -1 for a model without pictures.
        image_tokens: the number of tokens of a picture in the prompt.
        background: the colour behind transparent pictures.
    """

    image_token, image_id, image_tokens, background = "<image>", -1, 0, WHITE

    def __init__(self, path: str, device: str | None, max_seq_len: int = 2048) -> None:
        super().__init__(path=path, max_seq_len=max_seq_len, generation_kwargs={})
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def set_up(
        self, model: PreTrainedModel, llm_config: Any, tokenizer: Any, processor: Any = None
    ) -> None:
        """Set up the model with its tokenizer and processor.

        Args:
            model: moved to the device.
            llm_config: config of the LLM, for its number of positions.
            tokenizer: the LLM's tokenizer.
            processor: image processor and tokenizer; its chat template is preferred to the
                tokenizer's.
        """
        self.model = model.to(self.device).eval()
        self.longest = getattr(llm_config, "max_position_embeddings", None)
        self.tokenizer, self.processor = tokenizer, processor
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(i for i in ids if i is not None)
        self.template, self.as_text = self._template()

    def _template(self) -> tuple[str, bool]:
        if template := _unnamed(getattr(self.processor, "chat_template", None)):
            return template, False
        if template := _unnamed(self.tokenizer.chat_template):
            return template, "image" not in template
        get_logger().warning(f"{self.path} has no chat template: using LLaVA-1.5's.")
        return LLAVA_1_5, True

    def parse_template(self, prompt_template: Any, mode: str) -> Any:
        """Return the messages unchanged: ``generate`` applies the folder's chat template."""
        return list(prompt_template) if isinstance(prompt_template, tuple) else prompt_template

    def get_token_len(self, prompt: str) -> int:
        """Count the tokens of a text."""
        return len(self.tokenizer(prompt)["input_ids"])

    def generate(self, inputs: Sequence[list[dict] | str], max_out_len: int) -> list[str]:
        """Answer a batch of prompts, greedily.

        The answer of a sample that fails, or gets an empty answer, is ``NO_ANSWER`` followed by
        ``: reason``; the other samples of its batch are not affected. A batch that runs out of
        memory, or raises, is halved until the culprit is alone.

        Args:
            inputs: prompts for ``encode_messages``.
            max_out_len: the largest number of tokens of an answer.

        Returns:
            The answers, stripped, in order.

        Raises:
            RuntimeError: the GPU is in a state in which every later sample would fail.
        """
        answers = [""] * len(inputs)
        prepared = []
        for position, messages in enumerate(inputs):
            try:
                prepared.append((position, *self.encode_messages(messages)))
            except Exception as error:  # any error fails this sample only
                answers[position] = failure(error)
        texts = in_halves(lambda some: self._generate(some, max_out_len), prepared)
        for (position, *_), text in zip(prepared, texts, strict=True):
            answers[position] = text or f"{NO_ANSWER}: empty answer"
        return answers

    def _generate(self, prepared: Sequence[tuple], max_out_len: int) -> list[str]:
        inputs = self.padded_batch([ids for _, ids, _ in prepared], "left")
        pictures = [pixels for _, _, found in prepared for pixels in found]
        if pictures:
            inputs["pixel_values"] = torch.cat(pictures).to(self.device, self.model.dtype)
        eos = self.model.generation_config.eos_token_id
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=max_out_len,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=self.tokenizer.eos_token_id if eos is None else eos,
                pad_token_id=self.pad_id,
            )
        answers = output[:, inputs["input_ids"].shape[1] :]  # (B, new tokens)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def padded_batch(self, rows: list[list[int]], side: str) -> dict[str, Tensor]:
        """Make ``input_ids`` and ``attention_mask`` (B, T) from token ids, padded on one side."""
        tokens = [torch.tensor(row) for row in rows]
        ones = [torch.ones_like(row) for row in tokens]
        ids = pad_sequence(tokens, True, padding_value=self.pad_id, padding_side=side)
        mask = pad_sequence(ones, True, padding_value=0, padding_side=side)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def encode_messages(self, messages: list[dict] | str) -> tuple[list[int], list[Tensor]]:
        """Turn messages into token ids and pixels.

        ``<image>`` in a question is text, not a picture: it is cut in two before the tokenizer
        sees it.

        Args:
            messages: a list of ``{"role": ..., "content": [{"type": "text", "text": ...}, {"type":
                "image", "image_url": path}]}``, as OpenCompass's VLMEvalKit bridge makes them; or a
                text, for a user's message.

        Returns:
            Token ids, with ``image_tokens`` image tokens for each picture; and the pictures' pixel
            values (1, 3, H, W), in order.

        Raises:
            DPAError: a picture or the question is missing, the template does not show each
                picture once, or the prompt is longer than the model's positions.
            OSError: a picture is missing or broken.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": [{"type": "text", "text": messages}]}]
        blocks = [block for message in messages for block in message["content"]]
        paths = [block["image_url"] for block in blocks if block["type"] == "image"]
        texts = [block["text"] for block in blocks if block["type"] == "text"]
        if texts and not any(text.strip() for text in texts):
            raise DPAError("no question is given")
        prompt = self.tokenizer.apply_chat_template(
            [self._message(message) for message in messages],
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = self._tokenise(prompt)
        if ids.count(self.image_id) != len(paths):
            raise DPAError(
                f"the chat template shows {ids.count(self.image_id)} of {len(paths)} pictures"
            )
        ids = [i for i in ids for _ in range(self.image_tokens if i == self.image_id else 1)]
        if self.longest is not None and len(ids) >= self.longest:
            raise DPAError(f"a prompt of {len(ids)} tokens; the model has {self.longest} positions")
        return ids, [self._pixels(_opened(path, self.background)) for path in paths]

    def _message(self, message: dict) -> dict:
        parts: list[Any] = []
        for block in message["content"]:
            if block["type"] == "image":
                parts.append(f"{self.image_token}\n" if self.as_text else {"type": "image"})
            else:
                text = block["text"].replace(self.image_token, _LITERAL)
                parts.append(text if self.as_text else {"type": "text", "text": text})
        return {"role": message["role"], "content": "".join(parts) if self.as_text else parts}

    def _tokenise(self, prompt: str) -> list[int]:
        cut = len(self.image_token) // 2
        pieces = prompt.split(_LITERAL)
        bos = self.tokenizer.bos_token
        ids: list[int] = []
        for number, text in enumerate(pieces):
            # Each piece gets its half of the '<image>' that was cut.
            text = self.image_token[cut:] * (number > 0) + text
            text += self.image_token[:cut] * (number < len(pieces) - 1)
            has_bos = number > 0 or (bool(bos) and text.startswith(bos))
            ids += self.tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        return ids

    def _pixels(self, picture: Image.Image) -> Tensor:
        raise DPAError(f"{self.path} takes no pictures")


class LlavaFolder(ChatModel):
    """A folder that transformers' ``LlavaForConditionalGeneration`` and ``AutoProcessor`` open.

    It computes in ``computing_dtype``. The LLM's attention is FlashAttention-2 on a GPU where that
    is installed. Otherwise it is transformers' choice, or eager if the scores are capped (Gemma-2),
    since SDPA ignores the cap.

    Attributes:
        pads: whether pictures are padded to a square, in the processor's mean colour, as training
            did: ``pad_image_to_square`` in ``dpa.json``. Other folders leave it to the processor.
    """

    def __init__(self, path: str, device: str | None = None) -> None:
        """Load the folder.

        Args:
            path: the folder.
            device: the device; None for the first GPU, or the CPU if there is none.

        Raises:
            DPAError: it is not a LLaVA folder, its tokenizer has no image token, or weights are
                missing.
        """
        super().__init__(path, device)
        model, processor = load_llava(path, self.device)
        config = model.config
        self.image_token, self.image_id = processor.image_token, config.image_token_index
        self.pads, self.background = pictures_in_training(path)
        self.set_up(model, config.text_config, processor.tokenizer, processor)
        blank = self._pixels(Image.new("RGB", (64, 64)))
        with torch.inference_mode():
            self.image_tokens = image_features(model, blank).shape[1]

    def _pixels(self, picture: Image.Image) -> Tensor:
        processor = self.processor.image_processor
        if self.pads:
            picture = padded(picture, tuple(int(x * 255) for x in processor.image_mean))
        # transformers can't tell the channel dimension if the picture is 1 or 3 pixels high.
        pixels = processor(
            np.array(picture), input_data_format="channels_last", return_tensors="pt"
        )
        return pixels["pixel_values"]


def _opened(path: str | None, background: str) -> Image.Image:
    if not path:
        raise DPAError("no picture is given")
    with Image.open(path) as picture:
        return as_rgb(picture, background)


def _unnamed(template: str | dict | list | None) -> str | None:
    """Return a chat template; of several named ones the default, else the first."""
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}
    if isinstance(template, dict):
        return template.get("default", next(iter(template.values()), None))
    return template


def in_halves(run: Callable[[Sequence], Sequence], samples: Sequence) -> list:
    """Call a function on samples; a batch that raises is halved until the culprit is alone.

    Args:
        run: takes some of the samples and returns a result for each.
        samples: all samples.

    Returns:
        The results in order; that of a culprit is its ``failure``.

    Raises:
        RuntimeError: the GPU is in a state in which every later sample would fail.
    """
    if not samples:
        return []
    try:
        return list(run(samples))
    except Exception as error:
        if "CUDA error" in str(error):  # not "CUDA out of memory": the context is lost
            raise
        if len(samples) == 1:
            return [failure(error)]
    # Outside the except block, so that the tensors of the failed attempt are freed.
    torch.cuda.empty_cache()
    half = len(samples) // 2
    return in_halves(run, samples[:half]) + in_halves(run, samples[half:])


def failure(error: Exception) -> str:
    """Make the answer of a failed sample: ``NO_ANSWER`` and the reason."""
    reason = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, DPAError) else f"{type(error).__name__}: "
    return f"{NO_ANSWER}: {kind}{reason}"[:_LONGEST_REASON]
