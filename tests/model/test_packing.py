"""Samples side by side in a row are to the loss what they are alone."""

import pytest
import torch
from peft import LoraConfig
from support.decoders import MODELS, build
from torch import Tensor, nn
from xtuner.utils import IGNORE_INDEX

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.llm import add_lora, base_model, supervised_scores
from dpa_xtuner.model.packing import pack

T, H = 11, 32
LENGTHS = (5, 11, 4, 6)  # in three rows of 11


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[dict[str, Tensor], dict]:
    torch.manual_seed(1)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    labels = torch.randint(0, 60, mask.shape).masked_fill(~mask, IGNORE_INDEX)
    labels[:, ::3] = IGNORE_INDEX
    inputs = {
        "inputs_embeds": torch.randn(*mask.shape, H, requires_grad=True),
        "attention_mask": mask,
        "position_ids": torch.arange(T).expand(mask.shape),
    }
    return inputs, {"labels": labels, "ids": [f"no {n}" for n in range(len(lengths))]}


def one_by_one(inputs: dict[str, Tensor], data: dict) -> list[tuple[dict, dict]]:
    """Each sample as a batch of its own, without padding."""
    alone = []
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        cut = {key: value[row : row + 1, :length] for key, value in inputs.items()}
        labels = data["labels"][row : row + 1, :length]
        alone.append((cut, {"labels": labels, "ids": data["ids"][row : row + 1]}))
    return alone


def rows_seen(llm: nn.Module) -> list[tuple[int, ...]]:
    shapes = []
    base_model(llm).get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["position_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


def backward(llm: nn.Module, batches: list[tuple[dict, dict]]) -> Tensor:
    found = torch.cat([supervised_scores(llm, *b).cross_entropy for b in batches])
    (found * torch.arange(1, len(found) + 1)).sum().backward()
    return found.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_batch_is_its_samples_one_by_one(family, attention):
    llm = add_lora(build(family, attention), LoraConfig(r=4, target_modules=None))
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    gradients, scores = [], []
    shapes = rows_seen(llm)
    for split in (False, True):
        inputs, data = batch()
        llm.zero_grad()
        scores.append(backward(llm, one_by_one(inputs, data) if split else [(inputs, data)]))
        gradients.append(
            {n: p.grad.clone() for n, p in llm.named_parameters() if p.grad is not None}
            | {"inputs": inputs["inputs_embeds"].grad}
        )
    assert shapes == [(3, 11), *((1, length) for length in LENGTHS)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_where_nothing_is_saved_the_batch_stays_as_it_is():
    llm = build()
    shapes = rows_seen(llm)
    with torch.no_grad():
        supervised_scores(llm, *batch((11, 10, 9)))
    assert shapes == [(3, T)]


OTHERS = {name for name in MODELS if name not in ("llama", "qwen2", "gemma2")}


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_windows_stretched_positions_and_foreign_code_keep_their_rows(family):
    llm = build(family)
    shapes = rows_seen(llm)
    with torch.no_grad():
        supervised_scores(llm, *batch())
    assert shapes == [(len(LENGTHS), T)]


def test_a_spoilt_sample_is_named_without_its_neighbour():
    inputs, data = batch()
    with torch.no_grad():
        inputs["inputs_embeds"][2, 1] = torch.nan  # beside sample 3
    with pytest.raises(DPAError, match=r"for the samples 'no 2'\."):
        supervised_scores(build(), inputs, data)


def laid(lengths: tuple[int, ...], hidden_size: int = 64) -> list[list[int]]:
    kept = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pack(kept, hidden_size).segments.tolist()


def test_the_longest_come_first_and_rows_are_filled():
    assert laid((5, 11, 6)) == [[2] * 11, [3] * 6 + [1] * 5]


def test_rows_are_wider_than_the_longest_sample_where_that_saves_padding():
    # 10 + 8 and 9 + 8 in two rows of 18; in rows of 10 there would be four.
    assert laid((10, 8, 9, 8)) == [[1] * 10 + [2] * 8, [3] * 9 + [4] * 8 + [0]]
    # Attention to twice as many places would cost more than the padding of a very narrow LLM.
    assert len(laid((1000, 990, 990, 990), hidden_size=1)) == 4
