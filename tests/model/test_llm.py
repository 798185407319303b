"""What both models do with their LLM, against plain transformers and peft."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from support.internlm import InternLM2Config, InternLM2ForCausalLM
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.llm import add_lora, merge_adapter, supervised_log_probs

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05, pad_token_id=0)
    ),
    "internlm2": lambda: InternLM2ForCausalLM(InternLM2Config(**SIZES, bias=False)),
}
if InternLM2ForCausalLM is None:
    del MODELS["internlm2"]
LINEAR_OF_LAYER = {"llama": 7, "qwen2": 7, "gemma2": 7, "internlm2": 5}


@pytest.fixture(params=MODELS)
def family(request) -> str:
    return request.param


@pytest.fixture
def llm(family):
    torch.manual_seed(0)
    return MODELS[family]().eval()


@pytest.fixture
def batch() -> tuple[dict, torch.Tensor]:
    """Two rows, the second padded; some tokens supervised, the very first among them."""
    torch.manual_seed(1)
    ids = torch.randint(1, 61, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    labels = torch.where(torch.rand(2, 9) < 0.5, ids, -100).masked_fill(~mask, -100)
    labels[0, 0], labels[0, 8] = ids[0, 0], ids[0, 8]
    positions = torch.arange(9).expand(2, 9)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, labels


def log_probs_of(llm, batch):
    inputs, labels = batch
    return supervised_log_probs(llm, inputs, {"labels": labels, "ids": ["one", "two"]})


@pytest.mark.parametrize("with_peft", [False, True])
def test_log_probabilities_are_those_of_the_full_model(llm, batch, with_peft):
    if with_peft:
        llm = add_lora(llm, LoraConfig(r=2, init_lora_weights=False))
    inputs, labels = batch
    found = log_probs_of(llm, batch)
    full = llm(**inputs).logits
    rows = [(b, t) for b in range(2) for t in range(1, 9) if labels[b, t] != -100]
    logits = torch.stack([full[b, t - 1] for b, t in rows])
    targets = torch.tensor([labels[b, t].item() for b, t in rows])
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(found.cross_entropy, expected, atol=1e-6)
    assert torch.allclose(found.logit, logits[range(len(rows)), targets], atol=1e-6)


def test_soft_capping_bounds_gemmas_logits(batch):
    llm = MODELS["gemma2"]()
    capped = log_probs_of(llm, batch).logit
    llm.config.final_logit_softcapping = None
    assert capped.abs().max() < 0.05 < log_probs_of(llm, batch).logit.abs().max()


def test_no_supervised_token_gives_nothing_but_a_graph(llm, batch):
    inputs, labels = batch
    found = log_probs_of(llm, (inputs, torch.full_like(labels, -100)))
    assert found.cross_entropy.shape == found.logit.shape == (0,)
    found.cross_entropy.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in llm.parameters())


def test_a_head_that_peft_trains_is_the_one_that_is_asked(batch):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    llm = get_peft_model(MODELS["llama"](), lora)
    copy = llm.get_base_model().lm_head.modules_to_save["default"]
    copy.weight.data.normal_()
    full = llm(**batch[0]).logits
    rows = (batch[1][:, 1:] != -100).nonzero().tolist()
    expected = [full[b, t, batch[1][b, t + 1]] for b, t in rows]
    found = log_probs_of(llm, batch)
    assert torch.allclose(found.logit, torch.stack(expected), atol=1e-6)
    found.cross_entropy.sum().backward()
    assert copy.weight.grad.abs().sum() > 0


def test_a_head_with_lora_is_refused(batch):
    llm = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(DPAError, match=r"head of LlamaForCausalLM .* leave the head out of LoRA"):
        log_probs_of(llm, batch)


def test_lora_goes_to_every_linear_layer_but_the_head(llm, family):
    dtype = next(llm.parameters()).dtype
    wrapped = add_lora(llm.bfloat16(), LoraConfig(r=2))
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * LINEAR_OF_LAYER[family]  # A and B in 2 layers
    assert all(".lora_" in name and "lm_head" not in name for name in trainable)
    frozen = [p for p in wrapped.parameters() if not p.requires_grad]
    assert dtype is torch.float32 and {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_equals_pefts_own(family, llm, dtype, tmp_path):
    adapter = add_lora(llm.to(dtype), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    fresh = [MODELS[family]().to(dtype) for _ in range(2)]
    for model in fresh:
        model.load_state_dict(_base(adapter))
    before = {k: v.clone() for k, v in fresh[0].state_dict().items()}
    expected = PeftModel.from_pretrained(fresh[0], str(tmp_path)).merge_and_unload().state_dict()
    merged = merge_adapter(fresh[1], str(tmp_path))
    assert type(merged) is type(fresh[1])
    assert merged.state_dict().keys() == expected.keys() == before.keys()
    assert all(torch.equal(merged.state_dict()[k], expected[k]) for k in expected)
    assert any(not torch.equal(before[k], expected[k]) for k in expected)


def _base(adapter: PeftModel) -> dict[str, torch.Tensor]:
    state = adapter.get_base_model().state_dict()
    return {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}
