"""A Hugging Face LLaVA folder as an OpenCompass model: batched greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from opencompass.models.base import BaseModel
from opencompass.utils import get_logger
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.benchmarks import NO_ANSWER
from dpa_xtuner.evaluation.folder import pads_pictures
from dpa_xtuner.model.configs import caps_attention
from dpa_xtuner.precision import runnable_dtype

LLAVA_1_5 = (  # of llava-v1.5 (conv_vicuna_v1), whose first folders came without a template
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.{% for message in messages %}"
    "{{ ' ' + {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message['role'], '') }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_LITERAL = "\ue0d1\ue0d2"  # stands for '<image>' written in a question; a template leaves it alone
_LONGEST_REASON = 300


class LlavaFolder(BaseModel):
    """A folder that transformers' ``LlavaForConditionalGeneration`` and ``AutoProcessor`` open.

    The weights' type is the folder's own, unless the device only emulates it
    (:func:`dpa_xtuner.precision.runnable_dtype`). The LLM's attention is FlashAttention-2 where
    that is installed on a GPU, the eager one where the scores are capped (Gemma-2), which SDPA
    would leave out, and else what transformers picks.

    Attributes:
        model: The model, in evaluation mode.
        processor: Image processor and tokenizer.
        image_tokens: Tokens that a picture takes in the prompt.
        pads: Whether pictures are padded to a square, in the processor's mean colour, as training
            did: ``pad_image_to_square`` in ``dpa.json``. Other folders leave it to the processor.
    """

    def __init__(self, path: str, device: str | None = None) -> None:
        """Load the folder.

        Args:
            path: The folder.
            device: Where to; None for the first GPU, or the CPU where there is none.

        Raises:
            DPAError: It is no LLaVA folder, its tokenizer knows no image token, or weights are
                missing.
        """
        super().__init__(path=path, generation_kwargs={})
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = AutoConfig.from_pretrained(path)
        if not isinstance(config, LlavaConfig):
            raise DPAError(f"{path} is a {config.model_type!r} model; expected 'llava'.")
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        self.image_token = getattr(self.processor, "image_token", "<image>")
        self.image_id = config.image_token_index
        if self.tokenizer.convert_tokens_to_ids(self.image_token) != self.image_id:
            raise DPAError(
                f"{path}: its tokenizer has no token {self.image_token!r} with the id "
                f"{self.image_id}, the image_token_index of config.json."
            )
        self.pads = pads_pictures(path)
        self.template, self.as_text = self._template()
        dtype = runnable_dtype(
            getattr(config, "torch_dtype", None) or torch.float32, self.device.type
        )
        for part in (config.text_config, config.vision_config):
            # Saved by transformers 4.48 with some models; it would then take the eager attention.
            part._attn_implementation_autoset = False
        self.model = load_whole(
            LlavaForConditionalGeneration,
            path,
            config=config,
            torch_dtype=dtype,
            low_cpu_mem_usage=True,
            attn_implementation={"text_config": _attention(config, dtype, self.device)},
        )
        self.model.to(self.device).eval()
        self.longest = getattr(config.text_config, "max_position_embeddings", None)
        self.pad_id = next(
            i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            if i is not None
        )  # fmt: skip
        blank = self._pixels(Image.new("RGB", (64, 64)))
        with torch.inference_mode():
            features = self.model.get_image_features(
                blank.to(self.device, dtype),
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            )
        self.image_tokens = features.shape[1]

    def _template(self) -> tuple[str, bool]:
        """The chat template, and whether it takes a message as text with image tokens in it.

        That of a processor takes a list of pictures and texts; that of an LLM's tokenizer text.
        """
        if template := _unnamed(getattr(self.processor, "chat_template", None)):
            return template, False
        if template := _unnamed(self.tokenizer.chat_template):
            return template, "image" not in template
        get_logger().warning(f"{self.path} has no chat template: LLaVA-1.5's is taken.")
        return LLAVA_1_5, True

    def parse_template(self, prompt_template: Any, mode: str) -> Any:
        """The messages as they are: the folder's chat template is applied in `generate`."""
        return list(prompt_template) if isinstance(prompt_template, tuple) else prompt_template

    def get_token_len(self, prompt: str) -> int:
        """The tokens of a text."""
        return len(self.tokenizer(prompt)["input_ids"])

    def generate(self, inputs: Sequence[list[dict] | str], max_out_len: int) -> list[str]:
        """Answer a batch of prompts, greedily.

        A sample that can't be answered, or is answered by nothing, gets an answer that begins with
        `NO_ANSWER` and goes on with ``: reason``; the others of its batch don't suffer. A batch
        that runs out of memory, or raises, is halved until the culprit is alone.

        Args:
            inputs: Prompts as OpenCompass's VLMEvalKit bridge makes them: lists of messages
                ``{"role": ..., "content": [{"type": "text", "text": ...},
                {"type": "image", "image_url": path}]}``. A text alone is a user's message.
            max_out_len: Tokens that an answer may have.

        Returns:
            The answers, stripped, in order.

        Raises:
            RuntimeError: The GPU is in a state that no later sample would survive.
        """
        answers: list[str | None] = [None] * len(inputs)
        prepared = []
        for place, messages in enumerate(inputs):
            try:
                prepared.append((place, *self.encode_messages(messages)))
            except Exception as error:  # whatever is wrong with one sample is that sample's
                answers[place] = failure(error)
        empty = f"{NO_ANSWER}: empty answer"
        texts = in_halves(lambda some: self._generate(some, max_out_len), prepared)
        for (place, *_), text in zip(prepared, texts, strict=True):
            answers[place] = text or empty
        return answers

    def _generate(self, prepared: list[tuple], max_out_len: int) -> list[str]:
        longest = max(len(ids) for _, ids, _ in prepared)
        ids = torch.full((len(prepared), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, (_, tokens, _) in enumerate(prepared):  # left: answers go on at the right
            ids[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask[row, longest - len(tokens) :] = 1
        pictures = [pixels for _, _, found in prepared for pixels in found]
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
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
        texts = self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def encode_messages(self, messages: list[dict] | str) -> tuple[list[int], list[Tensor]]:
        """Turn messages into token ids and pixels.

        ``<image>`` in a text is text: it is cut in two before it reaches the tokenizer, and is no
        picture.

        Args:
            messages: See `generate`.

        Returns:
            Token ids, in which each picture has `image_tokens` image tokens; and pixel values
            (1, 3, H, W) of the pictures, in order.

        Raises:
            DPAError: A picture or the question is not given, the template does not show each
                picture once, or the prompt is longer than the model's positions.
            OSError: A picture is missing or broken.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": [{"type": "text", "text": messages}]}]
        blocks = [block for message in messages for block in message["content"]]
        paths = [block["image_url"] for block in blocks if block["type"] == "image"]
        texts = [block["text"] for block in blocks if block["type"] == "text"]
        if texts and not any(text.strip() for text in texts):
            raise DPAError("no question is given")
        prompt = self.tokenizer.apply_chat_template(
            [self._message(m) for m in messages],
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
        return ids, [self._pixels(_opened(path)) for path in paths]

    def _message(self, message: dict) -> dict:
        parts = []
        for block in message["content"]:
            if block["type"] == "image":
                part = f"{self.image_token}\n" if self.as_text else {"type": "image"}
            else:
                text = block["text"].replace(self.image_token, _LITERAL)
                part = text if self.as_text else {"type": "text", "text": text}
            parts.append(part)
        return {"role": message["role"], "content": "".join(parts) if self.as_text else parts}

    def _tokenise(self, prompt: str) -> list[int]:
        cut = len(self.image_token) // 2
        pieces = prompt.split(_LITERAL)
        ids: list[int] = []
        for place, text in enumerate(pieces):
            text = self.image_token[cut:] * (place > 0) + text
            text += self.image_token[:cut] * (place < len(pieces) - 1)
            bos = self.tokenizer.bos_token
            written = place > 0 or (bool(bos) and text.startswith(bos))
            ids += self.tokenizer(text, add_special_tokens=not written)["input_ids"]
        return ids

    def _pixels(self, picture: Image.Image) -> Tensor:
        processor = self.processor.image_processor
        if self.pads:
            picture = padded(picture, tuple(int(x * 255) for x in processor.image_mean))
        # Which side is the channels' can't be seen where the picture is 1 or 3 pixels high.
        pixels = processor(
            np.array(picture), input_data_format="channels_last", return_tensors="pt"
        )
        return pixels["pixel_values"]


def padded(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of this colour, as XTuner's ``expand2square`` puts it.

    Where the margins can't be equal, the left or upper one is the smaller.
    """
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, tuple((side - length) // 2 for length in picture.size))
    return square


def _opened(path: str | None) -> Image.Image:
    if not path:
        raise DPAError("no picture is given")
    with Image.open(path) as picture:
        return picture.convert("RGB")


def load_whole(kind: type, path: str, **options: Any) -> PreTrainedModel:
    """``kind.from_pretrained`` of a folder that has all weights.

    transformers leaves what is missing to chance; not so weights that are tied to others.

    Args:
        kind: Class of transformers' models, or an auto class.
        path: The folder.
        options: As ``from_pretrained`` takes them.

    Raises:
        DPAError: Weights are missing or of another shape than the config's.
    """
    model, found = kind.from_pretrained(
        path, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    # On the meta device transformers takes weights of one size for tied, and does not miss them.
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
        get_logger().warning(
            f"{path}: {len(unknown)} weights belong to no part of the model and are left out, the "
            f"first: {min(unknown)}."
        )
    return model


def _unnamed(template: str | dict | list | None) -> str | None:
    """A chat template; of several with names the default, or else the first."""
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}
    if isinstance(template, dict):
        return template.get("default", next(iter(template.values()), None))
    return template


def in_halves(run: Callable[[Sequence], Sequence], samples: Sequence) -> list:
    """What `run` gives for samples; a batch that raises is halved until the culprit is alone.

    Args:
        run: Takes some of the samples and returns a result for each.
        samples: All of them.

    Returns:
        The results in order; that of a culprit is its `failure`.

    Raises:
        RuntimeError: The GPU is in a state that no later sample would survive.
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
    # Out of the except block, so that the failed attempt's tensors are freed.
    torch.cuda.empty_cache()
    half = len(samples) // 2
    return in_halves(run, samples[:half]) + in_halves(run, samples[half:])


def failure(error: Exception) -> str:
    """The answer that stands for none: `NO_ANSWER` and the reason."""
    reason = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, DPAError) else f"{type(error).__name__}: "
    return f"{NO_ANSWER}: {kind}{reason}"[:_LONGEST_REASON]


def _attention(config: LlavaConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available():
        return "flash_attention_2"
    return "eager" if caps_attention(config.text_config) else None
