"""Runs of tiny models as training leaves them on disk, with random weights in place of trained."""

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from torch import nn
from xtuner.registry import BUILDER
from xtuner.utils import IMAGE_TOKEN_INDEX

from dpa_xtuner.data import collate
from dpa_xtuner.data.encode import RecordTokenizer
from dpa_xtuner.data.images import load_pixels
from dpa_xtuner.data.records import Record
from dpa_xtuner.files import write_json
from dpa_xtuner.model.llm import base_model
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages import run as resolved
from dpa_xtuner.stages.build import model_config
from dpa_xtuner.stages.components import COMPONENTS
from dpa_xtuner.stages.provenance import provenance_of
from dpa_xtuner.stages.settings import Settings
from dpa_xtuner.stages.table import stage_table
from support import encoder_folders, newer, small_tokenizers
from support import published_templates as published
from support.internlm import to_internlm2

ROOT = Path(__file__).parents[2]
PLAIN = Path(__file__).with_name("plain.py")
TURNS = (("<image>\nWhat is it?", "Two cats."), ("And the dog?", "It sleeps."))
RECORDS = [Record("", ("x",), None, TURNS[:1]), Record("", ("x",), None, TURNS)]
IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
INST = ("[INST]", "[/INST]")


@dataclass(frozen=True)
class Kind:
    """An LLM: its published template, kind of tokenizer and special tokens, its configuration."""

    template: str | None
    tokenizer: str
    specials: tuple[str, ...]
    name: str = "Llama"
    free_rows: int = 0
    more: tuple = ()

    @property
    def llm(self) -> type:
        return getattr(transformers, f"{self.name}ForCausalLM")


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
CAPS = dict(attn_logit_softcapping=0.5, final_logit_softcapping=3.0, query_pre_attn_scalar=16)
KINDS = {
    "internlm2": Kind(published.INTERNLM2, "without", IM,
                      more=dict(rope_scaling={"type": "dynamic", "factor": 2.0})),
    "internlm3": Kind(published.INTERNLM2, "legacy", IM,
                      more=dict(attention_bias=True, mlp_bias=True)),
    "qwen2": Kind(published.QWEN2, "bytes", QWEN, "Qwen2", 5,
                  dict(tie_word_embeddings=True)),
    "qwen2_5": Kind(published.QWEN2_5, "bytes", QWEN, "Qwen2"),
    "qwen3": Kind(published.QWEN3, "bytes", QWEN, "Qwen3", 5, dict(tie_word_embeddings=True)),
    "llama2": Kind(published.LLAMA2, "new", ()),
    "vicuna": Kind(published.VICUNA, "legacy", ()),
    "llama3": Kind(published.LLAMA3, "bytes+bos", ("<|begin_of_text|>", "<eos>", *HEADERS)),
    "llama3_1": Kind(published.LLAMA3_1, "bytes+bos", ("<|begin_of_text|>", *HEADERS),
                     more=dict(rope_scaling=ROPE)),
    "llama3_2": Kind(published.LLAMA3_2, "bytes+bos", ("<|begin_of_text|>", *HEADERS),
                     more=dict(rope_scaling=ROPE, tie_word_embeddings=True)),
    "gemma3": Kind(published.GEMMA3, "without", TURNS, "Gemma3", 5,
                   dict(sliding_window=6, tie_word_embeddings=True)),
    "gemma2": Kind(published.GEMMA2, "without", TURNS, "Gemma2",
                   more=CAPS),
    "smollm2": Kind(published.SMOLLM2, "bytes", IM, more=dict(tie_word_embeddings=True)),
    "smollm3": Kind(published.SMOLLM3, "bytes", IM, "SmolLM3", 0,
                    dict(no_rope_layers=[1, 0], tie_word_embeddings=True, pad_token_id=0)),
    "mistral": Kind(published.MISTRAL, "legacy", INST, "Mistral"),
    "ministral": Kind(published.MINISTRAL, "bytes+bos", ("<s>", "</s>", *INST), "Mistral",
                      more=dict(sliding_window=None)),
    "qwen3_moe": Kind(published.QWEN3, "bytes", QWEN, "Qwen3Moe", 5,
                      dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
}  # fmt: skip
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
)  # fmt: skip


@dataclass
class Run:
    """A run's folder, its config, and the model that was trained, in memory."""

    folder: Path
    config: Path
    settings: Settings
    cfg: Config
    model: nn.Module
    stage: str

    @property
    def work_dir(self) -> Path:
        return self.folder / "run"

    @cached_property
    def resolved(self) -> resolved.Run:
        return resolved.Run(self.cfg, self.settings, Precision(self.settings.precision))

    @property
    def tokenizer(self):
        return BUILDER.build(self.cfg.tokenizer.to_dict())

    def encode(self, record: Record) -> list[int]:
        """Its tokens as in training, IMAGE_TOKEN_INDEX once for an image."""
        return self._encoded(record).tokens.tolist()

    def prompt(self, record: Record) -> list[int]:
        """Its tokens before the last answer."""
        encoded = self._encoded(record)
        places = encoded.supervised.nonzero()[0]
        last = [i for i in places if not encoded.supervised[i - 1]][-1]
        return encoded.tokens[:last].tolist()

    def _encoded(self, record: Record):
        sample_format = "chat" if self.stage == "tune" else "caption"
        template = self.settings.template if sample_format == "chat" else None
        return RecordTokenizer(self.tokenizer, sample_format, 4, template, 4096)([record])

    def batch(self, tokens: list[int], image: Path) -> dict:
        """What the training model takes."""
        processor = BUILDER.build(self.cfg.image_processor.to_dict())
        (pixels,) = load_pixels(image, processor, self.settings.tune.pad_image_to_square)
        count = self.resolved.tiles["image_tokens"]
        ids = [i for token in tokens
               for i in ([token] * count if token == IMAGE_TOKEN_INDEX else [token])]  # fmt: skip
        sample = {"id": "0", "index": 0, "input_ids": np.array(ids), "labels": np.array(ids),
                  "pixel_values": [pixels]}  # fmt: skip
        return collate([sample])["data"]

    def logits(self, tokens: list[int], image: Path) -> torch.Tensor:
        """(T, V) of the training model, images expanded."""
        return _logits(self.model, self.batch(tokens, image))

    def exact_logits(self, tokens: list[int], image: Path) -> torch.Tensor:
        """The same in float64: of the weights alone, without the rounding of a pass in float32."""
        batch = self.batch(tokens, image)
        batch["pixel_values"] = batch["pixel_values"].double()
        model = copy.deepcopy(self.model).double()
        base_model(model.llm).config._experts_implementation = "eager"  # grouped_mm has no float64
        return _logits(model, batch)

    def greedy(self, tokens: list[int], image: Path, count: int, ends: list[int], never: int):
        """The next tokens, each by a whole pass."""
        found = []
        while len(found) < count and (not found or found[-1] not in ends):
            scores = self.logits(tokens + found, image)[-1]
            if never < len(scores):
                scores[never] = -torch.inf
            found.append(int(scores.argmax()))
        return found


@torch.no_grad()
def _logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model.eval().llm(**model.splice(batch), use_cache=False).logits[0]


def make(folder, pieces, name, *, train_llm="lora", encoder="clip", start_from="target",
         stage="tune", options=None, precision="fp32") -> Run:  # fmt: skip
    """Write models, config and the parts that a stage writes."""
    write_llm(folder / "llm", pieces, name)
    kind = encoder if isinstance(encoder, dict) else dict(type=encoder)
    getattr(encoder_folders, kind["type"])(folder / "encoder")
    data = [{"id": "0", "conversations": [{"from": "human", "value": "?"},
                                          {"from": "gpt", "value": "!"}]}]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(data))
    config = folder / "tiny_run.py"
    config.write_text(_config(folder, name, kind, train_llm, start_from, precision))
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options or {})
    cfg.work_dir, cfg.launcher = str(folder / "run"), "none"
    settings = Settings.from_config(cfg)
    cfg = resolved.fill_in_loaders(cfg, settings, Precision(settings.precision))
    run = Run(folder, config, settings, cfg, None, stage)
    table = stage_table(settings)
    for row in list(table.values())[: list(table).index(stage) + 1]:
        run.model = _train(run, row)
    return run


def _train(run: Run, row) -> nn.Module:
    """Random numbers in place of training, written by the stage's own code."""
    model = MODELS.build(model_config(run.resolved, row))
    torch.manual_seed(len(row.name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) * 0.1
            parameter.data = parameter.data + noise.to(parameter.dtype)
    origin = provenance_of(run.resolved, row)
    for side, value in model.fingerprints.items():
        origin[side]["fingerprint"] = value
    for component in (each for each in COMPONENTS if each in row.writes):
        place = run.work_dir / row.writes[component]
        place.parent.mkdir(parents=True, exist_ok=True)
        component.save(model, place, origin, component.companion(run.cfg))
    write_json(run.work_dir / row.name / "stage.json", {"status": "finished", "origin": origin})
    return model


def write_llm(folder: Path, pieces, name: str) -> None:
    """Write a tiny LLM as it is published: config, weights, tokenizer."""
    newer.skip_unless_known(name)
    kind = KINDS[name]
    if kind.tokenizer.startswith("bytes"):
        tokenizer = small_tokenizers.byte_level(
            *kind.specials, adds_bos=kind.tokenizer == "bytes+bos"
        )
    else:
        file = pieces(kind.tokenizer != "without")
        tokenizer = small_tokenizers.llama(file, kind.tokenizer, *kind.specials)
    tokenizer.chat_template = kind.template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = kind.llm.config_class(
        **SIZES, vocab_size=len(tokenizer) + kind.free_rows, **dict(kind.more)
    )
    llm = kind.llm(config)
    for key, weight in llm.named_parameters():
        nn.init.normal_(weight, mean=float("norm" in key and "gemma" not in name), std=0.2)
    llm.save_pretrained(folder)
    if name == "internlm2":
        llm.save_pretrained(folder, state_dict=to_internlm2(llm.state_dict(), llm.config))
        _rewrite(folder, model_type="internlm2", bias=False)
    if name == "internlm3":
        _rewrite(folder, model_type="internlm3", bias=True, qkv_bias=True)


def _rewrite(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _config(folder, name, encoder, train_llm, start_from, precision) -> str:
    lora = "lora=dict(r=4, lora_alpha=8, lora_dropout=0.0)"
    return f"""\
_base_ = [{str(ROOT / "configs/_base_/dpa.py")!r}]
llm_name_or_path = {str(folder / "llm")!r}
family = {name!r}
visual_encoder_name_or_path = {str(folder / "encoder")!r}
encoder = {encoder!r}
precision = {precision!r}
captions = dict(data_path={str(folder / "data.json")!r}, image_folder={str(folder)!r}, held_out=0)
instructions = dict(data_path={str(folder / "data.json")!r}, image_folder={str(folder)!r})
proxy = dict({lora})
tune = dict(train_llm={train_llm!r}, start_from={start_from!r}, {lora})
model = dict(use_activation_checkpointing=False)
"""


def write_image(path: Path, width: int = 20, height: int = 20) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def record(out: Path) -> dict:
    """What an exported folder says of itself."""
    return json.loads((out / "dpa.json").read_text())
