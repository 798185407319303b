"""The registry of families, and what each says of its models."""

import copy
from typing import ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import newer
from torch import nn
from transformers import CONFIG_MAPPING, Gemma2Config, Gemma2ForCausalLM, LlamaConfig
from xtuner.model.utils import LoadWoInit

from dpa_xtuner.errors import DPAError
from dpa_xtuner.families import Family, check_model_type, find_family
from dpa_xtuner.families.base import known_families
from dpa_xtuner.model.configs import model_class, read_config
from dpa_xtuner.model.llm import load
from dpa_xtuner.registry import FAMILIES

NAMES = [
    "gemma2",
    "gemma3",
    "internlm2",
    "internlm3",
    "llama2",
    "llama3",
    "llama3_1",
    "llama3_2",
    "ministral",
    "mistral",
    "qwen2",
    "qwen2_5",
    "qwen3",
    "qwen3_moe",
    "smollm2",
    "smollm3",
    "vicuna",
]
TINY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, vocab_size=64, pad_token_id=0,
)  # fmt: skip


def known(name):
    newer.skip_unless_known(name)
    return find_family(name)


def tiny(family):
    config = CONFIG_MAPPING[family.model_types[-1]](**TINY)
    return model_class({"type": family.llm})(config)


def test_these_are_all_families():
    assert sorted(FAMILIES.module_dict) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_loader_and_tokenizer_are_importable(name):
    family = known(name)
    for path in (family.llm, family.tokenizer):
        assert path.endswith(".from_pretrained")
        assert callable(model_class({"type": path}).from_pretrained)


@pytest.mark.parametrize("name", NAMES)
def test_lora_targets_are_all_linear_layers_but_the_head(name):
    family = known(name)
    llm = tiny(family)
    head = llm.get_output_embeddings()
    linear = {n.split(".")[-1] for n, m in llm.named_modules() if type(m) is nn.Linear}
    assert head is llm.lm_head
    assert set(family.lora_targets) == linear - {"lm_head"}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("qwen", "qwen3"), ("internlm_2", "internlm2"), ("gemma-2", "gemma2"), ("qwen2.5", "qwen2_5")],
)
def test_an_unknown_family_is_answered(wrong, right):
    with pytest.raises(DPAError) as caught:
        find_family(wrong)
    assert f"{wrong!r} is not a known family; did you mean {right!r}?" in str(caught.value)
    assert f"Known: {', '.join(NAMES)}" in str(caught.value)


def test_a_family_that_the_installed_transformers_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.48.0")
    assert find_family("qwen2_5")
    with pytest.raises(DPAError, match=r"'qwen3' needs transformers 4.51 or .*installed is 4.48.0"):
        find_family("qwen3")
    monkeypatch.undo()
    for name, family in known_families().items():
        if not family.llm.startswith("dpa_xtuner.") and name != "qwen3_moe":
            here = hasattr(transformers, family.llm.split(".")[1])
            assert here != newer.is_too_old_for(name), name


def test_a_name_that_is_none_is_answered():
    with pytest.raises(DPAError, match="None is not a known family"):
        find_family(None)


def test_a_family_of_ones_own():
    @FAMILIES.register_module("mine")
    class Mine(Family):
        llm = "transformers.MistralForCausalLM.from_pretrained"
        model_types = ("mistral",)
        template: ClassVar = dict(INSTRUCTION="[INST] {input} [/INST]")

    try:
        assert find_family("mine") is Mine
        del Mine.llm, Mine.model_types
        with pytest.raises(DPAError, match="family='mine' has no llm, model_types; see"):
            find_family("mine")
    finally:
        del FAMILIES.module_dict["mine"]


def test_a_model_of_another_family_is_refused(tmp_path):
    tiny(find_family("qwen2")).save_pretrained(tmp_path)
    # A class reads whatever it is given, and keeps the type that is written there.
    assert LlamaConfig.from_pretrained(tmp_path).model_type == "qwen2"
    check_model_type(find_family("qwen2_5"), str(tmp_path), "qwen2")
    with pytest.raises(DPAError) as caught:
        check_model_type(find_family("llama3"), str(tmp_path), "qwen2")
    assert "a model of type 'qwen2', but family 'llama3' loads llama" in str(caught.value)
    assert "Set family to one of: qwen2, qwen2_5" in str(caught.value)


def test_a_model_of_no_family_is_refused():
    with pytest.raises(DPAError, match=r"'bert', but family 'qwen2' loads qwen2. No family loads"):
        check_model_type(find_family("qwen2"), "folder", "bert")


def test_gemma2_caps_its_attention_scores(tmp_path):
    """SDPA would not; with a low cap and large weights the difference is plain."""
    torch.manual_seed(0)
    config = Gemma2Config(**TINY, attn_logit_softcapping=0.5, query_pre_attn_scalar=16)
    reference = Gemma2ForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager")
    for weight in reference.parameters():
        nn.init.normal_(weight, std=0.5)
    reference.save_pretrained(tmp_path)
    cfg = dict(type=find_family("gemma2").llm, pretrained_model_name_or_path=str(tmp_path))
    tokens = torch.arange(12)[None] * 5
    with torch.no_grad():
        expected = reference.eval()(tokens).logits
        ours = load(dict(cfg)).eval()
        assert torch.equal(ours(tokens).logits, expected)
        if Gemma2ForCausalLM._supports_sdpa:  # transformers 5 refuses it
            sdpa = load(dict(cfg, attn_implementation="sdpa")).eval()
            assert (sdpa(tokens).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("version", ["file", "saved"])
def test_the_text_part_of_a_multimodal_gemma3_is_loaded_and_saved_as_an_llm(tmp_path, version):
    family = known("gemma3")
    torch.manual_seed(0)
    vision = dict(TINY, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=TINY, vision_config=vision)
    whole = transformers.Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("language_model.model.") for name in names if "layers.0.mlp" in name
               and "vision" not in name)  # fmt: skip
    cfg = dict(type=family.llm, pretrained_model_name_or_path=str(tmp_path), **family.loading)
    check_model_type(family, "folder", read_config("llm_name_or_path", cfg).model_type)
    llm = load(dict(cfg))
    if version == "saved":
        llm.save_pretrained(tmp_path / "llm")
        assert "model.norm.weight" in load_file(tmp_path / "llm/model.safetensors")
        llm = load(dict(cfg, pretrained_model_name_or_path=str(tmp_path / "llm")))
    tokens = torch.arange(12)[None] * 5
    with torch.no_grad():
        found, expected = llm.eval()(tokens).logits, whole.eval()(tokens).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_loading_without_initialisation_gives_the_weights(tmp_path):
    """As in training, where XTuner's LoadWoInit makes what is not loaded noise."""
    llm = tiny(find_family("llama3"))
    llm.save_pretrained(tmp_path)
    with LoadWoInit():
        again = model_class({"type": find_family("internlm2").llm}).from_pretrained(str(tmp_path))
    for name, weight in llm.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
