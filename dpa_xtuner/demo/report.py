"""Ask a model the held-out questions, with the picture and with a blank one."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpa_xtuner.demo.drawings import ATTRIBUTION

IMAGE = "<image>"
PROMPT = "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
BATCH = 40
LONGEST_ANSWER = 6
SHOWN = 12


@dataclass(frozen=True)
class DemoModel:
    """The components of a trained multimodal model.

    Attributes:
        llm: language model.
        vit: visual encoder.
        projector: features of the second-last layer (B, P, vision width) to (B, P, LLM width).
        tokenizer: tokenizer of the LLM.
        processor: image processor of the encoder.
    """

    llm: PreTrainedModel
    vit: CLIPVisionModel
    projector: nn.Module
    tokenizer: PreTrainedTokenizerBase
    processor: CLIPImageProcessor


@dataclass(frozen=True)
class HeldOutQuestion:
    """One held-out question: ``choices`` is the number of possible answers of its kind."""

    image: Path
    kind: str
    choices: int
    question: str
    answer: str


@dataclass(frozen=True)
class Scores:
    """Results over one kind of question, or over all.

    Attributes:
        questions: how many there are.
        with_picture: cross entropy of the answers, nats per token (the end of the turn counts as
            one).
        blank: the same with a white picture.
        accuracy: fraction of given answers that match the expected one.
        chance: mean of 1 / number of possible answers.
    """

    questions: int
    with_picture: float
    blank: float
    accuracy: float
    chance: float


@dataclass(frozen=True)
class Evaluation:
    """Rows by kind, "all" last, and the answer given to each question."""

    rows: dict[str, Scores]
    answers: tuple[str, ...]


def load_questions(path: Path) -> list[HeldOutQuestion]:
    """Read ``heldout_questions.json``; the pictures' paths are relative to its folder."""
    return [
        HeldOutQuestion(
            image=path.parent / record["image"],
            kind=record["kind"],
            choices=record["choices"],
            question=record["conversations"][0]["value"],
            answer=record["conversations"][1]["value"],
        )
        for record in json.loads(path.read_text())
    ]


def matches(given: str, expected: str) -> bool:
    """Compare two short answers, ignoring case, punctuation and articles."""

    def plain(text: str) -> list[str]:
        """Split a text into the words that count."""
        words = re.sub(r"[^a-z0-9 ]", " ", text.lower()).split()
        return [word for word in words if word not in ("a", "an", "the")]

    return plain(given) == plain(expected)


def chance(questions: Sequence[HeldOutQuestion]) -> float:
    """Return the accuracy of choosing among the possible answers at random."""
    return sum(1 / question.choices for question in questions) / len(questions)


def _prompts(model: DemoModel, questions: Sequence[HeldOutQuestion], blank: bool) -> list[Tensor]:
    """Embed each prompt with its picture in place of ``<image>``: a list of (T, LLM width)."""
    embed = model.llm.get_input_embeddings()
    images = [Image.open(question.image).convert("RGB") for question in questions]
    if blank:
        images = [Image.new("RGB", image.size, "white") for image in images]
    pixels = model.processor(images, return_tensors="pt").pixel_values
    vision = model.vit(pixel_values=pixels.to(model.vit.dtype), output_hidden_states=True)
    weight = next(model.projector.parameters())
    patches = model.projector(vision.hidden_states[-2][:, 1:].to(weight.dtype))
    prompts = []
    for question, picture in zip(questions, patches, strict=True):
        before, after = (
            embed(torch.tensor(model.tokenizer(text, add_special_tokens=False).input_ids))
            for text in PROMPT.format(input=question.question).split(IMAGE)
        )
        prompts.append(torch.cat([before, picture.to(before.dtype), after]))
    return prompts


def _batches(
    questions: Sequence[HeldOutQuestion], label: str
) -> Iterator[Sequence[HeldOutQuestion]]:
    starts = range(0, len(questions), BATCH)
    for start in tqdm(starts, desc=label, unit="batch"):
        yield questions[start : start + BATCH]


def _autocast(model: DemoModel) -> torch.autocast:
    # In the dtype of the LLM's weights, whatever those of encoder and projector are.
    dtype, device = model.llm.dtype, model.llm.device.type
    return torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def answer_cross_entropy(
    model: DemoModel, questions: Sequence[HeldOutQuestion], blank: bool
) -> list[tuple[float, int]]:
    """Score the expected answers.

    Args:
        model: the model.
        questions: the questions.
        blank: whether to show a white picture in place of the real one.

    Returns:
        For each question the summed cross entropy in nats and the number of tokens.
    """
    embed = model.llm.get_input_embeddings()
    scores = []
    for asked in _batches(questions, "blank" if blank else "with picture"):
        with _autocast(model):
            prompts = _prompts(model, asked, blank)
            answers = [
                torch.tensor(model.tokenizer(row.answer + END, add_special_tokens=False).input_ids)
                for row in asked
            ]
            rows = [
                torch.cat([prompt, embed(answer)])
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            # With causal attention, no token attends to padding on its right.
            inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            hidden = model.llm.base_model(inputs_embeds=inputs).last_hidden_state
            # Run the head once a batch, over the answers alone.
            chosen = [
                row[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
                for row, prompt, answer in zip(hidden, prompts, answers, strict=True)
            ]
            logits = model.llm.get_output_embeddings()(torch.cat(chosen))
        losses = functional.cross_entropy(logits.float(), torch.cat(answers), reduction="none")
        lengths = [len(answer) for answer in answers]
        for row, length in zip(losses.split(lengths), lengths, strict=True):
            scores.append((row.sum().item(), length))
    return scores


@torch.no_grad()
def give_answers(model: DemoModel, questions: Sequence[HeldOutQuestion]) -> list[str]:
    """Answer each question greedily, at most ``LONGEST_ANSWER`` tokens."""
    end = model.tokenizer.convert_tokens_to_ids(END)
    given = []
    for asked in _batches(questions, "answers"):
        with _autocast(model):
            prompts = _prompts(model, asked, blank=False)
            longest = max(map(len, prompts))
            padding = [longest - len(prompt) for prompt in prompts]
            inputs = torch.stack(
                [
                    functional.pad(prompt, (0, 0, count, 0))
                    for prompt, count in zip(prompts, padding, strict=True)
                ]
            )
            mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
            tokens = model.llm.generate(
                inputs_embeds=inputs,
                attention_mask=mask.long(),
                max_new_tokens=LONGEST_ANSWER,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        given += model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in given]


def ask_questions(model: DemoModel, questions: Sequence[HeldOutQuestion]) -> Evaluation:
    """Ask every question: score it with the picture and with a blank one, and let it be answered.

    Args:
        model: the model; put into evaluation mode.
        questions: the questions.
    """
    for module in (model.llm, model.vit, model.projector):
        module.eval()
    seen = answer_cross_entropy(model, questions, blank=False)
    unseen = answer_cross_entropy(model, questions, blank=True)
    answers = give_answers(model, questions)

    def row(kind: str | None) -> Scores:
        """Average over one kind of question, or over all."""
        chosen = [i for i, question in enumerate(questions) if kind in (None, question.kind)]
        tokens = sum(seen[i][1] for i in chosen)
        right = [matches(answers[i], questions[i].answer) for i in chosen]
        return Scores(
            questions=len(chosen),
            with_picture=sum(seen[i][0] for i in chosen) / tokens,
            blank=sum(unseen[i][0] for i in chosen) / tokens,
            accuracy=sum(right) / len(right),
            chance=chance([questions[i] for i in chosen]),
        )

    kinds = list(dict.fromkeys(question.kind for question in questions))
    return Evaluation({kind: row(kind) for kind in kinds} | {"all": row(None)}, tuple(answers))


def compare(before: Evaluation, after: Evaluation) -> str:
    """Return a table of both evaluations, one row for each kind of question.

    Columns: number of questions, cross entropy with the picture and with a blank one (nats per
    token), accuracy, each before > after training, and chance.
    """
    lines = [
        f"{'held-out':<10}{'n':>5}  {'CE, picture':>15}  {'CE, blank':>15}"
        f"  {'accuracy':>15}  {'chance':>7}"
    ]
    for kind, new in after.rows.items():
        old = before.rows[kind]
        lines.append(
            f"{kind:<10}{new.questions:>5}"
            f"  {old.with_picture:>6.2f} > {new.with_picture:>6.2f}"
            f"  {old.blank:>6.2f} > {new.blank:>6.2f}"
            f"  {old.accuracy:>6.1%} > {new.accuracy:>6.1%}"
            f"  {new.chance:>7.1%}"
        )
    return "\n".join(lines)


def draw_answers(questions: Sequence[HeldOutQuestion], answers: Sequence[str], path: Path) -> None:
    """Draw some pictures with their questions, given answers and expected answers.

    Args:
        questions: the questions; ``SHOWN`` of them are drawn.
        answers: the given answers.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # At random, since the kinds of questions take turns; seeded, so always the same.
    chosen = random.Random(0).sample(range(len(questions)), min(SHOWN, len(questions)))
    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, i in zip(figure.subplots(3, 4).flat, chosen, strict=False):
        question, given = questions[i], answers[i]
        axes.imshow(Image.open(question.image))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(question.question.replace(IMAGE, "").strip(), fontsize=10, wrap=True)
        right = matches(given, question.answer)
        axes.set_xlabel(
            f"answer: {given}\nexpected: {question.answer}",
            color="tab:green" if right else "tab:red",
            fontsize=11,
        )
    figure.supxlabel(ATTRIBUTION, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
