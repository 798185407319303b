"""Every stock LLaVA config becomes one of ours that keeps its model, data and schedule."""

import subprocess
import sys
from pathlib import Path

import pytest
import xtuner
from mmengine.config import Config
from transformers import BitsAndBytesConfig
from xtuner.model.utils import traverse_dict

from dpa_xtuner.errors import DPAError
from dpa_xtuner.planning.from_stock import family_of, find_stock, stock_names, write_config
from dpa_xtuner.stages.settings import Settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BASE = ROOT / "configs" / "_base_" / "dpa.py"
# The files themselves, without the scripts among them.
FILES = {
    path.stem: path
    for path in (Path(xtuner.__file__).parent / "configs" / "llava").rglob("*.py")
    if not path.name.startswith("convert_")
}
HOW_MANY = 33
PRETRAIN = "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain"
QLORA = "llava_internlm2_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
FULL = "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_finetune"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """All of them, in a folder that has nothing to do with this one."""
    folder = tmp_path_factory.mktemp("configs")
    for name in stock_names():
        write_config(find_stock(name), folder / f"{name}.py", BASE)
    return {path.stem: path for path in folder.iterdir()}


def test_all_stock_configs_are_there(written):
    assert sorted(written) == sorted(FILES)
    assert len(written) == HOW_MANY


@pytest.mark.parametrize("name", sorted(FILES))
def test_model_data_and_schedule_are_kept(name, written):
    stock, cfg = Config.fromfile(FILES[name]), Config.fromfile(written[name])
    settings = Settings.from_config(cfg)
    text = written[name].read_text()

    llm = stock.model.llm
    assert settings.llm_name_or_path == llm.pretrained_model_name_or_path
    assert settings.visual_encoder_name_or_path == "openai/clip-vit-large-patch14-336"
    quantised = llm.get("quantization_config")
    assert bool(quantised) == ("quantization_config" in cfg.model.llm)
    if quantised:
        loader = cfg.model.llm.to_dict()
        traverse_dict(loader)  # as XTuner does before it loads
        ours = loader["quantization_config"].to_dict()
        theirs = BitsAndBytesConfig(**{k: v for k, v in quantised.items() if k != "type"}).to_dict()
        changed = {key for key in ours if ours[key] != theirs[key]}
        assert changed == {"bnb_4bit_compute_dtype"}

    trains_llm = not stock.model.freeze_llm or "llm_lora" in stock.model
    stage, data = (
        (settings.tune, settings.instructions)
        if trains_llm
        else (settings.align, settings.captions)
    )
    assert stage.lr == stock.lr
    assert stage.batch_size == stock.batch_size
    gpus = 1 if "gpu1_" in name else 8
    assert stage.global_batch_size == stock.batch_size * stock.accumulative_counts * gpus
    assert stage.max_epochs == stock.max_epochs
    assert stage.max_length == stock.max_length + 24 * 24  # ours counts the image too
    assert stage.warmup_ratio == pytest.approx(stock.warmup_ratio)
    assert stage.save_steps == max(1, round(stock.save_steps / stock.accumulative_counts))
    assert stage.pad_image_to_square is trains_llm
    if trains_llm:
        lora = stock.model.get("llm_lora")
        assert stage.train_llm == ("lora" if lora else "full")
        if lora:
            assert stage.lora.model_dump() == {k: lora[k] for k in stage.lora.model_dump()}

    paths = data.data_path if isinstance(data.data_path, list) else [data.data_path]
    dataset = stock.train_dataloader.dataset
    for one in dataset.get("datasets", [dataset]):
        assert one["data_path"] in paths or one["data_path"] in text.split("_base_")[0]
    missing = {one["data_path"] for one in dataset.get("datasets", [dataset])} - set(paths)
    assert not missing or "refcoco" in name


def lost_keys(file: Path, stage: str) -> str:
    """What the new config says is not taken over into a stage."""
    notes = file.read_text().split("_base_")[0]
    return notes.split(f"Not taken over into {stage}:")[1].split("# Not taken over")[0]


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_is_not_kept_is_said(name, written):
    stock = Config.fromfile(FILES[name])
    trains_llm = not stock.model.freeze_llm or "llm_lora" in stock.model
    lost = lost_keys(written[name], "tune" if trains_llm else "align")
    for hook in stock.custom_hooks:
        assert hook["type"].__name__ in lost
    assert "optim_wrapper.dtype='float16'" in lost
    rank = stock.model.get("visual_encoder_lora", {}).get("r")
    assert (f"'r': {rank}," in lost) == (rank is not None)
    assert ("freeze_visual_encoder=False" in lost) == (not stock.model.freeze_visual_encoder)
    assert ("model.pretrained_pth=" in lost) == ("pretrained_pth" in stock.model)
    if "refcoco" in name:
        assert ".RefCOCOJsonDataset" in lost and ".InvRefCOCOJsonDataset" in lost
    for taken_over in ("optim_wrapper.optimizer", "train_cfg", "env_cfg", "model.llm"):
        assert taken_over not in lost


def test_the_other_stage_comes_from_the_config_that_belongs_to_it(written):
    pretrain, qlora, full = (Config.fromfile(written[name]) for name in (PRETRAIN, QLORA, FULL))
    for key in ("align", "tune", "captions", "instructions"):
        assert pretrain[key] == qlora[key]
    assert full.align == qlora.align and full.captions == qlora.captions
    assert qlora.tune.lora.r == 512 and full.tune.train_llm == "full"
    assert "model.llm.quantization_config={" in lost_keys(written[FULL], "align")
    assert "quantization_config" not in lost_keys(written[QLORA], "align")


def test_a_quantised_llm_without_a_tune_stage_is_tuned_by_lora(written):
    alone = next(name for name in written if "llama3_70b" in name)
    assert Config.fromfile(written[alone]).tune.train_llm == "lora"
    assert "set instructions" in written[alone].read_text()


@pytest.mark.parametrize(
    ("llm", "family"),
    [
        ("internlm/internlm2-chat-20b", "internlm2"),
        ("internlm/internlm2_5-7b-chat", "internlm2"),
        ("internlm/internlm-chat-20b", None),
        ("internlm/internlm-20b", None),
        ("internlm/internlm3-8b-instruct", "internlm3"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3_1"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2"),
        ("huggyllama/llama-30b", None),
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("Qwen/Qwen2-7B-Instruct", "qwen2"),
        ("/models/Qwen2.5-7B-Instruct", "qwen2_5"),
        ("google/gemma-2-9b-it", "gemma2"),
        ("google/gemma-2b-it", None),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2"),
        ("microsoft/Phi-3-mini-4k-instruct", None),
    ],
)
def test_families_are_known_by_the_names_of_their_llms(llm, family):
    assert family_of(llm) == family


def test_an_llm_of_no_family_keeps_its_template_and_is_loaded_by_its_own_class(written):
    phi = Config.fromfile(
        written["llava_phi3_mini_4k_instruct_clip_vit_large_p14_336_e1_gpu8_pretrain"]
    )
    assert phi.prompt_template == "phi3_chat" and "family" not in phi
    assert phi.model.llm.type == "transformers.Phi3ForCausalLM.from_pretrained"
    assert not phi.model.llm.trust_remote_code and not phi.tokenizer.trust_remote_code
    path = written["llava_internlm_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain"]
    internlm = Config.fromfile(path)
    assert internlm.prompt_template == "internlm_chat"
    assert internlm.model.llm.type == "transformers.AutoModelForCausalLM.from_pretrained"
    assert internlm.model.llm.trust_remote_code and internlm.tokenizer.trust_remote_code
    assert "# The code of LLM and tokenizer comes with the model, and is run." in path.read_text()


def test_a_template_with_the_familys_text_is_left_to_the_family(written):
    """Which also strips, and tokenises, as the published chat template does."""
    for name, path in written.items():
        cfg = Config.fromfile(path)
        if cfg.get("family") in ("internlm2", "llama3"):
            assert "prompt_template" not in cfg
        else:
            assert (
                cfg.prompt_template
                == find_stock(name).keys["dataset.template_map_fn"]["template"].rsplit(".", 1)[1]
            )
            said = "prompt_template is XTuner's" in path.read_text()
            assert said == ("family" in cfg)


def test_an_edited_stock_config_is_read_by_its_path(tmp_path):
    text = FILES[QLORA].read_text()
    for old, new in [
        ('"openai/clip-vit-large-patch14-336"', '"google/siglip-so400m-patch14-384"'),
        ("CLIPVisionModel", "SiglipVisionModel"),
        ("lr = 2e-4", "lr = 3e-4"),
        ("weight_decay = 0\n", "weight_decay = 0.1\n"),
        ("prompt_template = PROMPT_TEMPLATE.internlm2_chat",
         "prompt_template = dict(INSTRUCTION='Q: {input} A:', SEP='\\n')"),
        ("randomness = dict(seed=None", "randomness = dict(seed=7"),
        ("pad_image_to_square=True,", "pad_image_to_square=True, max_dataset_length=99,"),
        ("    freeze_visual_encoder=True,", "    freeze_visual_encoder=True, projector_depth=3,\n"
         "    max_position_embeddings=4096,"),
        ('bias="none",\n        task_type', 'bias="all",\n        task_type'),
    ]:  # fmt: skip
        assert old in text, old
        text = text.replace(old, new)
    edited = tmp_path / "mine.py"
    edited.write_text(text)
    notes = write_config(find_stock(edited), tmp_path / "ours.py", BASE)
    cfg = Config.fromfile(tmp_path / "ours.py")
    assert cfg.tune.lr == 3e-4 and cfg.align.lr == 1e-3
    assert cfg.encoder == dict(type="siglip")
    assert cfg.tune.max_length == 1472 + 27 * 27
    assert cfg.optim_wrapper.optimizer.weight_decay == 0.1
    assert cfg.optim_wrapper.optimizer.betas == (0.9, 0.999)
    assert cfg.prompt_template == dict(INSTRUCTION="Q: {input} A:", SEP="\n")
    assert cfg.randomness.seed == 7
    assert cfg.tune.global_batch_size == 128  # on 8 GPUs, since the name says nothing
    assert "  dataset.max_dataset_length=99" in notes
    assert "  model.max_position_embeddings=4096" in notes
    assert "  model.llm_lora.bias='all'" in notes
    assert Settings.from_config(cfg).projector == dict(type="mlp", depth=3)


def test_what_is_no_stock_config_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(DPAError, match=f"did you mean '{PRETRAIN}'"):
        find_stock(PRETRAIN.replace("_336", "_335"))
    other = next((Path(xtuner.__file__).parent / "configs" / "qwen").rglob("*.py"))
    with pytest.raises(DPAError, match="no LLaVA config"):
        find_stock(other)
    (tmp_path / "there.py").touch()
    with pytest.raises(DPAError, match=r"there.py exists"):
        write_config(find_stock(PRETRAIN), tmp_path / "there.py", BASE)


def test_base_is_relative_inside_a_checkout_and_absolute_outside(tmp_path):
    base = tmp_path / "checkout" / "configs" / "_base_" / "dpa.py"
    base.parent.mkdir(parents=True)
    base.write_text(BASE.read_text())
    for place, wanted in [
        ("checkout/configs/mine.py", "_base_/dpa.py"),
        ("checkout/own/folder/mine.py", "../../configs/_base_/dpa.py"),
        ("elsewhere/mine.py", str(base)),
    ]:
        output = tmp_path / place
        write_config(find_stock(PRETRAIN), output, base)
        assert f"_base_ = [{wanted!r}]" in output.read_text()
        assert Config.fromfile(output).align.lr == 1e-3


def test_the_tool_says_what_it_did(tmp_path):
    output = tmp_path / "my_config.py"
    command = [sys.executable, str(ROOT / "tools" / "apply_dpa.py"), PRETRAIN, "-o", str(output)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f"tune: the training of {QLORA}." in done.stdout
    assert "Not taken over into tune:\n  " in done.stdout
    assert f"xtuner train {output}" in done.stdout
    again = subprocess.run(command, text=True, capture_output=True)
    assert again.returncode == 1 and "exists" in again.stderr
    assert "Traceback" not in again.stderr
