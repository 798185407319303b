"""Splicing pictures into text, and what trains."""

import copy
import logging
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.tiny_llava import MIXED, V, build, sample
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from xtuner.model.utils import prepare_inputs_labels_for_multimodal
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.data import collate
from dpa_xtuner.data.problems import Problem
from dpa_xtuner.errors import DPAError
from dpa_xtuner.loss import head as head_module
from dpa_xtuner.model.dpa_llava import DPALLaVAModel


@pytest.fixture
def model() -> DPALLaVAModel:
    return build()


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


def test_the_log_probabilities_are_those_of_the_whole_model(model):
    data = collate(MIXED)["data"]
    found = model(data, mode="tensor")
    full = model.llm(**model.splice(data)).logits
    places = (data["labels"][:, 1:] != IGNORE_INDEX).nonzero().tolist()
    targets = [int(data["labels"][b, t + 1]) for b, t in places]
    logits = torch.stack([full[b, t] for b, t in places])
    expected = F.cross_entropy(logits, torch.tensor(targets), reduction="none")
    assert torch.allclose(found.cross_entropy, expected, atol=1e-6)
    assert torch.allclose(found.logit, logits[range(len(targets)), targets], atol=1e-6)


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
    for pair in zip(*grads, strict=True):
        torch.testing.assert_close(*pair)


def test_activations_are_recomputed_until_it_is_switched_off():
    assert not build(use_activation_checkpointing=False).llm.is_gradient_checkpointing
    model = build()
    assert model.llm.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.llm.is_gradient_checkpointing


@pytest.mark.parametrize("items", [[MIXED[1]], [Problem("0", "missing image")]])
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


# The loss, end to end.

SAMPLES = MIXED + [
    sample(1, 6, 40, 41, "image", 42, 43, 9, 44, 45, 10, 46),  # three turns
    sample(1, "image", 8, 9),  # nothing supervised
]
BOUNDS = {"cmo": (0.0005, 0.03), "cal": (0.1, 1.0)}


def loss_by_hand(model, data: dict, scheme: str, boundary: str):
    """Logits everywhere, whole softmax, the images masked out, a loop over tokens."""
    inputs = model.splice(data)
    logits = model.llm(**inputs).logits
    seen = data["attention_mask"] & ~data["image_mask"]
    with torch.no_grad():
        without = model.llm(**inputs | {"attention_mask": seen}).logits
    low, high = BOUNDS[scheme]
    tokens, d, nats, differences = [], {}, {}, []
    for b, t in (data["labels"] != IGNORE_INDEX).nonzero().tolist():
        label = data["labels"][b, t]
        text = [i for i in range(t) if not data["image_mask"][b, i]]
        p_w = logits[b, t - 1].softmax(-1)[label]
        answer = without[b, text[-1]] if text else torch.zeros(V)
        p_wo = answer.softmax(-1)[label]
        if not data["image_mask"][b].any():
            p_wo = p_w
        difference = p_w - p_wo if scheme == "cmo" else logits[b, t - 1, label] - answer[label]
        if scheme == "cal" and not data["image_mask"][b].any():
            difference = torch.tensor(0.0)
        tokens.append((b, t))
        d[b, t] = min(max(difference.item(), low), high)
        nats[b, t] = -p_w.log()
        differences.append((p_w - p_wo).item())
    rows, length = data["labels"].shape
    weights = []
    for b, t in tokens:
        around = [(b, t - 1), (b, t), (b, t + 1)]
        if boundary == "flat":  # columns 1 .. T-1 of all rows, one after the other
            place = b * (length - 1) + t - 1
            near = [i for i in (place - 1, place, place + 1) if 0 <= i < rows * (length - 1)]
            around = [(i // (length - 1), i % (length - 1) + 1) for i in near]
        values = [d.get(at, low if boundary == "flat" else None) for at in around]
        values = [value for value in values if value is not None]
        weights.append(sum(values) / len(values))
    total = sum(w * nats[at] for w, at in zip(weights, tokens, strict=True))
    stats = {
        "cross_entropy": sum(nats.values()).item() / len(tokens),
        "mean_weight": sum(weights) / len(tokens),
        "supervised_tokens": len(tokens),
        "share_at_d_min": sum(value == low for value in d.values()) / len(tokens),
        "share_at_d_max": sum(value == high for value in d.values()) / len(tokens),
        "mean_p_difference": sum(differences) / len(tokens),
    }
    assert len({round(w, 4) for w in weights}) > 3 and 0 < stats["share_at_d_max"] < 1
    return total / (sum(weights) + 1e-6), stats


@pytest.mark.parametrize("scheme", ["cmo", "cal"])
@pytest.mark.parametrize("boundary", ["sample", "flat"])
def test_the_loss_is_that_of_the_paper_done_plainly(scheme, boundary):
    low, high = BOUNDS[scheme]
    model = build(True, loss=dict(type=scheme, d_min=low, d_max=high, boundary=boundary)).train()
    data = collate(SAMPLES)["data"]
    outputs = model.compute_loss(data)
    expected, stats = loss_by_hand(model, data, scheme, boundary)
    loss = outputs.pop("loss")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {k: v.item() for k, v in outputs.items()} == pytest.approx(stats, rel=1e-4, abs=1e-6)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        assert theirs.abs().max() > 1e-3
        assert torch.allclose(ours, theirs, atol=1e-5)


def gradients(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("scheme", ["cmo", "cal"])
def test_the_second_pass_takes_nothing_from_the_gradients_under_autocast(scheme):
    # Some releases of torch would keep casts of the weights from it that have no graph.
    def gradients_of(loss) -> list[torch.Tensor]:
        options = dict(freeze_llm=False, use_activation_checkpointing=False)
        model = build(True, loss=loss, **options).train()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model.compute_loss(collate(SAMPLES)["data"])
        return gradients(model, outputs["loss"])

    theirs = gradients_of("uniform")
    for one, other in zip(gradients_of(dict(type=scheme, d_min=1, d_max=1)), theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert len(theirs) > 10 and all(gradient.any() for gradient in theirs)


@pytest.mark.parametrize(("scheme", "passes"), [("uniform", 1), ("cmo", 2), ("cal", 2)])
def test_uniform_runs_no_second_pass_and_each_asks_the_head_once(scheme, passes, monkeypatch):
    monkeypatch.setattr(
        head_module, "LOGITS_AT_ONCE_ON_CPU", 2 * V
    )  # ZeRO-3 gathers it for each call
    model, decoder, head = build(loss=scheme), [], []
    model.llm.get_decoder().register_forward_hook(lambda *_: decoder.append(1))
    model.llm.lm_head.register_forward_hook(lambda *_: head.append(1))
    outputs = model.compute_loss(collate(SAMPLES)["data"])
    assert len(decoder) == len(head) == passes
    assert ("share_at_d_min" in outputs) == (passes == 2)


def test_text_alone_counts_with_the_least_weight():
    model = build(True, loss="cmo", llm_lora=LoraConfig(r=2, lora_dropout=0.5))
    outputs = model.train().compute_loss(collate([SAMPLES[1]])["data"])
    assert outputs["mean_weight"].item() == pytest.approx(0.05)
    assert outputs["share_at_d_min"] == 1 and outputs["mean_p_difference"] == 0
    assert outputs["loss"].item() == pytest.approx(outputs["cross_entropy"].item(), rel=1e-4)


@pytest.fixture
def warnings():
    """What is logged as a warning."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.mark.parametrize("scheme", ["uniform", "cmo", "cal"])
@pytest.mark.parametrize("normalize", ["micro_batch", "global"])
def test_nothing_supervised_trains_nothing_and_is_told_once(scheme, normalize, warnings):
    model = build(loss=scheme, normalize=normalize).train()
    batch = [sample(1, "image", 5, 6, name="first"), sample(1, 7, name="second")]
    outputs = model.compute_loss(collate(batch)["data"])
    assert outputs["loss"].item() == 0
    outputs["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
    assert all(math.isfinite(value) for value in outputs.values())
    assert warnings == [
        "The samples 'first', 'second' have no supervised token: they train nothing."
    ]


@pytest.mark.parametrize("scheme", ["uniform", "cmo"])
def test_samples_that_spoil_the_hidden_states_are_named(scheme):
    model = build(loss=scheme)
    model.llm.get_input_embeddings().weight.data[13] = float("nan")
    words = [[*range(30, 40)], [20, 13, 21], [22, 23], [13, 24], [25, 26]]
    batch = [sample(1, "image", *text, name=f"no {i}") for i, text in enumerate(words)]
    with pytest.raises(DPAError, match=r"are not finite .* for the samples 'no 1', 'no 3'\."):
        model.compute_loss(collate(batch)["data"])


def test_image_features_reach_gemma2_at_the_scale_of_text():
    # Before transformers 5 the decoder scales whatever it is given, and since then no feature.
    llm = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager",
    ))  # fmt: skip
    vit = build().visual_encoder
    model = DPALLaVAModel(llm=llm, visual_encoder=vit, freeze_llm=True, freeze_visual_encoder=True)
    seen = []
    llm.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    data = collate([SAMPLES[0]])["data"]
    with torch.no_grad():
        model(data, mode="tensor")
        patches = model.encoder_spec.features(vit, data["pixel_values"])
        expected = model.projector(patches).flatten(0, 1) * 16**0.5
    torch.testing.assert_close(seen[0][data["image_mask"]], expected, atol=1e-5, rtol=1e-5)
