"""InternLM2 and InternLM3 as LLaMA, against XTuner's modelling code and hand-packed weights."""

import json

import pytest
import torch
from support.internlm import InternLM2Config as TheirConfig
from support.internlm import InternLM2ForCausalLM as TheirModel
from support.internlm import needs_its_code, to_internlm2
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpa_xtuner.errors import DPAError
from dpa_xtuner.families.internlm.llm import (
    InternLM2ForCausalLM,
    InternLM3ForCausalLM,
    to_llama,
)

TINY = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=16,
    rope_theta=1e6,
)


def their_model(folder, bias=False, rope=None, **save):
    torch.manual_seed(0)
    model = TheirModel(TheirConfig(**TINY, bias=bias, rope_scaling=rope)).eval()
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder, **save)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internlm2.InternLM2Config"}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def logits(model, length=12):
    tokens = torch.arange(2 * length).view(2, length) * 7 % TINY["vocab_size"]
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@needs_its_code
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [12, 24], ids=["short", "beyond the trained length"])
@pytest.mark.parametrize("rope", [None, "dynamic", "linear"])
def test_logits_are_those_of_internlm2(tmp_path, rope, length, attention):
    scaling = rope and {"type": rope, "factor": 2.0}
    theirs = their_model(tmp_path, rope=scaling)
    ours = InternLM2ForCausalLM.from_pretrained(str(tmp_path), attn_implementation=attention)
    assert ours.config._attn_implementation == attention
    expected = logits(theirs, length)
    assert expected.std() > 0.5  # else all would agree
    torch.testing.assert_close(logits(ours, length), expected, atol=1e-5, rtol=0)


@needs_its_code
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "30KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_every_format_is_read_bit_for_bit(tmp_path, bias, shard, safe):
    theirs = their_model(tmp_path, bias=bias, max_shard_size=shard, safe_serialization=safe)
    assert len(list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.safetensors"))) > (
        1 if shard == "30KB" else 0
    )
    ours, info = InternLM2ForCausalLM.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    back = to_internlm2(ours.state_dict(), ours.config)
    assert set(back) == set(theirs.state_dict())
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back[name], weight), name


def test_qkv_by_hand():
    """Two heads of k and v, one of them shared by two of q each; head size 2, hidden size 8."""
    config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2)
    packed = torch.arange(16.0)[:, None].expand(16, 8)  # a row holds its number
    split = to_llama({"model.layers.3.attention.wqkv.weight": packed}, config)
    rows = {name.split(".")[-2]: weight[:, 0].tolist() for name, weight in split.items()}
    assert rows == {
        "q_proj": [0, 1, 2, 3, 8, 9, 10, 11],
        "k_proj": [4, 5, 12, 13],
        "v_proj": [6, 7, 14, 15],
    }
    assert {name.rsplit(".", 2)[0] for name in split} == {"model.layers.3.self_attn"}


@needs_its_code
def test_it_is_a_plain_llama_that_saves_as_one(tmp_path):
    theirs = their_model(tmp_path / "published")
    ours = InternLM2ForCausalLM.from_pretrained(
        str(tmp_path / "published"), torch_dtype=torch.bfloat16, trust_remote_code=False
    )
    assert type(ours) is LlamaForCausalLM and type(ours.config) is LlamaConfig
    assert ours.dtype == torch.bfloat16
    assert ours.name_or_path == str(tmp_path / "published")
    ours.float().save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "llama" and saved["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in saved
    for load in (AutoModelForCausalLM, InternLM2ForCausalLM):
        again = load.from_pretrained(str(tmp_path / "saved"))
        assert torch.equal(logits(again), logits(ours))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=0.2, rtol=0)


@needs_its_code
def test_weights_of_another_size_are_refused(tmp_path):
    their_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(DPAError, match="has 96 rows; 8 heads, 4 of k and v, of size 8 make 128"):
        InternLM2ForCausalLM.from_pretrained(str(tmp_path))


@needs_its_code
def test_a_folder_without_weights_is_refused(tmp_path):
    their_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DPAError, match="has no weights: expected model"):
        InternLM2ForCausalLM.from_pretrained(str(tmp_path))


def test_a_missing_folder_is_an_os_error():
    with pytest.raises(OSError):
        InternLM2ForCausalLM.from_pretrained("internlm/nowhere", local_files_only=True)


def test_a_configuration_makes_a_llama_at_published_size():
    """InternLM2.5-7B has 7,737,708,544 parameters (its safetensors index: 15,475,417,088 bytes)."""
    values = dict(
        model_type="internlm2", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=92544, bias=False,
    )  # fmt: skip
    config = LlamaConfig(**InternLM2ForCausalLM.config_class.as_llama(values))
    with torch.device("meta"):
        model = InternLM2ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 7_737_708_544


def internlm3(folder, **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**TINY, rope_scaling={"rope_type": "dynamic", "factor": 6})
    )
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("attention_bias", "mlp_bias", "architectures"):
        del config[key]
    config |= {"model_type": "internlm3", "bias": False, "qkv_bias": False, **changes}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def test_internlm3_is_a_llama(tmp_path):
    theirs = internlm3(tmp_path)
    ours, info = InternLM3ForCausalLM.from_pretrained(str(tmp_path), output_loading_info=True)
    assert type(ours) is LlamaForCausalLM and not any(info.values())
    assert not hasattr(ours.config, "auto_map") and ours.config.rope_scaling["factor"] == 6
    assert torch.equal(logits(ours, 24), logits(theirs, 24))


def test_an_internlm3_that_is_no_llama_is_refused(tmp_path):
    internlm3(tmp_path, qkv_bias=True)
    with pytest.raises(DPAError, match=r"qkv_bias=True and bias=False.*trust_remote_code=True"):
        InternLM3ForCausalLM.from_pretrained(str(tmp_path))
