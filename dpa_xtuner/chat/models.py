"""A trained model that answers: a finished run as it was trained, or an exported folder."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.device import get_device
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from xtuner.utils import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

from dpa_xtuner.analysis.models import find_source, trained_model
from dpa_xtuner.analysis.relevance import Token, both_passes
from dpa_xtuner.analysis.words import classes_of, token_texts
from dpa_xtuner.data import collate
from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.images import ImageProblem, load_pixels, read_size
from dpa_xtuner.data.records import Record
from dpa_xtuner.data.tiles import Tiling
from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation.folder import pictures_in_training
from dpa_xtuner.evaluation.llava import image_features, load_llava
from dpa_xtuner.export.chat_template import end_of_turn
from dpa_xtuner.export.source import Source
from dpa_xtuner.files import read_json
from dpa_xtuner.layout import ALIGN, HF_FOLDER, PROVENANCE_FILE
from dpa_xtuner.loss import IGNORE_INDEX
from dpa_xtuner.versions import language_model


class Turn(NamedTuple):
    """A question, the picture that is shown with it, and the answer, empty if it is wanted.

    The picture is a path, or another name of :mod:`dpa_xtuner.data.places`.
    """

    question: str
    picture: str | None = None
    answer: str = ""


class ChatModel(ABC):
    """A model that answers questions about pictures, greedily.

    Attributes:
        llm: the LLM.
        tokenizer: its tokenizer.
        generation: what ends an answer, and which tokens never occur in one.
        takes_questions: False for a model that learned captions: it describes a picture.
    """

    llm: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    takes_questions: bool

    @torch.no_grad()
    def answer(self, turns: Sequence[Turn], max_new_tokens: int, streamer: Any = None) -> list[int]:
        """Answer the last of some turns.

        Args:
            turns: the conversation; earlier turns have their answers.
            max_new_tokens: the largest length of the answer.
            streamer: gets each token at once, as of ``generate`` in transformers.

        Returns:
            The token ids of the answer, its end included.

        Raises:
            DPAError: a picture can't be read, the model takes no questions, or the conversation
                is longer than the LLM's positions.
        """
        data = self._batch(turns, [])
        with self._autocast():
            inputs = self._splice(data)
            found = self.llm.generate(
                inputs_embeds=inputs["inputs_embeds"],  # (1, T, H)
                attention_mask=inputs["attention_mask"].long(),
                generation_config=self.generation,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                streamer=streamer,
            )
        return found[0].tolist()

    @torch.no_grad()
    def relevance(self, turns: Sequence[Turn], answer: list[int]) -> list[Token]:
        """Compare each token of an answer with the picture and without.

        Args:
            turns: the conversation that was answered.
            answer: the token ids of the answer, at least one.

        Returns:
            A token for each id; its ``weight`` is ``p_w - p_wo``, or 0 if that is negative.
        """
        data = self._batch(turns, answer)
        with self._autocast():
            with_image, no_image = both_passes(self.llm, self._splice(data), data)
        p_w, p_wo = (each.probability.float().cpu().tolist() for each in (with_image, no_image))
        texts = token_texts(self.tokenizer, answer)
        return [
            Token(text, kind, max(w - wo, 0.0), w, wo, w - wo)
            for text, kind, w, wo in zip(texts, classes_of(texts), p_w, p_wo, strict=True)
        ]

    def text(self, answer: list[int]) -> str:
        """Decode an answer."""
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _batch(self, turns: Sequence[Turn], answer: list[int]) -> dict[str, Any]:
        """Make a batch of one sample, on the model's device."""
        if self.takes_questions and not turns[-1].question.strip():
            raise DPAError("No question is given.")
        if not self.takes_questions and (turns[-1].question.strip() or not turns[-1].picture):
            raise DPAError(
                f"Stage {ALIGN} learned captions: give a picture (--image), and no question "
                "(--prompt)."
            )
        try:
            prompt, pixels = self._sample(turns)
        except ImageProblem as problem:
            raise DPAError(str(problem)) from None
        longest = getattr(self.llm.config, "max_position_embeddings", None)
        if longest is not None and len(prompt) + len(answer) >= longest:
            raise DPAError(
                f"The conversation has {len(prompt)} tokens; the LLM has {longest} positions. "
                f"Begin a new one."
            )
        labels = [IGNORE_INDEX] * len(prompt) + answer
        sample = {
            "id": "chat",
            "index": 0,
            "input_ids": np.array([*prompt, *answer]),  # (T,)
            "labels": np.array(labels),
            "pixel_values": pixels,
        }
        data = collate([sample])["data"]
        device = next(self.llm.parameters()).device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in data.items()}

    def _autocast(self) -> AbstractContextManager:
        return nullcontext()

    @abstractmethod
    def _sample(self, turns: Sequence[Turn]) -> tuple[list[int], list[Tensor]]:
        """Return the tokens before the answer, pictures expanded, and the pictures' pixels."""

    @abstractmethod
    def _splice(self, data: dict[str, Any]) -> dict[str, Tensor]:
        """Put the pictures' features into the text's embeddings."""


class RunChat(ChatModel):
    """A stage of a run: the model that was trained, whatever its projector and tiles.

    Args:
        source: the stage.
    """

    def __init__(self, source: Source) -> None:
        self._source, run = source, source.run
        self._model = trained_model(source)
        self.llm, self.tokenizer = self._model.llm, run.tokenizer
        self.takes_questions = source.stage.sample_format == "chat"
        ends = end_of_turn(source.template, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.generation = GenerationConfig(
            eos_token_id=ends or None, pad_token_id=pad if pad is not None else (ends or [0])[-1]
        )
        tiles = run.tiles
        self._image_tokens, most = tiles["image_tokens"], tiles["max_tiles"]
        self._tiling = Tiling(most, tiles["tile_size"]) if most > 1 else None
        template = run.settings.template if self.takes_questions else None
        self._tokenize = RecordTokenizer(
            self.tokenizer, source.stage.sample_format, self._image_tokens, template, 2**30,
            self._tiling,
        )  # fmt: skip

    def _autocast(self) -> AbstractContextManager:
        return self._source.run.precision.autocast(get_device())

    def _splice(self, data: dict[str, Any]) -> dict[str, Tensor]:
        return self._model.splice(data)

    def _sample(self, turns: Sequence[Turn]) -> tuple[list[int], list[Tensor]]:
        if any(DEFAULT_IMAGE_TOKEN in turn.question for turn in turns):
            raise DPAError(f"A question can't hold {DEFAULT_IMAGE_TOKEN!r}.")
        pictures = [turn.picture for turn in turns if turn.picture]
        sizes = [read_size(picture) for picture in pictures] if self._tiling else []
        texts = tuple(
            (f"{DEFAULT_IMAGE_TOKEN}\n" * (turn.picture is not None) + turn.question, answer)
            for turn, answer in zip(turns, [*(t.answer for t in turns[:-1]), "?"], strict=True)
        )
        record = Record("chat", tuple(pictures), None, texts, sizes=tuple(sizes))
        encoded = self._tokenize([record])
        if encoded.problems:
            raise DPAError(f"{encoded.problems[0].reason}. Begin a new conversation.")
        supervised = encoded.supervised  # (n,), an image is one token
        starts = np.flatnonzero(supervised & ~np.roll(supervised, 1))
        counts = [self._tiling.count(size) for size in sizes] if self._tiling else [1] * len(turns)
        tokens = _expanded(
            encoded.tokens[: starts[-1]].tolist(), [n * self._image_tokens for n in counts]
        )
        settings, processor = self._source.stage_settings, self._source.run.image_processor
        pads, ground = settings.pad_image_to_square, settings.background
        return tokens, [
            tile
            for name in pictures
            for tile in load_pixels(name, processor, pads, ground, self._tiling)
        ]


class FolderChat(ChatModel):
    """A folder of transformers' LLaVA, exported by us or not.

    Args:
        folder: the folder.

    Raises:
        DPAError: it is no LLaVA's, or transformers would make another model of it.
    """

    def __init__(self, folder: Path) -> None:
        device = torch.device(get_device())
        llava, self._processor = load_llava(str(folder), device)
        self._llava = llava.to(device).eval()
        self.llm, self.tokenizer = language_model(llava), self._processor.tokenizer
        self.generation = llava.generation_config
        about = read_json(folder / PROVENANCE_FILE, "Export the folder again.")
        self.takes_questions = about.get("stage") != ALIGN
        self._pads, self._background = pictures_in_training(folder)
        side = llava.config.vision_config.image_size
        with torch.no_grad():
            self._image_tokens = image_features(llava, torch.zeros(1, 3, side, side)).shape[1]

    def _splice(self, data: dict[str, Any]) -> dict[str, Tensor]:
        embeds = self.llm.get_input_embeddings()(data["input_ids"])  # (1, T, H)
        if "pixel_values" in data:
            features = image_features(self._llava, data["pixel_values"]).to(embeds.dtype)
            embeds = embeds.masked_scatter(data["image_mask"].unsqueeze(-1), features)
        return {
            "inputs_embeds": embeds,
            "attention_mask": data["attention_mask"],
            "position_ids": data["position_ids"],
        }

    def _sample(self, turns: Sequence[Turn]) -> tuple[list[int], list[Tensor]]:
        messages = []
        for turn in turns:
            if self._processor.image_token in turn.question + turn.answer:
                raise DPAError(f"A question can't hold {self._processor.image_token!r}.")
            content = [{"type": "image"}] if turn.picture else []
            content += [{"type": "text", "text": turn.question}] if self.takes_questions else []
            answer = [{"type": "text", "text": turn.answer}]
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ]
        if not (self._processor.chat_template or self.tokenizer.chat_template):
            raise DPAError(
                "The folder has no chat template: the prompt of its training is unknown."
            )
        text = self._processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
        image_id = self._llava.config.image_token_index
        ids = [IMAGE_TOKEN_INDEX if token == image_id else token for token in ids]
        pictures = [turn.picture for turn in turns if turn.picture]
        pixels = [
            load_pixels(name, self._processor.image_processor, self._pads, self._background)[0]
            for name in pictures
        ]
        return _expanded(ids, [self._image_tokens] * len(pictures)), pixels


def _expanded(ids: list[int], counts: list[int]) -> list[int]:
    """Repeat the mark of each picture as often as the picture has tokens."""
    left = iter(counts)
    return [i for i in ids for _ in range(next(left) if i == IMAGE_TOKEN_INDEX else 1)]


def open_chat(given: Path) -> ChatModel:
    """Open a run's folder, its config, or an exported folder.

    Args:
        given: the path.

    Raises:
        DPAError: it is none of these, or can't be opened; the message says what to do.
    """
    about = read_json(given / PROVENANCE_FILE, "Export it again.") if given.is_dir() else {}
    if about.get("format", HF_FOLDER) != HF_FOLDER:
        raise DPAError(
            f"{given} is an export of format {about['format']}: export it with --format hf, or "
            f"give the run's folder."
        )
    if (given / "config.json").is_file():
        return FolderChat(given)
    return RunChat(find_source(given))
