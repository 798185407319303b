"""Splicing pictures into text, and what trains."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from xtuner.model.utils import prepare_inputs_labels_for_multimodal
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner import DPAError
from dpa_xtuner.data import collate
from dpa_xtuner.data.dataset import Skipped
from dpa_xtuner.model import DPALLaVAModel

PATCHES = 4


def build(**kwargs) -> DPALLaVAModel:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    ))  # fmt: skip
    vit = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        image_size=8, patch_size=4,
    ))  # fmt: skip
    options = dict(freeze_llm=True, freeze_visual_encoder=True) | kwargs
    return DPALLaVAModel(llm=llm, visual_encoder=vit, **options)


@pytest.fixture
def model() -> DPALLaVAModel:
    return build()


def sample(*pieces: int | str, name: str = "0") -> dict:
    """Tokens by number, pictures by 'image'; supervised are the tokens from 20 on."""
    generator = torch.Generator().manual_seed(sum(p for p in pieces if isinstance(p, int)))
    ids, pixels = [], []
    for piece in pieces:
        if piece == "image":
            ids += [IMAGE_TOKEN_INDEX] * PATCHES
            pixels.append(torch.randn(3, 8, 8, generator=generator))
        else:
            ids.append(piece)
    tokens = torch.tensor(ids)
    labels = torch.where(tokens >= 20, tokens, IGNORE_INDEX)
    return {
        "id": name,
        "index": 0,
        "input_ids": tokens.numpy(),
        "labels": labels.numpy(),
        "pixel_values": pixels,
    }


MIXED = [
    sample(1, "image", 7, 20, 21),
    sample(1, 8, 30, 31, 32, 33, 34, 35, 36),
    sample("image", 22, 23),
    sample(1, "image", 5, "image", 24, 25, 26),
]


def test_splicing_is_that_of_a_loop_over_tokens(model):
    data = collate(MIXED)["data"]
    features = model.encode_images(data["pixel_values"])  # (N, patches, H)
    spliced = model.splice(data)
    table, image = model.llm.get_input_embeddings().weight, 0
    for row, item in enumerate(MIXED):
        place, t = 0, 0
        while t < len(item["input_ids"]):
            if item["input_ids"][t] == IMAGE_TOKEN_INDEX:
                expected = features[image]
                image += 1
            else:
                expected = table[int(item["input_ids"][t])][None]
            got = spliced["inputs_embeds"][row, place : place + len(expected)]
            assert torch.equal(got, expected)
            place, t = place + len(expected), t + len(expected)
        assert spliced["attention_mask"][row].tolist() == [
            i < place for i in range(spliced["attention_mask"].shape[1])
        ]
        assert spliced["position_ids"][row, :place].tolist() == list(range(place))
    assert image == len(features) == 4


def test_splicing_agrees_with_xtuners_own_on_single_images(model):
    items = [MIXED[0], MIXED[2]]
    data = collate(items)["data"]
    once = [_one_mark(item) for item in items]
    longest = max(map(len, once))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in once])
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in once])
    stock = prepare_inputs_labels_for_multimodal(
        llm=model.llm, input_ids=ids, attention_mask=mask, labels=ids.clone(),
        pixel_values=model.encode_images(data["pixel_values"]),
    )  # fmt: skip
    ours, mask = model.splice(data), stock["attention_mask"]
    assert torch.equal(ours["attention_mask"], mask)
    assert torch.equal(ours["inputs_embeds"][mask], stock["inputs_embeds"][mask])


def _one_mark(item: dict) -> list[int]:
    tokens = item["input_ids"].tolist()
    return [t for i, t in enumerate(tokens) if t != IMAGE_TOKEN_INDEX or tokens[i - 1] != t]


def test_the_scores_are_those_of_the_whole_model(model):
    data = collate(MIXED)["data"]
    scores = model(data, mode="tensor")
    full = model.llm(**model.splice(data)).logits
    places = (data["labels"][:, 1:] != IGNORE_INDEX).nonzero().tolist()
    targets = [int(data["labels"][b, t + 1]) for b, t in places]
    logits = torch.stack([full[b, t] for b, t in places])
    expected = F.cross_entropy(logits, torch.tensor(targets), reduction="none")
    assert torch.allclose(scores.cross_entropy, expected, atol=1e-6)
    assert torch.allclose(scores.logit, logits[range(len(targets)), targets], atol=1e-6)


def test_a_batch_is_never_changed(model):
    data = collate(MIXED)["data"]
    before = copy.deepcopy(data)
    model(data)["loss"].backward()
    for key, value in before.items():
        same = torch.equal(data[key], value) if torch.is_tensor(value) else data[key] == value
        assert same, key


def test_a_picture_trains_the_projector_and_nothing_else(model):
    model.train()
    model(collate(MIXED)["data"])["loss"].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert all(p.grad.abs().sum() > 0 for p in model.projector.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_activations_changes_no_gradient(recompute):
    grads = []
    for checkpointing in (False, recompute):
        model = build(use_activation_checkpointing=checkpointing).train()
        model(collate(MIXED)["data"])["loss"].backward()
        grads.append([p.grad for p in model.projector.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("items", [[MIXED[1]], [Skipped("0", "missing image")]])
def test_a_batch_without_a_picture_gives_the_projector_zero_gradients(items, model):
    model.train()
    loss = model(collate(items)["data"])["loss"]
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
    text_only = model.llm(torch.tensor([MIXED[1]["input_ids"].tolist()])).logits[0].log_softmax(-1)
    labels = MIXED[1]["labels"].tolist()
    nats = [-text_only[t - 1, label] for t, label in enumerate(labels) if label != IGNORE_INDEX]
    expected = torch.stack(nats).mean() if isinstance(items[0], dict) else torch.tensor(0.0)
    assert torch.allclose(loss, expected, atol=1e-6)


def test_a_wrong_number_of_image_tokens_is_told(model):
    data = collate(MIXED)["data"]
    data["image_mask"][0, 1] = False
    with pytest.raises(DPAError, match=r"15 image positions for 4 images.*4 tokens for each"):
        model(data)


def test_the_frozen_encoder_stays_in_evaluation_mode(model):
    model.train()
    assert model.llm.training and model.projector.training
    assert not model.visual_encoder.training


def test_a_projector_is_loaded_strictly(model, tmp_path):
    nn.init.normal_(model.projector.model[0].weight)
    model.projector.save_pretrained(tmp_path)
    loaded = build(pretrained_projector=str(tmp_path))
    assert all(
        torch.equal(own, other)
        for own, other in zip(
            loaded.projector.parameters(), model.projector.parameters(), strict=True
        )
    )

    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.0.weight"] = torch.zeros(16, 9)
    tensors["extra"] = tensors.pop("model.2.bias")
    save_file(tensors, file)
    message = (
        r"extra: saved \(16,\), model nothing; model\.0\.weight: saved \(16, 9\), model \(16, 8\); "
        r"model\.2\.bias: saved nothing, model \(16,\)"
    )
    with pytest.raises(DPAError, match=message):
        build(pretrained_projector=str(tmp_path))


def test_an_unknown_mode_is_refused(model):
    with pytest.raises(ValueError, match="'predict' is not one of 'loss', 'tensor'"):
        model(SimpleNamespace(), mode="predict")
