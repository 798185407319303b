"""Every config loads, can be used, and goes through its three stages in a rehearsal."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS, VISBACKENDS, VISUALIZERS
from mmengine.utils import get_object_from_string
from safetensors.torch import load_file
from support import harness, newer
from torch import nn
from transformers import BitsAndBytesConfig
from xtuner.model.utils import traverse_dict
from xtuner.utils import PROMPT_TEMPLATE

from dpa_xtuner.loss import CMO, build_scheme
from dpa_xtuner.model.configs import model_class
from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.model.llm import base_model
from dpa_xtuner.model.published import published_config
from dpa_xtuner.planning.memory import stage_models
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.build import model_config
from dpa_xtuner.stages.run import Run, fill_in_loaders
from dpa_xtuner.stages.settings import Settings

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FOUND = sorted(p.stem for p in CONFIGS.rglob("*.py") if "_base_" not in p.parts)
HOW_MANY = 28
BF16 = Precision("bf16")
QLORA = [name for name in FOUND if name.endswith("_qlora")]
DEMO = "dpa_smollm2_135m_openmoji"
NO_MODEL_NO_DATA = {"DPA_REHEARSE": "1", "HF_HUB_OFFLINE": "1", "DPA_DATA": "nowhere"}
WITHOUT_GPU = "rehearsing without model.llm.quantization_config"
WRITTEN = ["align/projector", "proxy/llm_adapter", "tune/llm", "tune/projector"]


@dataclass(frozen=True)
class Published:
    """What is published of an LLM; `billions` are all its parameters."""

    billions: float
    source: str
    tied: bool = False
    softcap: float | None = None


LLMS = {
    "internlm/internlm2_5-1_8b-chat": Published(1.89, "model page, safetensors"),
    "internlm/internlm2_5-7b-chat": Published(7.74, "model page, safetensors"),
    "internlm/internlm2_5-20b-chat": Published(19.9, "model page, safetensors"),
    "internlm/internlm3-8b-instruct": Published(8.80, "model page, safetensors"),
    "Qwen/Qwen2.5-1.5B-Instruct": Published(1.54, "model card", tied=True),
    "Qwen/Qwen2.5-3B-Instruct": Published(3.09, "model card", tied=True),
    "Qwen/Qwen2.5-7B-Instruct": Published(7.61, "model card"),
    "Qwen/Qwen2.5-14B-Instruct": Published(14.7, "model card"),
    "Qwen/Qwen2.5-32B-Instruct": Published(32.5, "model card"),
    "Qwen/Qwen3-1.7B": Published(1.721, "base model's files", tied=True),
    "Qwen/Qwen3-8B": Published(8.19, "model page, safetensors"),
    "Qwen/Qwen3-30B-A3B": Published(30.53, "model page, safetensors"),
    "meta-llama/Llama-3.2-3B-Instruct": Published(3.21, "model card", tied=True),
    "mistralai/Mistral-7B-Instruct-v0.3": Published(7.25, "model page, safetensors"),
    "mistralai/Ministral-8B-Instruct-2410": Published(8.02, "model page, safetensors"),
    "HuggingFaceTB/SmolLM3-3B": Published(3.08, "model page, safetensors", tied=True),
    "google/gemma-3-4b-it": Published(0.675 + 3.209, "arXiv 2503.19786, table 1", tied=True),
    "meta-llama/Llama-3.1-8B-Instruct": Published(8.03, "model page, safetensors"),
    "lmsys/vicuna-7b-v1.5": Published(6.74, "Llama-2-7b's model page, safetensors"),
    "lmsys/vicuna-13b-v1.5": Published(13.02, "Llama-2-13b's model page, safetensors"),
    # 918 M of embeddings and 8324 M of others.
    "google/gemma-2-9b-it": Published(9.242, "arXiv 2408.00118, table 2", True, 30.0),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Published(0.135, "arXiv 2502.02737", tied=True),
}
"""Tied or not, and the cap: config.json of each."""

ENCODERS = {"openai/clip-vit-large-patch14-336": 0.3035}
"""Billions, of OpenAI's ViT-L/14@336px without its text tower and the projection behind it."""


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"{name}.py")


def each(names: list[str]) -> pytest.MarkDecorator:
    """A test of each config; skipped where the installed transformers is too old for the LLM."""
    params = []
    for name in names:
        old = newer.is_too_old_for(load(name).family)
        skip = pytest.mark.skipif(old, reason="its LLM needs a newer transformers")
        params.append(pytest.param(name, marks=skip))
    return pytest.mark.parametrize("name", params)


def rehearsed() -> list[str]:
    """One config of each tiny LLM: sizes of a family differ in their head at most."""
    kinds = {}
    for name in FOUND:
        cfg = load(name)
        tied = LLMS[cfg.llm_name_or_path].tied if name != DEMO else True
        kinds.setdefault((cfg.family, tied, name in QLORA), name)
    return list(kinds.values())


def sized(name: str) -> tuple[Config, Settings]:
    """A config whose models have a published size: the demo's are local folders."""
    cfg = load(name)
    if name == DEMO:
        cfg.llm_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        cfg.visual_encoder_name_or_path = str(ROOT / "dpa_xtuner/demo/vit")
    return cfg, Settings.from_config(cfg)


def test_all_configs_are_found():
    assert len(FOUND) == HOW_MANY
    assert "dpa_internlm2_7b" in FOUND and len(QLORA) == 6
    used = {load(name).llm_name_or_path for name in FOUND if name != DEMO}
    assert used == LLMS.keys() - {"HuggingFaceTB/SmolLM2-135M-Instruct"}


@each(FOUND)
def test_settings_are_valid_and_names_known(name):
    settings = Settings.from_config(load(name))
    assert settings.llm_family is not None
    assert settings.prompt_template is None or settings.prompt_template in PROMPT_TEMPLATE
    assert "{input}" in settings.template["INSTRUCTION"]
    for stage in (settings.align, settings.tune):
        demos = name == DEMO and stage is settings.tune
        d_min = 0.25 if demos else 0.05
        assert build_scheme(stage.loss) == CMO(d_min, d_max=0.5, window=3, boundary="sample")


@each(FOUND)
def test_every_type_is_that_of_something(name):
    cfg = load(name)
    cfg = fill_in_loaders(cfg, Settings.from_config(cfg), BF16)
    types = [cfg.tokenizer.type, cfg.image_processor.type, cfg.model.llm.type]
    types.append(cfg.model.visual_encoder.type)
    for path in types:
        assert get_object_from_string(path).__name__ == "from_pretrained", path
    for hook in cfg.default_hooks.values():
        assert HOOKS.get(hook.type), hook.type
    assert OPTIM_WRAPPERS.get(cfg.optim_wrapper.type)
    assert VISUALIZERS.get(cfg.visualizer.type)
    for backend in cfg.visualizer.vis_backends:
        assert VISBACKENDS.get(backend.type)


@each([n for n in FOUND if n != DEMO])
def test_the_papers_numbers_hold_for_the_papers_sizes(name):
    settings = Settings.from_config(load(name))
    assert (settings.proxy.lr, settings.align.lr, settings.tune.lr) == (4e-5, 2e-3, 4e-5)
    rank = 128 if name in QLORA else 256
    assert (settings.proxy.lora.r, settings.proxy.lora.lora_alpha) == (rank, 2 * rank)
    assert settings.tune.train_llm == ("lora" if name in QLORA else "full")
    for stage in (settings.proxy, settings.align, settings.tune):
        assert (stage.global_batch_size, stage.max_epochs, stage.warmup_ratio) == (256, 1, 0.03)


@pytest.mark.parametrize("name", QLORA)
def test_4_bit_weights_are_asked_for_as_transformers_takes_them(name):
    cfg = load(name)
    loader = fill_in_loaders(cfg, Settings.from_config(cfg), BF16).model.llm.to_dict()
    traverse_dict(loader)  # as XTuner does before it builds
    quantised = loader["quantization_config"]
    assert isinstance(quantised, BitsAndBytesConfig)
    assert quantised.load_in_4bit and quantised.bnb_4bit_quant_type == "nf4"
    assert quantised.bnb_4bit_compute_dtype is torch.bfloat16
    # Nothing differs from the 16-bit config but this and the batches' and LoRA's sizes.
    plain = load(name.removesuffix("_qlora"))
    changed = {key for key in cfg if cfg[key] != plain.get(key)}
    assert changed == {"model", "proxy", "align", "tune"}


def meta_stage(cfg: Config, settings: Settings, stage: str) -> nn.Module:
    """A stage's model as the stage builds it, of the published size and without memory."""
    cfg.work_dir = "nowhere"
    run = Run.of(cfg, BF16)
    cfg, model = run.cfg, model_config(run, run.stages[stage])
    for handed_over in ("merged_adapter", "pretrained_projector"):
        model.pop(handed_over, None)
    with torch.device("meta"):
        published = published_config("llm_name_or_path", cfg.model.llm)
        model["llm"] = model_class(cfg.model.llm)(published)
        if "visual_encoder" in model:
            kind, loader = build_encoder(settings.encoder), cfg.model.visual_encoder
            encoder = published_config("visual_encoder_name_or_path", loader)
            model["visual_encoder"] = kind.build(encoder)
        return MODELS.build(model)


def names(model: nn.Module, trained: bool) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad == trained}


def numel(module: nn.Module, trained: bool | None = None) -> int:
    chosen = (p for p in module.parameters() if trained is None or p.requires_grad == trained)
    return sum(p.numel() for p in chosen)


def lora_weights(model: nn.Module, settings: Settings) -> set[str]:
    """Names that LoRA's weights have where it adapts all linear layers but the head."""
    llm = base_model(model.llm)
    head = llm.get_output_embeddings()
    layers = [  # peft puts the layer itself below the adapted one
        name.removesuffix(".base_layer")
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and module is not head
    ]
    targets = {name.rsplit(".", 1)[1] for name in layers}
    assert targets == set(settings.llm_family.lora_targets)
    assert len(layers) == len(targets) * llm.config.num_hidden_layers
    return {f"llm.base_model.model.{n}.lora_{ab}.default.weight" for n in layers for ab in "AB"}


@pytest.mark.slow
@each(FOUND)
def test_all_stages_at_full_size_without_memory(name):
    cfg, settings = sized(name)
    published = LLMS[settings.llm_name_or_path]
    proxy = meta_stage(cfg, settings, "proxy")
    llm = base_model(proxy.llm)
    assert names(proxy, trained=True) == lora_weights(proxy, settings)
    assert numel(proxy, trained=False) / 1e9 == pytest.approx(published.billions, rel=0.01)
    head, embeddings = llm.get_output_embeddings(), llm.get_input_embeddings()
    assert type(head) is nn.Linear and head.bias is None
    assert (head.weight is embeddings.weight) == published.tied
    assert getattr(llm.config, "final_logit_softcapping", None) == published.softcap

    align = meta_stage(cfg, settings, "align")
    projector = {f"projector.{name}" for name, _ in align.projector.named_parameters()}
    assert names(align, trained=True) == projector and len(projector) == 4
    assert numel(align.llm) / 1e9 == pytest.approx(published.billions, rel=0.01)
    encoder = ENCODERS.get(settings.visual_encoder_name_or_path)
    if encoder is not None:
        assert numel(align.visual_encoder) / 1e9 == pytest.approx(encoder, rel=0.01)
        assert align.encoder_spec.tokens(align.visual_encoder.config) == 576

    tune = meta_stage(cfg, settings, "tune")
    if settings.tune.train_llm == "lora":
        of_llm = lora_weights(tune, settings)
    else:
        of_llm = {f"llm.{name}" for name, _ in tune.llm.named_parameters()}
    assert names(tune, trained=True) == of_llm | projector
    assert {n for n in names(tune, trained=False) if n.startswith("visual_encoder.")}

    for model, ours in zip((proxy, align, tune), stage_models(cfg).values(), strict=True):
        counts = ours.counts  # of tools/memory.py
        assert (counts.trained, counts.frozen) == (numel(model, True), numel(model, False))


def rehearse(command: list[str], work_dir: Path, **env: str) -> str:
    environment = {**os.environ, **NO_MODEL_NO_DATA, **env}
    done = subprocess.run(
        [*command, "--work-dir", str(work_dir)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def check(work_dir: Path, output: str, tuned: str = "llm") -> None:
    wanted = [place.replace("tune/llm", f"tune/{tuned}") for place in WRITTEN]
    written = Path(f"{work_dir}-rehearsal")
    assert (
        sorted(f.parent.relative_to(written).as_posix() for f in written.glob("*/*/dpa.json"))
        == wanted
    )
    for file in written.glob("*/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert output.count("Stage tune (3 of 3)") == 1
    assert all(place in output.rsplit("Finished:", 1)[1] for place in wanted)
    assert not work_dir.exists()


@pytest.mark.slow
@each(rehearsed())
def test_steps_of_one_stage_after_the_other_at_tiny_size(name, tmp_path):
    work_dir = tmp_path / name
    base = f"{work_dir}-rehearsal"
    later = {"DPA_REHEARSAL": base, "DPA_CACHE": f"{base}/cache"}
    for stage in harness.STAGES:
        env = NO_MODEL_NO_DATA | (later if stage != "proxy" else {})
        config = CONFIGS / f"{name}.py"
        output = harness.finish(stage, work_dir, config=config, env=env)
        if not torch.cuda.is_available():
            assert (WITHOUT_GPU in output) == (name in QLORA)
    settings = Settings.from_config(load(name))
    check(work_dir, output, tuned="llm" if settings.tune.train_llm == "full" else "llm_adapter")
    llm = json.loads((Path(base) / "inputs/llm/config.json").read_text())
    assert llm["model_type"] in settings.llm_family.model_types
    loader = fill_in_loaders(load(name), settings, BF16).model.llm
    rehearsed = model_class(loader).config_class(**llm)
    if name != DEMO:  # whose own LLM is a local folder, which is not here
        assert rehearsed.tie_word_embeddings == LLMS[settings.llm_name_or_path].tied


@pytest.mark.slow
def test_rehearsal_of_all_stages_by_one_command(tmp_path):
    work_dir, config = tmp_path / "run", CONFIGS / "dpa_smollm2_135m_openmoji.py"
    command = [sys.executable, "-m", "xtuner.tools.train", str(config)]
    output = rehearse(command, work_dir)
    check(work_dir, output, tuned="llm_adapter")
    assert Path(f"{work_dir}-rehearsal/curves.png").is_file()
    # A line for each interval of the two in each stage, with the time left; the config is a file.
    assert len(re.findall(r"Iter\(train\) \[.*  eta: \d+:\d\d:\d\d  .*loss: ", output)) == 3 * 4
    assert output.count("The config of this stage: ") == 3
    for noise in (
        "Config:",
        "Hooks will be executed",
        "Failed to search registry",
        "SyncBatchNorm",
    ):
        assert noise not in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_by_the_xtuner_command_on_two_ranks_with_zero2(tmp_path):
    work_dir = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("xtuner")), "train"]
    command += [str(CONFIGS / "dpa_internlm2_7b.py"), "--deepspeed", "zero2"]
    port = str(harness.free_port())
    check(work_dir, rehearse(command, work_dir, NPROC_PER_NODE="2", PORT=port))
