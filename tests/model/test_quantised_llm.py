"""A quantised LLM keeps the proxy beside its weights. The weights here are floats that say so."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from support import tiny_llava
from transformers import LlamaForCausalLM

from dpa_xtuner.data import collate
from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.model.llm import add_lora


@pytest.fixture
def adapter(tmp_path) -> str:
    """An adapter for the tiny LLM that changes what it says, trained with dropout."""
    llm = tiny_llava.build(sharp=True).llm
    lora = LoraConfig(r=2, lora_alpha=8, lora_dropout=0.5, init_lora_weights=False)
    add_lora(llm, lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return str(tmp_path / "adapter")


@pytest.fixture
def build(adapter, monkeypatch):
    def built(quantised: bool, **kwargs):
        monkeypatch.setattr(LlamaForCausalLM, "is_quantized", quantised, raising=False)
        return tiny_llava.build(sharp=True, merged_adapter=adapter, **kwargs).train()

    return built


def step(model) -> tuple[dict, dict]:
    """Loss and gradients of a batch with pictures, several and none."""
    losses = model.compute_loss(collate(tiny_llava.MIXED)["data"])
    losses["loss"].backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["uniform", "cmo", "cal"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_is_that_of_the_merged_model(build, loss, checkpointing):
    options = dict(loss=loss, use_activation_checkpointing=checkpointing)
    merged, beside = (build(q, **options) for q in (False, True))
    assert type(merged.llm) is LlamaForCausalLM and isinstance(beside.llm, PeftModel)
    expected, expected_gradients = step(merged)
    losses, gradients = step(beside)
    assert losses.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(losses[key], expected[key], atol=1e-5), key
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-5), name


def test_the_proxy_says_something_else_than_the_llm(build):
    plain = tiny_llava.build(sharp=True).train()
    assert abs(step(plain)[0]["loss"] - step(build(True))[0]["loss"]) > 0.01


def test_only_the_projector_is_trained_and_saved(build):
    model = build(True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert all(name.startswith("projector.") for name in model.state_dict())
    assert not model.llm.config.use_cache


def test_the_fingerprint_sees_the_adapter_and_stays_through_a_step(build):
    model = build(True, loss="cmo")
    # What tells LLMs apart is the original's, with the proxy or without.
    assert model.fingerprints["llm"] == tiny_llava.build(sharp=True).fingerprints["llm"]
    before = fingerprint(model.llm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model)
    optimizer.step()
    assert fingerprint(model.llm) == before
    name, weight = next((n, p) for n, p in model.llm.named_parameters() if ".lora_B" in n)
    weight.data.view(torch.int32).view(-1)[0] ^= 1
    assert fingerprint(model.llm) != before, name
