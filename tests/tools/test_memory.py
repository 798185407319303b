"""Bytes and parameters, against published numbers and numbers worked out by hand."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from peft import LoraConfig
from support import harness, newer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
from transformers.integrations import sdpa_attention

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.llm import add_lora, decode
from dpa_xtuner.planning.memory import Counts, Memory, StageModel, state_memory
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.run import Run

ROOT = Path(__file__).parents[2]
# In billions, as the models' cards and repositories say; of Qwen3, as the headers of its base
# models' files say: 596,049,920 and so on.
PUBLISHED = {
    "internlm/internlm2_5-1_8b-chat": ("internlm2", 1.89),
    "internlm/internlm2_5-7b-chat": ("internlm2", 7.74),
    "internlm/internlm2_5-20b-chat": ("internlm2", 19.86),
    "internlm/internlm3-8b-instruct": ("internlm3", 8.80),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2_5", 1.54),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2_5", 3.09),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2_5", 7.61),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2_5", 14.77),
    "Qwen/Qwen2.5-32B-Instruct": ("qwen2_5", 32.76),
    "Qwen/Qwen3-0.6B": ("qwen3", 0.596),
    "Qwen/Qwen3-1.7B": ("qwen3", 1.721),
    "Qwen/Qwen3-4B": ("qwen3", 4.022),
    "Qwen/Qwen3-8B": ("qwen3", 8.191),
    "Qwen/Qwen3-14B": ("qwen3", 14.768),
    "Qwen/Qwen3-32B": ("qwen3", 32.762),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama3_1", 8.03),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", 30.53),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama3_2", 1.236),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama3_2", 3.213),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", 7.248),
    "mistralai/Ministral-8B-Instruct-2410": ("ministral", 8.020),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", 3.075),
    # arXiv 2503.19786, table 1: embeddings and others, without the vision encoder.
    "google/gemma-3-1b-it": ("gemma3", 0.302 + 0.698),
    "google/gemma-3-4b-it": ("gemma3", 0.675 + 3.209),
    "google/gemma-3-12b-it": ("gemma3", 1.012 + 10.759),
    "lmsys/vicuna-7b-v1.5": ("vicuna", 6.74),
    "lmsys/vicuna-13b-v1.5": ("vicuna", 13.02),
    "google/gemma-2-9b-it": ("gemma2", 9.24),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("smollm2", 0.1345),
}
CLIP = 0.3035
H, Q, HEADS, INNER, LAYERS, VOCABULARY = 64, 64, 4, 96, 3, 512
BATCH, LENGTH, RANK = 2, 40, 8


def stage_model(stage: str, path: Path | None = None, **changes) -> StageModel:
    cfg = Config.fromfile(path or ROOT / "configs" / "_base_" / "dpa.py")
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    run = Run.of(cfg, Precision("fp32" if cfg.get("precision") == "fp32" else "bf16"))
    return StageModel(run, run.stages[stage])


@pytest.fixture
def folders(tmp_path):
    """An LLM and a CLIP of sizes to work out by hand: their configurations alone."""

    def make(layers: int = LAYERS, kind: str = "llama") -> dict[str, str]:
        llm, encoder = tmp_path / f"{kind}{layers}", tmp_path / "encoder"
        AutoConfig.for_model(
            kind, hidden_size=H, intermediate_size=INNER, num_hidden_layers=layers,
            vocab_size=VOCABULARY, num_attention_heads=HEADS, num_key_value_heads=2,
            head_dim=Q // HEADS,
        ).save_pretrained(llm)  # fmt: skip
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=14,
        ).save_pretrained(encoder)  # fmt: skip
        names = {"llm_name_or_path": str(llm), "visual_encoder_name_or_path": str(encoder)}
        return names | {"family": "vicuna" if kind == "llama" else kind}

    return make


def states(memory: Memory) -> float:
    return memory.parameters + memory.gradients + memory.optimizer


@pytest.mark.parametrize(("zero", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_zero_papers_example(zero, gigabytes):
    # Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 GPUs.
    memory = state_memory(Counts(trained=7_500_000_000, frozen=0, frozen_bytes=0), 64, zero)
    assert states(memory) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_frozen_weights_and_plain_training_by_hand():
    counts = Counts(trained=10, frozen=100, frozen_bytes=200)
    plain = state_memory(counts, 4, 0)
    assert (plain.parameters, plain.gradients, plain.optimizer) == (60 + 200, 40, 80)
    assert plain.buffers == 40 and state_memory(counts, 1, 0).buffers == 0
    assert state_memory(counts, 4, 2).parameters == 20 + 200
    assert state_memory(counts, 4, 3).parameters == (20 + 200) / 4
    assert plain.total == 260 + 40 + 80 + 40


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    family, billions = PUBLISHED[name]
    newer.skip_unless_known(family)
    model = stage_model("align", llm_name_or_path=name, family=family)
    assert model.counts.frozen / 1e9 == pytest.approx(billions + CLIP, rel=0.01)
    width = model.llm_config.hidden_size
    assert model.counts.trained == 1024 * width + width + width * width + width
    # 576 patches: 25 hidden states, and what goes into and comes out of two linear layers.
    assert model.visual_bytes == 2 * 576 * (25 * 1024 + 1024 + 3 * width)


def test_a_local_folder_is_counted_as_it_is_loaded(tiny):
    tune = stage_model("tune", harness.TINY_CONFIG)
    llm = AutoModelForCausalLM.from_pretrained(tiny / "llm")
    encoder = CLIPVisionModel.from_pretrained(tiny / "visual_encoder")
    width, of_clip = llm.config.hidden_size, encoder.config.hidden_size
    projector = of_clip * width + width + width * width + width
    assert tune.counts.trained == llm.num_parameters() + projector
    assert tune.counts.frozen == encoder.num_parameters()
    assert tune.counts.frozen_bytes == 2 * encoder.num_parameters()


def test_lora_and_4_bit_weights_by_hand(folders):
    quantised = dict(type="transformers.BitsAndBytesConfig", load_in_4bit=True)
    proxy = stage_model("proxy", **folders(), proxy__lora__r=8)
    kv = 2 * H // HEADS
    shapes = [(H, Q), (H, kv), (H, kv), (Q, H), (H, INNER), (H, INNER), (INNER, H)]
    assert proxy.counts.trained == LAYERS * sum(8 * (i + o) for i, o in shapes)
    linear = LAYERS * sum(i * o for i, o in shapes)
    rest = 2 * VOCABULARY * H + (2 * LAYERS + 1) * H
    assert proxy.counts.frozen == linear + rest
    assert proxy.counts.frozen_bytes == 2 * (linear + rest)
    for double, bits in ((False, 4.5), (True, 4.127)):
        quantised["bnb_4bit_use_double_quant"] = double
        options = {"model__llm__quantization_config": quantised, "tune__train_llm": "lora"}
        model = stage_model("proxy", **folders(), proxy__lora__r=8, **options)
        assert model.counts.frozen_bytes == pytest.approx(linear * bits / 8 + 2 * rest)


def layer_kept(llm: nn.Module, autocast: bool, padding: int) -> int:
    """Bytes that autograd really keeps for ``BATCH`` samples of a decoder's forward pass."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor

    def run(samples: int) -> int:
        kept.clear()
        dtype = llm.get_input_embeddings().weight.dtype
        inputs = torch.zeros(samples, LENGTH, H, dtype=dtype, requires_grad=True)
        positions = torch.arange(LENGTH).expand(samples, -1)
        mask = torch.ones_like(positions)
        mask[0, LENGTH - padding :] = 0
        batch = {"inputs_embeds": inputs, "position_ids": positions, "attention_mask": mask}
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
            decode(llm, batch)
        return sum(storage.nbytes() for storage in kept.values())

    return run(2 * BATCH) - run(BATCH)  # without the weights and autocast's copies of them


def decoder(folder: str, stage: str, attention: str, precision: str) -> nn.Module:
    """The LLM of a folder with random weights, as a stage trains it; ``autocast`` is bf16."""
    config = AutoConfig.from_pretrained(folder, attn_implementation=attention)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    llm = AutoModelForCausalLM.from_config(config).requires_grad_(stage == "tune")
    if stage == "proxy":
        llm = add_lora(llm.to(dtype), LoraConfig(r=RANK))
    if precision == "autocast" and stage != "align":
        return llm  # trained weights stay float32
    return llm.to(dtype)


@pytest.mark.parametrize("precision", ["autocast", "bf16", "fp32"])
@pytest.mark.parametrize("stage", ["proxy", "align", "tune"])
@pytest.mark.parametrize(
    ("kind", "attention", "tolerance"),
    [("llama", "sdpa", 0), ("llama", "eager", 0), ("gemma2", "eager", 0.11),
     ("qwen3", "eager", 0.05)],
)  # fmt: skip
def test_the_formula_is_what_autograd_keeps_of_a_layer(
    folders, kind, attention, tolerance, stage, precision
):
    newer.skip_unless_known("vicuna" if kind == "llama" else kind)
    computed, padded, full = [], [], []
    for layers in (LAYERS, LAYERS + 1):
        names = folders(layers, kind)
        changes = {f"{stage}__batch_size": BATCH, "proxy__lora__r": RANK}
        changes |= {"precision": "auto" if precision == "autocast" else precision}
        changes |= {"model__llm__attn_implementation": attention}
        changes |= {"model__use_activation_checkpointing": False}
        model = stage_model(stage, **names, **changes)
        zero = 0 if precision == "autocast" else 2
        computed.append(model.memory(8, zero, LENGTH).activations)
        llm = decoder(names["llm_name_or_path"], stage, attention, precision).train()
        padded.append(layer_kept(llm, precision == "autocast", padding=2))
        full.append(layer_kept(llm, precision == "autocast", padding=0))
    computed, padded, full = (pair[1] - pair[0] for pair in (computed, padded, full))
    if attention == "sdpa" and hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        assert computed == pytest.approx(padded, rel=0.06)
        assert 0.94 < computed / full < 1.15  # on 5, keys and values are not repeated
    else:
        assert computed == pytest.approx(full, rel=tolerance, abs=0)


def test_checkpointing_keeps_a_layers_input_and_all_of_one_layer(folders):
    (deep, deep_kept), (shallow, shallow_kept) = (
        [
            stage_model(
                "tune", **folders(n), tune__batch_size=BATCH, model__use_activation_checkpointing=c
            ).memory(8, 2, LENGTH).activations
            for c in (True, False)
        ]
        for n in (LAYERS + 1, LAYERS)
    )  # fmt: skip
    boundary, layer = BATCH * LENGTH * 2 * H, deep_kept - shallow_kept
    assert deep - shallow == boundary
    assert shallow_kept - shallow == (LAYERS - 1) * layer - LAYERS * boundary


def test_float32_takes_twice_as_much(folders):
    half, single = (
        stage_model("align", **folders(), precision=precision) for precision in ("bf16", "fp32")
    )
    assert single.counts.frozen_bytes == 2 * half.counts.frozen_bytes
    assert state_memory(single.counts, 8, 2, 4).gradients == single.counts.trained * 4 / 8
    memory, of_half = single.memory(8, 2), half.memory(8, 2)
    assert memory.parameters == 2 * of_half.parameters
    assert memory.optimizer == of_half.optimizer  # float32 weights and moments in both
    plain = single.memory(1, 0)  # no copy for autocast
    assert plain.parameters == 4 * (single.counts.trained + single.counts.frozen)


def test_zero_3_shares_out_no_4_bit_weights(folders):
    quantised = dict(type="transformers.BitsAndBytesConfig", load_in_4bit=True)
    options = {"model__llm__quantization_config": quantised, "tune__train_llm": "lora"}
    model = stage_model("align", **folders(), **options)
    assert model.memory(8, 3).total == float("inf") > model.memory(8, 2).total


def test_a_frozen_llm_keeps_less_and_longer_samples_more(folders):
    changes = {**folders(), "tune__batch_size": BATCH, "align__batch_size": BATCH}
    changes["model__use_activation_checkpointing"] = False
    tune, align = (
        stage_model(stage, **changes).memory(8, 2, LENGTH).activations
        for stage in ("tune", "align")
    )
    assert align < tune
    model = stage_model("align", **changes)
    assert model.memory(8, 2, 2 * LENGTH).activations > align
    tiled = stage_model("align", **changes, max_tiles=6).memory(8, 2, LENGTH).activations
    # Six tiles and a thumbnail: 7 images of 4 patches and 3 hidden states of 32 channels.
    assert tiled - align >= BATCH * 6 * 4 * 3 * 32 * 2


def test_an_unknown_model_is_named_with_the_way_out():
    with pytest.raises(DPAError, match="llm_name_or_path='nobody/none' is neither"):
        stage_model("proxy", llm_name_or_path="nobody/none", family="qwen2")


def test_the_tool_prints_a_row_for_each_stage():
    command = [sys.executable, str(ROOT / "tools" / "memory.py"), "dpa_qwen2_5_7b"]
    command += ["--gpus", "8", "--zero", "2", "--cfg-options", "tune.train_llm=full"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip(" :-") for row in rows] == ["stage", "", "proxy", "align", "tune"]
    tune = [cell.strip() for cell in rows[-1]]
    # 7,615,616,512 and a projector of 16.5 million: 2 bytes each, beside 0.6 GB of CLIP.
    assert tune[1] == "7,632.1 M" and tune[3] == "14.8"
    assert tune[4:6] == ["1.8", "10.7"]


def test_the_documented_table_is_the_tools_own(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool, configs = (importlib.import_module(name) for name in ("memory", "_configs"))

    def lines(text):  # whatever the columns' widths
        found = (" ".join(line.split()) for line in text.splitlines())
        return [line for line in found if not line.startswith("|:-")]

    documented = lines((ROOT / "docs/memory.md").read_text())
    made = lines("\n".join(tool.tables(["dpa_internlm2_7b_qlora", "dpa_qwen2_5_1_5b"])))
    assert sum(line.startswith("| dpa_") for line in made) == 2 * (1 + 3)
    assert [line for line in made if line not in documented] == []
    rows = [line.split("|")[1].strip() for line in documented if line.startswith("| dpa_")]
    assert rows == configs.config_names() + sorted(3 * configs.config_names())
    meant = [line for line in documented if "_qlora | 1 x 24 GB |" in line]
    assert len(meant) == sum(name.endswith("_qlora") for name in configs.config_names())
