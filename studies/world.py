"""A small world whose truth is known: scenes, sentences, a style, pictures, an LLM, an encoder.

A scene is two different things, each of a colour, on the left and on the right. Everything is
drawn by numbered generators, so that the same arguments always write the same files.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def _words(text: str) -> list[str]:
    return text.split()


THINGS = _words(
    "cup bell key hat shoe fish bird tree book lamp drum kite "
    "coin ring sock leaf boat fork vase star crown glove clock chair"
)
COLOURS = _words("red blue green yellow black white pink brown")
PLAIN = _words("the picture shows a on left and right . question : what thing colour is ? answer")
STYLE = _words(
    "behold lo verily gentle reader hark forsooth yonder wondrous radiant solemn ancient "
    "whispering golden silence eternal twilight dreams upon velvet hours beneath sorrow "
    "glimmering thou dost gaze ere dawn awakens amid perfumed shadows lingering softly "
    "o muse sing tender mercy flows through marble halls where time itself doth pause "
    "enchanted hearts remember sweet forgotten summers rest serene ever drifting homeward evermore"
)
SIDES = ("left", "right")

Draw = np.random.Generator

SIDE, NOISE = 16, 0.05
"""Pixels of a picture's side; standard deviation of the noise, of pixels between 0 and 1."""


@dataclass(frozen=True)
class Scene:
    """Colour and thing on the left, colour and thing on the right, by number."""

    left: tuple[int, int]
    right: tuple[int, int]

    def description(self) -> str:
        """Say it in the LLM's own style."""
        left, right = (f"a {COLOURS[c]} {THINGS[t]}" for c, t in (self.left, self.right))
        return f"the picture shows {left} on the left and {right} on the right ."

    def description_again(self) -> str:
        """Say it in other words, in the LLM's own style too."""
        left, right = (f"a {COLOURS[c]} {THINGS[t]}" for c, t in (self.left, self.right))
        return f"on the left is {left} and on the right is {right} ."

    def questions(self) -> list[tuple[str, str]]:
        """Ask for thing and colour on either side: question and answer."""
        asked = []
        for side, (colour, thing) in zip(SIDES, (self.left, self.right), strict=True):
            for what, answer in (("thing", THINGS[thing]), ("colour", COLOURS[colour])):
                asked.append((f"question : what {what} is on the {side} ?", answer))
        return asked

    def caption(self, level: int, draw: Draw) -> str:
        """Say it with ``level`` style words before, between and behind the two things.

        At level 0 it is the LLM's own sentence. Style words follow each other by :func:`chain`.
        """
        if level == 0:
            return self.description()
        words, last = [], int(draw.integers(5))
        for side in (self.left, self.right, None):
            for follows in draw.choice(3, size=level, p=(0.8, 0.15, 0.05)):
                words.append(STYLE[last])
                last = int(chain()[last, follows])
            words += [COLOURS[side[0]], THINGS[side[1]]] if side else []
        return " ".join(words)


@functools.cache
def chain() -> np.ndarray:
    """Return (style words, 3): the three words that may follow each, the likeliest first."""
    draw = np.random.default_rng(12345)
    return np.stack([draw.permutation(len(STYLE))[:3] for _ in STYLE])


def scenes(count: int, draw: Draw) -> list[Scene]:
    """Draw scenes."""
    found = []
    for _ in range(count):
        things, colours = draw.permutation(len(THINGS))[:2], draw.integers(len(COLOURS), size=2)
        pairs = [(int(c), int(t)) for c, t in zip(colours, things, strict=True)]
        found.append(Scene(*pairs))
    return found


@functools.cache
def looks() -> tuple[np.ndarray, np.ndarray]:
    """Return the things' textures (24, 16, 8, 1) and the colours' tints (8, 1, 1, 3)."""
    draw = np.random.default_rng(777)
    textures = draw.choice((-1.0, 1.0), size=(len(THINGS), SIDE, SIDE // 2, 1))
    return textures, draw.uniform(-1, 1, size=(len(COLOURS), 1, 1, 3))


def picture(scene: Scene, draw: Draw) -> np.ndarray:
    """Draw a scene: each half is a thing's texture, tinted in its colour, with noise.

    Returns:
        (16, 16, 3) uint8.
    """
    textures, tints = looks()
    halves = [textures[thing] + tints[colour] for colour, thing in (scene.left, scene.right)]
    pixels = 0.5 + 0.2 * np.concatenate(halves, axis=1)
    pixels = pixels + draw.normal(scale=NOISE, size=pixels.shape)
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


def tokenizer() -> PreTrainedTokenizerFast:
    """Build the LLM's tokenizer: a word is a token."""
    words = ["<pad>", "<unk>", *PLAIN, *COLOURS, *THINGS, *STYLE]
    assert len(set(words)) == len(words), "a word has one meaning"
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def write_encoder(folder: Path, seed: int) -> None:
    """Write a frozen encoder: a small CLIP ViT with random weights, 4 patches of 8 x 8 pixels.

    Its features hold the scene, since random layers lose little; no word is attached to them.
    """
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=SIDE // 2,
    )  # fmt: skip
    encoder = CLIPVisionModel(config)
    # Drawn here, about as transformers does: its own draws differ between its versions.
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "position" in name:
                weight.normal_(std=0.02, generator=draw)
            elif "class_embedding" in name:
                weight.normal_(std=0.1, generator=draw)
            elif weight.ndim > 1:
                std = 1.0 if "patch_embedding" in name else 0.7
                weight.normal_(std=std * weight[0].numel() ** -0.5, generator=draw)
    encoder.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
        do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3,
    ).save_pretrained(folder)  # fmt: skip


def texts(words: PreTrainedTokenizerFast, count: int, draw: Draw):
    """Draw descriptions, each told again in other words, with its questions in random order.

    Telling it again teaches the LLM to describe what it has read, which captions ask of it.

    Returns:
        Tokens (count, T), and (count, T) bool: true at the words that the description tells: the
        things and colours told again, and the answers.
    """
    rows = []
    for scene in scenes(count, draw):
        asked = scene.questions()
        ordered = [asked[i] for i in draw.permutation(len(asked))]
        told = " ".join(f"{question} answer : {answer} ." for question, answer in ordered)
        both = scene.description(), scene.description_again()
        first, again = draw.permutation(2)
        rows.append(words(f"{both[first]} {both[again]} {told}").input_ids)
    tokens = torch.tensor(rows)
    told_words = torch.tensor(words.convert_tokens_to_ids([*COLOURS, *THINGS]))
    marks = torch.isin(tokens, told_words)
    marks[:, : len(both[0].split())] = False  # the longer one: the other begins with "the"
    return tokens, marks


def train_llm(folder: Path, steps: int, seed: int) -> float:
    """Train a LLaMA on plain text until it can read a description, and write it.

    A word that the description tells weighs 10 and everything else 0.3: with equal weights it does
    not learn to read in any such time.

    Args:
        folder: to write, with the tokenizer.
        steps: of 32 texts.
        seed: of weights and texts.

    Returns:
        What :func:`reads` says of it.
    """
    torch.manual_seed(seed)
    words, draw = tokenizer(), np.random.default_rng(seed)
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=192,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, initializer_range=0.1,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(llm.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    for _ in range(steps):
        tokens, marks = texts(words, 32, draw)
        logits = llm(tokens).logits[:, :-1]  # (32, T - 1, V)
        nats = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        weights = torch.where(marks[:, 1:].flatten(), 10.0, 0.3)
        loss = (weights * nats).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
    llm.save_pretrained(folder)
    words.save_pretrained(folder)
    return reads(llm, words, draw)


@torch.no_grad()
def reads(
    llm: LlamaForCausalLM, words: PreTrainedTokenizerFast, draw: np.random.Generator
) -> float:
    """Measure how many of the words are right that 128 new descriptions tell."""
    tokens, marks = texts(words, 128, draw)
    right = llm(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]  # (128, T - 1)
    return right[marks[:, 1:]].float().mean().item()
