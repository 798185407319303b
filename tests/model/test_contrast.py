"""The contrast pass against passes of the whole length, written for the test."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from support.decoders import MODELS, PIC, V, build
from support.tiny_llava import PATCHES, sample
from xtuner.utils import IGNORE_INDEX

from dpa_xtuner.data import collate
from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.contrast import contrast_log_probs
from dpa_xtuner.model.llm import add_lora, supervised_log_probs


def batch(*samples: dict) -> dict:
    return collate(samples)["data"]


BATCHES = {
    "left": [sample(1, PIC, 20, 5, 21, 22, 7, 23)],
    "right": [sample(1, 5, 21, 22, 23, PIC)],
    "middle": [sample(1, 6, 20, 30, PIC, 31, 8, 32, 33)],
    "start": [sample(PIC, 40, 41, 42, 5, 43)],
    "several": [sample(1, PIC, PIC, 24, 25, PIC, 6, 26, PIC), sample(PIC, 5, PIC, 27, 28)],
    "none": [sample(1, 20, 21, 22)],
    "unequal": [
        sample(1, PIC, 5, 20, 21, 22, 23, 24, 25, 26, 27, 28, 6, 29),
        sample(2, 35, PIC, 36),
        sample(1, 30, 31, 32, 33),
        sample(PIC, 34, 50, 51),
        sample(3, PIC, 9),
        sample(2, 8, PIC, 7, 52, 53, 54),
    ],
}


def last_text(data: dict, row: int, column: int) -> int | None:
    """The column of the last text token before this one."""
    before = [t for t in range(column) if not data["image_mask"][row, t]]
    return before[-1] if before else None


def supervised(data: dict) -> list[tuple[int, int]]:
    """Row and column of the supervised tokens themselves."""
    return [(b, t + 1) for b, t in (data["labels"][:, 1:] != IGNORE_INDEX).nonzero().tolist()]


@torch.no_grad()
def full_length(llm, data: dict) -> list[tuple[float, float]]:
    """Cross entropy and logit of each token: images are there, and masked out."""
    embeds = llm.get_input_embeddings()(data["input_ids"])
    embeds = torch.where(data["image_mask"][..., None], torch.randn_like(embeds), embeds)
    mask = data["attention_mask"] & ~data["image_mask"]
    logits = llm(
        inputs_embeds=embeds, attention_mask=mask.long(), position_ids=data["position_ids"],
        use_cache=False,
    ).logits  # fmt: skip
    return [_asked(logits[b], last_text(data, b, t), data, b, t) for b, t in supervised(data)]


@torch.no_grad()
def one_by_one(llm, data: dict) -> list[tuple[float, float]]:
    """The same for each sample alone, its image tokens deleted."""
    found = []
    for b, t in supervised(data):
        kept = data["attention_mask"][b] & ~data["image_mask"][b]
        ids, positions = (data[key][b, kept][None] for key in ("input_ids", "position_ids"))
        logits = llm(input_ids=ids, position_ids=positions).logits[0]
        last = last_text(data, b, t)
        found.append(_asked(logits, None if last is None else int(kept[:last].sum()), data, b, t))
    return found


def _asked(logits, place: int | None, data, b: int, t: int) -> tuple[float, float]:
    if place is None:
        return math.log(V), 0.0
    target = data["labels"][b, t]
    return F.cross_entropy(logits[place], target).item(), logits[place, target].item()


def agree(found, data: dict, expected: list[tuple[float, float]]) -> None:
    imaged = [bool(data["image_mask"][b].any()) for b, _ in supervised(data)]
    kept = [pair for pair, has in zip(expected, imaged, strict=True) if has]
    ours = [pair for pair, has in zip(zip(*map(torch.Tensor.tolist, found), strict=True), imaged,
                                      strict=True) if has]  # fmt: skip
    assert torch.allclose(torch.tensor(ours), torch.tensor(kept), atol=1e-5)


@pytest.mark.parametrize("where", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_it_says_what_a_pass_of_the_whole_length_says(family, attention, where):
    llm, data = build(family, attention), batch(*BATCHES[where])
    found = contrast_log_probs(llm, data)
    assert len(found.cross_entropy) == len(supervised(data)) > 0
    agree(found, data, full_length(llm, data))


@pytest.mark.parametrize("family", [name for name in MODELS if "-" not in name])
@pytest.mark.parametrize("where", ["left", "middle", "several", "unequal"])
def test_the_token_after_an_image_is_predicted_from_the_text_before(family, where):
    llm, data = build(family), batch(*BATCHES[where])
    agree(contrast_log_probs(llm, data), data, one_by_one(llm, data))


def test_without_text_before_all_tokens_are_alike():
    data = batch(sample(PIC, 40, 41))
    first, second = contrast_log_probs(build(), data).probability.tolist()
    assert first == pytest.approx(1 / V, rel=1e-6) and second != pytest.approx(1 / V, rel=1e-2)


def test_of_a_sample_without_an_image_nothing_is_asked():
    data = batch(*BATCHES["unequal"])
    found = contrast_log_probs(build(), data)
    for (b, _), *pair in zip(supervised(data), *map(torch.Tensor.tolist, found), strict=True):
        assert (pair == [0, 0]) == (not data["image_mask"][b].any())


@pytest.mark.parametrize("labels", ["all", "none"])
def test_a_batch_with_nothing_to_compare_runs_over_a_single_token(labels):
    data = batch(*BATCHES["none"] if labels == "all" else [sample(1, PIC, 5, 6)])
    llm, seen = build(), []
    watch_decoder(llm, seen)
    assert not torch.stack(contrast_log_probs(llm, data)).any()
    assert [inputs["input_ids"].shape for inputs in seen] == [(1, 1)]


def watch_decoder(llm, seen: list[dict]) -> None:
    llm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )


def test_nothing_is_spent_on_images_or_on_samples_without_one():
    torch.manual_seed(0)
    words = [torch.randint(20, V, (length,)).tolist() for length in (20, 40, 30)]
    texts = [sample(*text[:5], PIC, *text[5:], PIC) for text in words]
    llm, seen = build(), []
    watch_decoder(llm, seen)
    contrast_log_probs(llm, batch(texts[0], sample(1, *range(20, 60)), *texts[1:]))
    (inputs,) = seen
    assert inputs["input_ids"].shape == (3, 40)
    for row, text in enumerate(words):
        mask = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row, mask].tolist() == text
        places = inputs["position_ids"][row, mask].tolist()
        assert places == [i + PATCHES * (i >= 5) for i in range(len(text))]


@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize("family", [name for name in MODELS if "-" not in name])
def test_in_bfloat16_it_is_near(family, how):
    llm, data = build(family), batch(*BATCHES["unequal"])
    expected = contrast_log_probs(llm, data).cross_entropy
    llm = llm.bfloat16() if how == "weights" else llm
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = contrast_log_probs(llm, data).cross_entropy
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.3


def with_lora(llm, dropout: float):
    torch.manual_seed(1)
    return add_lora(llm, LoraConfig(r=2, lora_dropout=dropout, init_lora_weights=False))


def test_lora_takes_part_and_dropout_does_not():
    data = batch(*BATCHES["unequal"])
    llm = with_lora(build(), 0.5)
    expected = full_length(llm.eval(), data)
    with llm.disable_adapter():
        of_base = full_length(llm, data)
    assert (torch.tensor(expected) - torch.tensor(of_base)).abs().mean() > 0.1
    agree(contrast_log_probs(llm.train(), data), data, expected)


def test_nothing_is_recomputed_nothing_is_kept_and_the_modes_stay(monkeypatch):
    data = batch(*BATCHES["unequal"])
    llm = with_lora(build(), 0.5).train()
    base = llm.get_base_model()
    base.gradient_checkpointing_enable()
    base.model.layers[1].eval()  # what a user has set, by module
    modes = [module.training for module in llm.modules()]
    given = copy.deepcopy(data)

    def recompute(*args, **kwargs):
        raise AssertionError("recomputed")

    # The decoder calls it, and since transformers 4.53 each layer.
    for module in (base.model, *base.model.layers):
        monkeypatch.setattr(module, "_gradient_checkpointing_func", recompute, raising=False)
    with pytest.raises(AssertionError, match="recomputed"):
        supervised_log_probs(llm, inputs_of(data), data)
    found = contrast_log_probs(llm, data)
    assert not any(part.requires_grad for part in found)
    assert [module.training for module in llm.modules()] == modes
    assert len(set(modes)) == 2
    for key, value in given.items():
        assert torch.equal(data[key], value) if torch.is_tensor(value) else data[key] == value


def inputs_of(data: dict) -> dict:
    return {key: data[key] for key in ("input_ids", "attention_mask", "position_ids")}


def test_the_modes_stay_when_the_pass_fails():
    llm = build().train()
    llm.get_decoder().norm.register_forward_hook(lambda *args: args[-1] * float("nan"))
    with pytest.raises(DPAError):
        contrast_log_probs(llm, batch(*BATCHES["left"]))
    assert all(module.training for module in llm.modules())


def spoil(llm, token: int) -> None:
    """Make the embedding of a token infinite, as an overflow does."""
    llm.get_input_embeddings().weight.data[token] = float("inf")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("which", ["ordinary", "contrast"])
def test_spoilt_samples_are_named_and_no_others(which, attention):
    words = [[*range(40, 50)], [24, 13, 25], [26, 27], [13, 28], [29, 30], [31, 32]]
    data = batch(*(sample(1, PIC, *w, name=f"no {i}") for i, w in enumerate(words)))
    llm = build(attention=attention)
    spoil(llm, 13)
    with pytest.raises(DPAError, match=r"not finite .* for the samples 'no 1', 'no 3'\.") as error:
        if which == "contrast":
            contrast_log_probs(llm, data)
        else:
            supervised_log_probs(llm, inputs_of(data), data)
    assert ("without the images" in str(error.value)) == (which == "contrast")
