"""The demo's report: matching, chance, and scores against a second computation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dpa_xtuner.demo import report, trained
from dpa_xtuner.errors import DPAError

WORDS = ["<|im_start|>", "<|im_end|>", "user", "assistant", "what", "red", "blue", "is", "it", "\n"]


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("Red.", "red", True),
        ("  a RED ", "red", True),
        ("the top left!", "top left", True),
        ("left top", "top left", False),
        ("redder", "red", False),
        ("", "red", False),
    ],
)
def test_match_leaves_case_punctuation_and_articles_out(
    given: str, expected: str, right: bool
) -> None:
    assert report.matches(given, expected) is right


def _question(choices: int) -> report.HeldOut:
    return report.HeldOut(Path("a.png"), "kind", choices, "<image>\nwhat", "red")


def test_chance_by_hand() -> None:
    # (1/2 + 1/4 + 1/4) / 3
    assert report.chance([_question(2), _question(4), _question(4)]) == pytest.approx(1 / 3)


def test_comparison_has_a_row_a_kind_and_one_for_all() -> None:
    row = report.Row(questions=4, with_picture=1.0, blank=2.0, accuracy=0.5, chance=0.1)
    result = report.Evaluation({"colour": row, "all": row}, ("red",) * 4)
    lines = report.compare(result, result).splitlines()
    assert [line.split()[0] for line in lines] == ["held-out", "colour", "all"]
    assert "50.0% >  50.0%" in lines[1]


@pytest.fixture
def parts() -> report.Parts:
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="it")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=WORDS[:2], pad_token="<|im_end|>"
    )
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    vit = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return report.Parts(llm.eval(), vit.eval(), nn.Linear(8, 16), tokenizer, processor)


@pytest.fixture
def questions(tmp_path: Path) -> list[report.HeldOut]:
    records = []
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
        records.append(
            {
                "id": str(number),
                "image": f"{colour}.png",
                "kind": "colour",
                "choices": 2,
                "conversations": [
                    {"from": "human", "value": "<image>\n" + "what is it " * (number + 1)},
                    {"from": "gpt", "value": colour},
                ],
            }
        )
    path = tmp_path / "heldout_questions.json"
    path.write_text(json.dumps(records))
    return report.load_questions(path)


@torch.no_grad()
def test_cross_entropy_equals_the_plain_one(
    parts: report.Parts, questions: list[report.HeldOut]
) -> None:
    scores = report.answer_cross_entropy(parts, questions, blank=False)
    for question, (total, tokens) in zip(questions, scores, strict=True):
        pixels = parts.processor(Image.open(question.image), return_tensors="pt").pixel_values
        features = parts.vit(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        embed = parts.llm.get_input_embeddings()
        text = report.PROMPT.format(input=question.question) + question.answer + report.END
        before, after = (
            torch.tensor([parts.tokenizer(part, add_special_tokens=False).input_ids])
            for part in text.split("<image>")
        )
        inputs = torch.cat([embed(before), parts.projector(features[:, 1:]), embed(after)], 1)
        logits = parts.llm(inputs_embeds=inputs).logits[0, -3:-1]
        expected = functional.cross_entropy(logits, after[0, -2:], reduction="sum")
        assert tokens == 2
        # The report computes in bfloat16.
        assert total == pytest.approx(expected.item(), abs=0.05)


def test_blank_picture_is_white(parts: report.Parts, questions: list[report.HeldOut]) -> None:
    seen, blank = (report.answer_cross_entropy(parts, questions, b) for b in (False, True))
    assert all(one != other for one, other in zip(seen, blank, strict=True))
    white = [Image.new("RGB", (32, 32), "white").save(q.image) or q for q in questions]
    assert report.answer_cross_entropy(parts, white, False) == report.answer_cross_entropy(
        parts, white, True
    )


def test_evaluation_counts_and_picture(
    parts: report.Parts, questions: list[report.HeldOut], tmp_path: Path
) -> None:
    result = report.evaluate(parts, questions)
    assert list(result.rows) == ["colour", "all"]
    assert result.rows["all"].questions == len(result.answers) == 2
    assert result.rows["all"].chance == 0.5
    report.draw_answers(questions, ["red", "no"], tmp_path / "out" / "answers.png")
    assert Image.open(tmp_path / "out" / "answers.png").width > 1000


def test_a_report_is_kept_until_the_model_is_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "tune").mkdir()
    state, table = tmp_path / "tune" / "stage.json", tmp_path / "report.txt"
    state.write_text("{}")
    table.write_text("a table")
    os.utime(state, (1, 1))
    trained.print_report(tmp_path / "nowhere", tmp_path)
    assert "a table" in capsys.readouterr().out
    os.utime(table, (0, 0))
    with pytest.raises(DPAError, match="is not finished"):
        trained.print_report(tmp_path / "nowhere", tmp_path)
