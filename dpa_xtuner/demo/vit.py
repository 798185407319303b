"""A small CLIP-type vision transformer, trained on OpenMoji drawings and their names.

The demo uses no hub, so it ships the weights of this model; ``python -m dpa_xtuner.demo vit``
trains them again. Two contrasts train it: the picture against the words for its content, as in
CLIP, and every patch against the words for its drawing, since the projector reads patches and not
the class token.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpa_xtuner.demo.drawings import COLOURS, KINDS, Drawing, catalogue, render
from dpa_xtuner.demo.scenes import CELL_SIZE, COUNTS, PICTURE_SIZE, Sampler, Scene
from dpa_xtuner.precision import choose_precision

PATCH_SIZE = 16
GRID = PICTURE_SIZE // PATCH_SIZE
EMBEDDING = 128
BACKGROUND = "nothing"
IGNORED = -100
# Distortions of one drawing: without them the model learns a thousand drawings by heart and does
# not generalise.
SMALL_VARIANTS = 16
LARGE_VARIANTS = 6
# Scales the spread of the features from 2.5 to 0.6. The outputs of a new projector are then about
# as long as the LLM's word embeddings, not four times as long: cross entropy in the first ten steps
# of align fell from 1.33 to 1.02. A power of two, so rounding loses nothing.
FEATURE_SCALE = 0.25
# How the shipped weights were trained.
SEED = 0
TRAINING_STEPS = 1000
BATCH_SIZE = 96
LEARNING_RATE = 7e-4


def new_vit() -> CLIPVisionModel:
    """Return an untrained model of the shipped shape: 36 patches, 3.7 million weights."""
    config = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=3,
        image_size=PICTURE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=EMBEDDING,
    )
    # For 36 patches on a CPU the plain attention is 1.5 times as fast as the fused one.
    return CLIPVisionModel._from_config(config, attn_implementation="eager")


def new_processor() -> CLIPImageProcessor:
    """Return the processor of the model: 96 pixels, values in -1 to 1."""
    return CLIPImageProcessor(
        size={"shortest_edge": PICTURE_SIZE},
        crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


class NameTower(nn.Module):
    """The text side: the mean of a language model's token embeddings, projected.

    There are too few names to train a text model; a language model's embeddings already put a
    dolphin near a whale.

    Args:
        llm: any language model; its input embeddings are copied and stay frozen.
        tokenizer: its tokenizer.
    """

    table: Tensor

    def __init__(self, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        weight = llm.get_input_embeddings().weight.detach().float()
        self.register_buffer("table", weight - weight.mean(0), persistent=False)
        self.tokenizer = tokenizer
        self.project = nn.Linear(weight.shape[1], EMBEDDING, bias=False)

    def bag(self, texts: Sequence[str]) -> Tensor:
        """Return (texts, LLM width): the mean embedding of each text, scaled to unit length."""
        ids = [self.tokenizer(f" {text}", add_special_tokens=False).input_ids for text in texts]
        return functional.normalize(torch.stack([self.table[row].mean(0) for row in ids]), dim=-1)

    def forward(self, bags: Tensor) -> Tensor:
        """Project mean embeddings (texts, LLM width) to unit vectors (texts, ``EMBEDDING``)."""
        return functional.normalize(self.project(bags), dim=-1)


class DrawingClip(nn.Module):
    """Vision transformer, name tower and the contrasts between them.

    Args:
        tower: the text side.
        names: every concept name to tell apart in training.
    """

    count_bags: Tensor

    def __init__(self, tower: NameTower, names: Sequence[str]) -> None:
        super().__init__()
        self.vit = new_vit()
        self.tower = tower
        width = self.vit.config.hidden_size
        self.patch_head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, EMBEDDING, bias=False)
        )
        self.count_head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, EMBEDDING, bias=False)
        )
        self.picture_head = nn.Linear(width, EMBEDDING, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.banks = {
            "kind": [*sorted(KINDS), BACKGROUND],
            "colour": list(COLOURS),
            "name": list(names),
            "count": list(COUNTS),
        }
        for bank, texts in self.banks.items():
            self.register_buffer(f"{bank}_bags", tower.bag(texts), persistent=False)

    def text(self, bank: str) -> Tensor:
        """Return the unit vectors of a bank's texts, (texts, ``EMBEDDING``)."""
        return self.tower(getattr(self, f"{bank}_bags"))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed pictures.

        Args:
            pixels: (B, 3, 96, 96), values in -1 to 1.

        Returns:
            Unit vectors of patches (B, 36, D), of the mean patch (B, D) and of the picture (B, D).
            Patches come from the second-last layer: that is the one the projector reads.
        """
        output = self.vit(pixel_values=pixels, output_hidden_states=True)
        patches = output.hidden_states[-2][:, 1:]
        return (
            functional.normalize(self.patch_head(patches), dim=-1),
            functional.normalize(self.count_head(patches.mean(1)), dim=-1),
            functional.normalize(self.picture_head(output.pooler_output), dim=-1),
        )

    def losses(self, pixels: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the contrasts over one batch.

        Args:
            pixels: as in ``forward``.
            targets: from ``Batches``: "kind", "colour", "name" (B, 36) and "count" (B,), indices
                into the banks or ``IGNORED``; "words" (B, LLM width), the bag of all words for a
                picture.

        Returns:
            A scalar for each bank and one for "picture".
        """
        patches, mean_patch, picture = self(pixels)
        scale = self.log_scale.exp()

        def against(bank: str, vectors: Tensor) -> Tensor:
            """Contrast unit vectors (N, D) with the texts of a bank."""
            logits = scale * vectors @ self.text(bank).T
            return functional.cross_entropy(logits, targets[bank].flatten(), ignore_index=IGNORED)

        losses = {bank: against(bank, patches.flatten(0, 1)) for bank in ("kind", "colour", "name")}
        losses["count"] = against("count", mean_patch)
        logits = scale * picture @ self.tower(targets["words"]).T
        diagonal = torch.arange(len(logits))
        losses["picture"] = (
            functional.cross_entropy(logits, diagonal)
            + functional.cross_entropy(logits.T, diagonal)
        ) / 2
        return losses


def _distorted(code: str, size: int, rng: random.Random) -> np.ndarray:
    """Draw with a random turn, size, shift and mirror."""
    image = Image.fromarray(render(code, PICTURE_SIZE))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(0.75, 1.1)
    right, down = (round(rng.uniform(-0.06, 0.06) * PICTURE_SIZE) for _ in range(2))
    image = image.rotate(
        rng.uniform(-20, 20),
        Image.Resampling.BILINEAR,
        translate=(right, down),
        fillcolor="white",
    )
    edge = round(size * scale)
    image = image.resize(
        (edge, edge), Image.Resampling.BOX if edge < 48 else Image.Resampling.BILINEAR
    )
    sheet = Image.new("RGB", (size, size), "white")
    sheet.paste(image, ((size - edge) // 2, (size - edge) // 2))
    return np.asarray(sheet)


def _variants(code: str, size: int, count: int, rng: random.Random) -> list[np.ndarray]:
    return [render(code, size), *(_distorted(code, size, rng) for _ in range(count - 1))]


def to_pixels(pictures: np.ndarray) -> Tensor:
    """Turn (B, 96, 96, 3) uint8 into (B, 3, 96, 96) in -1 to 1, as the processor does."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class Batches:
    """Makes batches of distorted training scenes with the indices of their words.

    Args:
        model: whose banks the indices point into.
        seed: seed of every choice.
    """

    def __init__(self, model: DrawingClip, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sampler = Sampler(False, self.rng)
        self.model = model
        self.index = {
            bank: {text: number for number, text in enumerate(texts)}
            for bank, texts in model.banks.items()
        }
        codes = [drawing.code for drawing in catalogue() if not drawing.held_out]
        self.small = {code: _variants(code, CELL_SIZE, SMALL_VARIANTS, self.rng) for code in codes}
        self.large = {
            code: _variants(code, PICTURE_SIZE, LARGE_VARIANTS, self.rng) for code in codes
        }

    def _draw(self, scene: Scene) -> np.ndarray:
        if scene.cells == (None,):
            return self.rng.choice(self.large[scene.drawings[0].code])
        pixels = np.full((PICTURE_SIZE, PICTURE_SIZE, 3), 255, np.uint8)
        for drawing, cell in zip(scene.drawings, scene.places, strict=True):
            top, left = (CELL_SIZE * part for part in divmod(cell, 3))
            small = self.rng.choice(self.small[drawing.code])
            pixels[top : top + CELL_SIZE, left : left + CELL_SIZE] = small
        return pixels

    def _patch_targets(self, scene: Scene) -> dict[str, np.ndarray]:
        def indices(drawing: Drawing) -> dict[str, int]:
            return {
                "kind": self.index["kind"][drawing.kind],
                "colour": self.index["colour"].get(drawing.colour or "", IGNORED),
                "name": self.index["name"][drawing.name],
            }

        grids = {bank: np.full((GRID, GRID), IGNORED) for bank in ("kind", "colour", "name")}
        grids["kind"][:] = self.index["kind"][BACKGROUND]
        step = CELL_SIZE // PATCH_SIZE
        where: tuple[slice, slice]
        for drawing, cell in zip(scene.drawings, scene.cells, strict=True):
            if cell is None:
                where = slice(None), slice(None)
            else:
                row, column = (step * part for part in divmod(cell, 3))
                where = slice(row, row + step), slice(column, column + step)
            for bank, number in indices(drawing).items():
                grids[bank][where] = number
        return {bank: grid.reshape(-1) for bank, grid in grids.items()}

    def _words(self, scene: Scene) -> Tensor:
        bags = []
        for drawing in set(scene.drawings):
            for bank, text in (
                ("kind", drawing.kind),
                ("name", drawing.name),
                ("colour", drawing.colour),
            ):
                if text is not None:
                    bags.append(getattr(self.model, f"{bank}_bags")[self.index[bank][text]])
        bags.append(self.model.count_bags[len(scene.cells) - 1])
        return torch.stack(bags).mean(0)

    def next(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return pixels and targets of a batch, as ``DrawingClip.losses`` takes them."""
        scenes = [self.sampler.scene() for _ in range(size)]
        pixels = to_pixels(np.stack([self._draw(scene) for scene in scenes]))
        grids = [self._patch_targets(scene) for scene in scenes]
        targets = {
            bank: torch.from_numpy(np.stack([grid[bank] for grid in grids])) for bank in grids[0]
        }
        counts = [IGNORED if scene.cells == (None,) else len(scene.cells) - 1 for scene in scenes]
        targets["count"] = torch.tensor(counts)
        targets["words"] = torch.stack([self._words(scene) for scene in scenes])
        return pixels, targets


@torch.no_grad()
def held_out_retrieval(model: DrawingClip) -> dict[str, float]:
    """Find the words for held-out drawings that the model has never seen.

    Args:
        model: A trained model.

    Returns:
        Share of single drawings, large and small, whose best word is the right one: "kind" among
        23, "colour" among 10, and "name in first five" among the names of all held-out drawings.
    """
    model.eval()
    drawings = [drawing for drawing in catalogue() if drawing.held_out and "-" not in drawing.code]
    pictures = []
    for drawing in drawings:
        small = np.full((PICTURE_SIZE, PICTURE_SIZE, 3), 255, np.uint8)
        small[CELL_SIZE : 2 * CELL_SIZE, CELL_SIZE : 2 * CELL_SIZE] = render(
            drawing.code, CELL_SIZE
        )
        pictures += [render(drawing.code, PICTURE_SIZE), small]
    patches, _, _ = model(to_pixels(np.stack(pictures)))
    # Second row and column of cells hold the small drawing, and a part of the large one.
    centre = patches.unflatten(1, (GRID, GRID))[:, 2:4, 2:4].mean((1, 2))
    names = sorted({drawing.name for drawing in drawings})
    texts = {
        "kind": (model.banks["kind"], model.text("kind")),
        "colour": (model.banks["colour"], model.text("colour")),
        "name in first five": (names, model.tower(model.tower.bag(names))),
    }
    scores = {}
    for label, (words, vectors) in texts.items():
        first = 5 if label == "name in first five" else 1
        attribute = label.split()[0]
        hits = [
            getattr(drawing, attribute) in [words[number] for number in row]
            for drawing, row in zip(
                [drawing for drawing in drawings for _ in range(2)],
                (centre @ vectors.T).topk(first).indices.tolist(),
                strict=True,
            )
            if getattr(drawing, attribute) is not None
        ]
        scores[label] = sum(hits) / len(hits)
    return scores


def train(model: DrawingClip, batches: Batches, steps: int, batch_size: int, rate: float) -> None:
    """Train all weights but the frozen word embeddings, with a progress bar.

    Args:
        model: changed in place.
        batches: source of the data.
        steps: optimizer steps; the learning rate follows one cosine after 10 % of warm-up.
        batch_size: pictures a step.
        rate: highest learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    with tqdm(range(steps), desc="vit") as bar:
        for _ in bar:
            pixels, targets = batches.next(batch_size)
            with choose_precision("auto", "cpu").autocast("cpu"):
                losses = model.losses(pixels, targets)
            loss = cast("Tensor", sum(losses.values()))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix({name: f"{value.item():.2f}" for name, value in losses.items()})


@torch.no_grad()
def scale_features(vit: CLIPVisionModel, factor: float) -> None:
    """Multiply every hidden state by a factor, in the weights.

    Every layer reads the residual stream through a layer norm, which does not see its scale; so it
    is enough to scale what is written to the stream.

    Args:
        vit: changed in place; its pooled output stays the same.
        factor: what to multiply by.
    """
    vit = getattr(vit, "vision_model", vit)  # it is one itself since transformers 5
    written = [vit.pre_layrnorm]
    for layer in vit.encoder.layers:
        written += [layer.self_attn.out_proj, layer.mlp.fc2]
    for module in written:
        module.weight *= factor
        module.bias *= factor


def save_vit(model: DrawingClip, folder: Path) -> None:
    """Write the vision side alone, as ``transformers`` loads it.

    Args:
        model: A trained model; its vision side is scaled and turned into float16 in place.
        folder: folder to write.
    """
    scale_features(model.vit, FEATURE_SCALE)
    model.vit.to(torch.float16).save_pretrained(folder)
    new_processor().save_pretrained(folder)


def train_shipped(llm_folder: Path, out: Path) -> None:
    """Train the shipped encoder, print its held-out retrieval accuracy, and write its weights.

    Args:
        llm_folder: language model whose word embeddings stand for the names.
        out: folder to write.
    """
    torch.manual_seed(SEED)
    llm = AutoModelForCausalLM.from_pretrained(llm_folder, torch_dtype=torch.float32)
    tower = NameTower(llm, AutoTokenizer.from_pretrained(llm_folder))
    names = sorted({drawing.name for drawing in catalogue() if not drawing.held_out})
    model = DrawingClip(tower, names)
    train(model, Batches(model, SEED), TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE)
    for label, accuracy in held_out_retrieval(model).items():
        print(f"held-out retrieval, {label}: {accuracy:.1%}")
    save_vit(model, out)
